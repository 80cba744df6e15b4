// What this processor can compute, of what instruction sets need.
#pragma once

namespace anymamba {

// Of x86. A feature counts only where the system keeps its registers.
struct X86Features {
  bool avx2 = false, fma = false, f16c = false, avx_vnni = false;
  bool avx512f = false, avx512bw = false, avx512dq = false, avx512vl = false, avx512_vnni = false;
  bool avx512_bf16 = false;
  bool is_amd = false;
};
X86Features x86_features();  // none on other processors

}  // namespace anymamba
