// The Python module fastdiff._C. Importing it registers the CPU kernels with PyTorch's dispatcher
// (each csrc/cpu/<operation>.cpp does its own); the schemas are defined in fastdiff/ops.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <iterator>
#include <string>
#include <vector>

#include "cpu/conv2d_algorithms.h"
#include "cpu/conv2d_spec.h"
#include "cpu/isa.h"

namespace fastdiff {

namespace {

constexpr Isa kIsas[] = {Isa::Default, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16};

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
  for (size_t i = 0; i < std::size(kIsas); ++i)
    if (kBuilt[i]) built.push_back(isa_name(kIsas[i]));
  return built;
#endif
}

// What Python asks the list of convolution algorithms (fastdiff/ops/conv2d_algorithms.py).
void add_conv2d(pybind11::module_& m) {
  using Numbers = std::vector<int64_t>;
  m.def("conv2d_algorithms", [] {
    pybind11::list rows;
    for (const auto& row : conv2d_algorithms()) {
      std::vector<std::string> dtypes;
      for (const auto dtype : row.dtypes) dtypes.emplace_back(c10::getDtypeNames(dtype).first);
      pybind11::dict fields;
      fields["name"] = row.name;
      fields["dtypes"] = dtypes;
      fields["packed_dtype"] = std::string(c10::getDtypeNames(row.packed_dtype).first);
      fields["strict"] = row.strict;
      fields["share"] = row.cost.share;
      fields["narrow"] = row.cost.narrow;
      fields["narrow_share"] = row.cost.narrow_share;
      fields["small"] = row.cost.small;
      fields["small_share"] = row.cost.small_share;
      fields["handicap"] = row.cost.handicap;
      rows.append(fields);
    }
    return rows;
  });
  m.def("conv2d_refusal", [](int64_t number, const Numbers& spec) {
    return conv2d_algorithm(number).refusal(decode_spec(spec));
  });
  m.def("conv2d_packed_count", [](int64_t number, const Numbers& weight) {
    return conv2d_algorithm(number).packed_count(decode_weight(weight));
  });
  m.def("conv2d_within_limits", [](const Numbers& spec) {
    try {
      decode_spec(spec);
      return true;
    } catch (const c10::Error&) {
      return false;
    }
  });
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::Avx2:
      return "AVX2";
    case Isa::Avx512:
      return "AVX512";
    case Isa::Avx512Bf16:
      return "AVX512_BF16";
    default:
      return "DEFAULT";
  }
}

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
    return built.size() == 1 ? built[0] : fastdiff::isa_name(fastdiff::isa());
  });
  fastdiff::add_conv2d(m);
}
