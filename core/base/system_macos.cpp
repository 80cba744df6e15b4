// macOS, beside system_posix.cpp.
#include <sys/sysctl.h>

#include "base/system.h"

namespace anymamba {
namespace {

// A number that the system has under this name; 0 where it has none.
int number_of(const char* name) {
  int number = 0;
  std::size_t bytes = sizeof number;
  return sysctlbyname(name, &number, &bytes, nullptr, 0) == 0 ? number : 0;
}

}  // namespace

int allowed_processors() {
  const int found = number_of("hw.logicalcpu");
  return found < 1 ? 1 : found;
}

int performance_processors() {
  const int found = number_of("hw.perflevel0.logicalcpu");  // of Apple's own processors
  return found < 1 ? allowed_processors() : found;
}

ArmFeatures arm_features() {
  ArmFeatures found;
#if defined(__aarch64__)
  found.dotprod = found.fp16 = true;  // of every Mac with Arm; macOS 11 has no names for them
  found.i8mm = number_of("hw.optional.arm.FEAT_I8MM") != 0;
  found.bf16 = number_of("hw.optional.arm.FEAT_BF16") != 0;
#endif
  return found;
}

}  // namespace anymamba
