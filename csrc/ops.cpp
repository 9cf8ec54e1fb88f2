// The Python module fastdiff._C. Importing it registers the CPU kernels with PyTorch's dispatcher
// (each csrc/cpu/<operation>.cpp does its own); the schemas are defined in fastdiff/ops.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <string>

#include "cpu/isa.h"

namespace fastdiff {

Isa isa() {
  static const Isa found = [] {
    const std::string capability = at::get_cpu_capability();
#ifdef FASTDIFF_HAVE_AVX512_BF16
    if (capability == "AVX512")
      return __builtin_cpu_supports("avx512bf16") && !std::getenv("ATEN_CPU_CAPABILITY")
                 ? Isa::Avx512Bf16
                 : Isa::Avx512;
#endif
    return capability == "AVX2" ? Isa::Avx2 : Isa::Default;
  }();
  return found;
}

}  // namespace fastdiff

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastdiff's CPU kernels";
  m.attr("torch_version") = FASTDIFF_TORCH_VERSION;
  m.def("isa", [] {
    switch (fastdiff::isa()) {
      case fastdiff::Isa::Avx512Bf16:
        return "AVX512_BF16";
      case fastdiff::Isa::Avx512:
        return "AVX512";
      case fastdiff::Isa::Avx2:
        return "AVX2";
      default:
        return "DEFAULT";
    }
  });
}
