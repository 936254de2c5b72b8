// ltkernels._build_info: what was built, baked in at build time. A module of its own, because pybind11 ties it to one Python version,
// which the kernels in _C are not.
#include <pybind11/pybind11.h>

#include <string>

static constexpr const char* kFacts =
#include "build_facts.inc"  // written by setup.py: one raw string literal holding JSON
    ;

#if defined(__clang__)
static constexpr const char* kCompiler = __VERSION__;  // begins with "Clang" already
#else
static constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

PYBIND11_MODULE(_build_info, m) {
  m.def("build_info", [] {
    auto info = pybind11::module_::import("json").attr("loads")(kFacts);
    info["compiler"] = kCompiler;
    return info;
  });
}
