// The Python module fastdiff._C. Importing it registers the CPU kernels with PyTorch's dispatcher
// (each csrc/cpu/<operation>.cpp does its own); the schemas are defined in fastdiff/ops.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <iterator>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace fastdiff {

namespace {

constexpr const char* kNames[] = {"DEFAULT", "AVX2", "AVX512", "AVX512_BF16"};  // by Isa

constexpr bool kBuilt[] = {
    true,
#ifdef FASTDIFF_HAVE_AVX2
    true,
#else
    false,
#endif
#ifdef FASTDIFF_HAVE_AVX512
    true,
#else
    false,
#endif
#ifdef FASTDIFF_HAVE_AVX512_BF16
    true,
#else
    false,
#endif
};

// What the processor has, or may use.
Isa most() {
  const std::string capability = at::get_cpu_capability();
#ifdef FASTDIFF_HAVE_AVX512_BF16
  if (capability == "AVX512" && __builtin_cpu_supports("avx512bf16") &&
      !std::getenv("ATEN_CPU_CAPABILITY"))
    return Isa::Avx512Bf16;
#endif
  return capability == "AVX512" ? Isa::Avx512 : capability == "AVX2" ? Isa::Avx2 : Isa::Default;
}

// What this extension was built with.
std::vector<std::string> instruction_sets() {
#ifdef FASTDIFF_SANITIZED
  return {FASTDIFF_SANITIZED};  // whose kernels stand in for the portable ones
#else
  std::vector<std::string> built;
  for (size_t i = 0; i < std::size(kNames); ++i)
    if (kBuilt[i]) built.push_back(kNames[i]);
  return built;
#endif
}

}  // namespace

Isa isa() {
  static const Isa chosen = [] {
    int set = static_cast<int>(most());
    while (!kBuilt[set]) --set;
    return static_cast<Isa>(set);
  }();
  return chosen;
}

}  // namespace fastdiff

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastdiff's CPU kernels";
  m.attr("torch_version") = FASTDIFF_TORCH_VERSION;
  m.attr("instruction_sets") = pybind11::tuple(pybind11::cast(fastdiff::instruction_sets()));
  m.def("isa", [] {
    const auto built = fastdiff::instruction_sets();
    return built.size() == 1 ? built[0] : fastdiff::kNames[static_cast<int>(fastdiff::isa())];
  });
}
