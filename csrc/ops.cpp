// The Python module fastdiff._C. Importing it registers the CPU kernels with PyTorch's dispatcher
// (each csrc/cpu/<operation>.cpp does its own); the schemas are defined in fastdiff/ops.
#include <ATen/Version.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/conv2d_algorithms.h"
#include "cpu/conv2d_spec.h"
#include "cpu/isa.h"

namespace fastdiff {

namespace {

pybind11::dict numbers(const ConvCost& cost) {
  pybind11::dict fields;
  fields["share"] = cost.share;
  fields["narrow"] = cost.narrow;
  fields["narrow_share"] = cost.narrow_share;
  fields["small"] = cost.small;
  fields["small_share"] = cost.small_share;
  fields["handicap"] = cost.handicap;
  return fields;
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
      fields["cost"] = numbers(row.cost);
      fields["weight_gradient"] = row.weight_gradient
                                      ? pybind11::object(numbers(row.weight_gradient_cost))
                                      : pybind11::none();
      rows.append(fields);
    }
    return rows;
  });
  m.def("conv2d_refusal", [](int64_t number, const Numbers& spec) {
    return conv2d_algorithm(number).refusal(decode_spec(spec));
  });
  m.def("conv2d_weight_gradient_refusal", [](int64_t number, const Numbers& spec) {
    return conv2d_algorithm(number).weight_gradient_refusal(decode_spec(spec));
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

}  // namespace fastdiff

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastdiff's CPU kernels";
  m.attr("torch_version") = FASTDIFF_TORCH_VERSION;
  m.attr("instruction_sets") = pybind11::tuple(pybind11::cast(fastdiff::instruction_sets()));
  m.def("isa", [] {
#ifdef FASTDIFF_SANITIZED
    if (fastdiff::isa() == fastdiff::Isa::Default) return FASTDIFF_SANITIZED;
#endif
    return fastdiff::isa_name(fastdiff::isa());
  });
  m.def("why_no_tiles", fastdiff::why_no_tiles);
#ifdef FASTDIFF_TILES_EMULATED
  m.attr("emulates_tiles") = true;
#else
  m.attr("emulates_tiles") = false;
#endif
  fastdiff::add_conv2d(m);
}
