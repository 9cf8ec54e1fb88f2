// Which instruction set's kernels run. Each file in csrc/cpu/kernels is compiled once for each
// instruction set, in the namespace fastdiff::CPU_CAPABILITY. FASTDIFF_KERNEL picks one of them
// when an operation is called.
#pragma once

namespace fastdiff {

enum class Isa { Default, Avx2, Avx512, Avx512Bf16 };

// The last of the sets that the extension was built with and that the processor has, as PyTorch
// sees it: ATEN_CPU_CAPABILITY=default|avx2|avx512 lowers it. PyTorch does not know of AVX512_BF16,
// which converts to bfloat16 by one instruction instead of about ten.
Isa isa();

// As FASTDIFF_ISAS of the build and `fastdiff doctor` name it.
const char* isa_name(Isa isa);

}  // namespace fastdiff

// Declares one kernel in every instruction set's namespace.
#define FASTDIFF_DECLARE(name, ...) \
  namespace DEFAULT {               \
  void name(__VA_ARGS__);           \
  }                                 \
  namespace AVX2 {                  \
  void name(__VA_ARGS__);           \
  }                                 \
  namespace AVX512 {                \
  void name(__VA_ARGS__);           \
  }                                 \
  namespace AVX512_BF16 {           \
  void name(__VA_ARGS__);           \
  }

// FASTDIFF_KERNEL(name) is the kernel `name` of the set that isa() returns. It mentions only sets
// that were built, since a kernel of another set would not link.
#ifdef FASTDIFF_HAVE_AVX512_BF16
#define FASTDIFF_IF_AVX512_BF16(name) \
  ::fastdiff::isa() == ::fastdiff::Isa::Avx512Bf16 ? AVX512_BF16::name:
#else
#define FASTDIFF_IF_AVX512_BF16(name)
#endif
#ifdef FASTDIFF_HAVE_AVX512
#define FASTDIFF_IF_AVX512(name) ::fastdiff::isa() == ::fastdiff::Isa::Avx512 ? AVX512::name:
#else
#define FASTDIFF_IF_AVX512(name)
#endif
#ifdef FASTDIFF_HAVE_AVX2
#define FASTDIFF_IF_AVX2(name) ::fastdiff::isa() == ::fastdiff::Isa::Avx2 ? AVX2::name:
#else
#define FASTDIFF_IF_AVX2(name)
#endif
// clang-format off
#define FASTDIFF_KERNEL(name)                                                       \
  (FASTDIFF_IF_AVX512_BF16(name) FASTDIFF_IF_AVX512(name) FASTDIFF_IF_AVX2(name) \
   DEFAULT::name)
// clang-format on
