// The parts of the module, each from a file of its own.
#pragma once

#include <nanobind/nanobind.h>

namespace anymamba::bindings {

void add_operators(nanobind::module_& m);
void add_model(nanobind::module_& m);
void add_watch(nanobind::module_& m);

}  // namespace anymamba::bindings
