// What the layers' kernels read, for a step and for a prompt: the first layer's input, a layer's
// small tensors as float32, and the arguments of its norms, its convolution, and its scan or its
// heads' state space.
#pragma once

#include "base/arena.h"
#include "base/threads.h"
#include "model/model.h"

namespace anymamba {

// hidden (count, d): the embeddings of tokens; where tokens is null, a copy of `given`.
void embed(const Model& model, const std::int64_t* tokens, const float* given, std::int64_t count,
           float* hidden);

// Buffers for the float32 forms of a layer's small tensors, indexed as these.
struct SmallTensors {
  float *norm, *dt_norm, *B_norm, *C_norm;
  float *in_proj_bias, *in_proj_scale, *conv_weight, *conv_bias, *dt_bias, *A, *D, *gated_norm, *out_proj_bias;
  SmallTensors(const Model& model, Arena& memory);
};

// Rows [first, last), of `width` numbers each, of a small tensor as floats: where they lie, or
// converted into `buffer`. Indexed from row 0 either way; null where the tensor is absent.
const float* floats(Array array, float* buffer, RowRange rows, std::int64_t width = 1);

// Multiplies these columns of what in_proj gave, (count, projected), by the layer's scale, if any.
void scale_projected(const Model& model, const Layer& layer, const SmallTensors& small, std::int64_t count,
                     float* projected, RowRange columns);

// Makes A of A_log for these channels, or heads, unless the layer has A.
void compute_A(const Model& model, const Layer& layer, const SmallTensors& small, RowRange rates);

// A layer's activations as float32, (rows, steps, .): what in_proj gave, the convolution's channels
// behind it, what x_proj gave, and the step size.
struct Activations {
  Tensor3 projected, convolved, rBC, delta;
};

// For these channels of the convolution; and with D, gate and softplus for these of the scan, or for
// all heads.
ConvInputs conv_of(const Model& model, const Layer& layer, const SmallTensors& small,
                   const Activations& activations, RowRange channels);
ScanInputs scan_of(const Model& model, const Layer& layer, const SmallTensors& small,
                   const Activations& activations, RowRange channels);

// With the gate unless it comes behind the norm.
SsdInputs ssd_of(const Model& model, const Layer& layer, const SmallTensors& small,
                 const Activations& activations);

// normed (count, width) from x, and a gate if there is one; `buffer` is for the weight.
void rms_norm(std::int64_t count, std::int64_t width, const Rows& x, Array weight, float* buffer,
              float eps, const Rows& normed, const Rows& gate_after = {});

// normed (count, r + 2n) from what x_proj gave, which may be the same memory: each of its three parts
// through its norm. Only for a layer that has these norms.
void norm_rBC(const Model& model, const Layer& layer, const SmallTensors& small, std::int64_t count,
              float* rBC, float* normed);

// normed (count, e), of any type, from y (count, e): each group's channels by themselves; with the
// gate in what in_proj gave, if it comes behind the norm. Only for a layer that has this norm.
void norm_groups(const Model& model, const Layer& layer, const SmallTensors& small, std::int64_t count,
                 float* projected, float* y, const Rows& normed);

// The convolution windows of a layer, one a slot.
Window window_of(const Model& model, const States& states, std::int64_t layer);

// Its states (slots, e, n) or (slots, h, p, n).
float* states_of(const Model& model, const States& states, std::int64_t layer);

}  // namespace anymamba
