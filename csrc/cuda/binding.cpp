// The Python module fastdiff._cuda. Importing it defines the operations of the namespace
// fastdiff_cuda, which fastdiff/ops/gpu.py calls: each file of bindings/ registers those of its
// family.
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "fastdiff's CUDA kernels";
  m.attr("torch_version") = FASTDIFF_TORCH_VERSION;
  m.attr("architectures") = FASTDIFF_ARCHITECTURES;  // as TORCH_CUDA_ARCH_LIST writes them
}
