#include "kernels/scan.h"

namespace anymamba {

std::int64_t scan_checkpoint_floats(const Scan& scan) {
  std::int64_t chunks = 0;
  for (std::int64_t s = 0; s < scan.segments.count; ++s)
    chunks += (scan.segments.stops[s] - scan.segments.starts[s] + kChunkSteps - 1) / kChunkSteps;
  return chunks * scan.e * scan.n;
}

}  // namespace anymamba
