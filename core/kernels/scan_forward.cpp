// The selective scan, forward.
#include "kernels/scan_tiles.h"

namespace anymamba::ANYMAMBA_ISA {
namespace {

// delta = softplus(delta + bias), u = D x, dx = delta x. On entry dx is x.
void prepare(const Chunk& k, bool softplus) {
  for (int t = 0; t < k.steps; ++t) {
    for (int c = 0; c < k.columns; c += kLanes) {
      const int at = t * k.columns + c;
      const FloatVec raw = load(k.delta + at) + load(k.bias + c), x = load(k.dx + at);
      const FloatVec delta = softplus ? softplus_of(raw) : raw;
      store(k.delta + at, delta);
      store(k.dx + at, delta * x);
      store(k.u + at, load(k.D + c) * x);
    }
  }
}

// All states of all columns. Meanwhile the next chunk's tensors are asked for.
void advance_all(const Scan& scan, const ScanResult& result, const Chunk& k, const Block& b,
                 const SegmentSlice& next) {
  TilesAhead tiles;
  for (const Tensor3* tensor : {&scan.x, &scan.delta, &scan.z, &result.y}) tiles.add(*tensor, next, b);
  std::int64_t turn = 0;
  for (int c = 0; c < k.columns; c += kLanes) {
    std::int64_t i = 0;
    for (; i + kStates <= k.n; i += kStates)
      advance<kStates, false>(k, i, c, nullptr, nullptr, tiles[turn++]);
    for (; i < k.n; ++i) advance<1, false>(k, i, c, nullptr, nullptr, tiles[turn++]);
  }
}

// u *= silu(z), z being read over delta, which is spent.
void apply_gate(const Scan& scan, const Chunk& k, const SegmentSlice& slice, const Block& b) {
  float* z = k.delta;
  read_tile(z, scan.z, slice, b);
  for (int at = 0; at < k.steps * k.columns; at += kLanes)
    store(k.u + at, load(k.u + at) * silu_of(load(z + at)));
}

// One segment of one block of channels.
void scan_block(const Scan& scan, const ScanResult& result, const SegmentSlice& segment,
                const Block& b, float* checkpoints, Arena& memory) {
  Chunk k(memory, scan.n, b.columns);
  k.read_parameters(scan, b);
  read_states_or_zeros(k.h, scan.initial, segment.state_in, scan, b);
  const std::int64_t chunks = chunks_of(segment);
  for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
    const SegmentSlice slice = chunk_of(segment, chunk);
    k.steps = static_cast<int>(slice.steps);
    if (checkpoints != nullptr)
      save_checkpoint(checkpoint_of(checkpoints, chunk, scan, b), k.h, b, scan.n);
    read_tile(k.delta, scan.delta, slice, b);
    read_tile(k.dx, scan.x, slice, b);
    k.read_projections(scan, slice, b);
    prepare(k, scan.softplus);
    advance_all(scan, result, k, b, chunk + 1 < chunks ? chunk_of(segment, chunk + 1) : SegmentSlice{});
    if (scan.z) apply_gate(scan, k, slice, b);
    write_tile(k.u, result.y, slice, b);
  }
  if (result.last != nullptr && segment.state_out >= 0)
    write_states(result.last + segment.state_out * scan.e * scan.n, k.h, b, scan.n);
}

}  // namespace

void scan(const Scan& scan, const ScanResult& result) {
  const std::int64_t per_group = blocks_per_group(scan), blocks = per_group * scan.groups;
  const Scratch<std::int64_t> first_chunk(scan.segments.count);
  count_chunks(first_chunk, scan.segments);
  parallel_with_arena(
      scan.segments.count * blocks, scan_worker_scratch(scan.n), [&](std::int64_t item, Arena& memory) {
        const std::int64_t s = item / blocks, block = item % blocks;
        float* checkpoints = result.checkpoints;
        if (checkpoints != nullptr) checkpoints += first_chunk[s] * scan.e * scan.n;
        scan_block(scan, result, slice_of(scan.segments, s),
                   channel_block(scan, block / per_group, block % per_group), checkpoints, memory);
      });
}

}  // namespace anymamba::ANYMAMBA_ISA
