// Which instruction set's kernels run. Each file in csrc/cpu/kernels is compiled once for each, in
// the namespace fastdiff::CPU_CAPABILITY, and FASTDIFF_KERNEL picks one when it is called.
#pragma once

namespace fastdiff {

enum class Isa { Default, Avx2, Avx512, Avx512Bf16 };

// What the processor has, as PyTorch sees it (so ATEN_CPU_CAPABILITY=default|avx2|avx512 lowers
// it), and beyond that AVX512_BF16, whose conversion to bfloat16 is one instruction for about ten.
// Of the sets that the extension was built with, the last one that the processor has.
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

// FASTDIFF_KERNEL(name) is the kernel of the set that isa() names; sets that were not built are
// left out, and isa() never names them.
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
