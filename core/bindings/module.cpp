// The module anymamba._core, and what it tells of the machine.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings/arrays.h"
#include "bindings/gil.h"
#include "bindings/modules.h"
#include "base/system.h"
#include "base/threads.h"
#include "kernels/roofline.h"

namespace anymamba::bindings {
namespace {

std::vector<std::string> isa_names() {
  std::vector<std::string> found;
  for (const char* const* isa = isas(); *isa != nullptr; ++isa) found.emplace_back(*isa);
  return found;
}

}  // namespace
}  // namespace anymamba::bindings

NB_MODULE(_core, m) {
  using namespace anymamba;
  m.doc() = "AnyMamba's native core. Arrays are checked, then the kernels run without the GIL.";
  // A daemon thread that computes when the program ends keeps its objects.
  nb::set_leak_warnings(false);
  m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
  m.def("isas", bindings::isa_names, "The instruction sets that this machine has, the best first.");
  m.def("use_isa", [](const std::string& isa) {
    if (!use_isa(isa.c_str())) bindings::refuse("this machine does not have the instruction set " + isa);
  });
  m.attr("compiler") = ANYMAMBA_COMPILER;
  m.attr("system") = ANYMAMBA_SYSTEM;
  m.attr("built_isas") = ANYMAMBA_BUILT_ISAS;  // whether this machine has them or not
  m.def("default_threads", &performance_processors,
        "How many threads a kernel uses unless it is told: one for each fast processor.");
  m.def("threads", &Threads::count, "How many threads a kernel uses.");
  m.def("set_threads", &Threads::set_count);
  m.def("threads_at_present", &Threads::at_present,
        "How many threads a kernel uses now: fewer where others on this machine made threads late.");
  m.def("read_bandwidth", [](std::int64_t bytes, int repeats) {
    if (bytes < 1 || repeats < 1) bindings::refuse("bytes and repeats must be positive");
    const bindings::WithoutGil unlocked;
    return read_bandwidth(bytes, repeats);
  }, "Bytes a second that all threads read together from a buffer; the best of the repeats.");
  m.def("peak_float_operations", [](int repeats) {
    if (repeats < 1) bindings::refuse("repeats must be positive");
    const bindings::WithoutGil unlocked;
    return peak_float_operations(repeats);
  }, "Multiplications and additions of floats a second that all threads do at most.");
  m.def("peak_byte_operations", [](int repeats) {
    if (repeats < 1) bindings::refuse("repeats must be positive");
    const bindings::WithoutGil unlocked;
    return peak_byte_operations(repeats);
  }, "Multiplications and additions of bytes a second, as for weights of 8 and 4 bits.");
  bindings::add_operators(m);
  bindings::add_model(m);
  bindings::add_watch(m);
}
