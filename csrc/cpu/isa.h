// Which instruction set's kernels run. Each file in csrc/cpu/kernels is compiled once for each set
// of vector instructions, in the namespace fastdiff::CPU_CAPABILITY, and FASTDIFF_KERNEL picks one
// of them when an operation is called. The files in csrc/cpu/kernels/bf16, whose products are of
// bfloat16, are compiled only for what multiplies that: dot products and tiles.
#pragma once

#include <string>
#include <vector>

namespace fastdiff {

// Avx512Bf16 has dot products of bfloat16; Amx has tiles, and Avx512Bf16's vectors.
enum class Isa { Default, Avx2, Avx512, Avx512Bf16, Amx };

// What runs: the last of the sets that were built, that the processor has and that the operating
// system allows. FASTDIFF_ISA names another one: a lower one, or Amx where its tiles are emulated.
// So does PyTorch's ATEN_CPU_CAPABILITY=default|avx2|avx512. ValueError where FASTDIFF_ISA names a
// set that cannot run.
Isa isa();

// The set whose vectors run: isa(), or without tiles the last one beside them.
Isa vector_isa();

// As FASTDIFF_ISA, FASTDIFF_ISAS of the build and `fastdiff doctor` name it.
const char* isa_name(Isa isa);

// What the extension was built with.
std::vector<std::string> instruction_sets();

// Why tiles do not run here, as a sentence, or nothing if they do.
std::string why_no_tiles();

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
  ::fastdiff::vector_isa() == ::fastdiff::Isa::Avx512Bf16 ? AVX512_BF16::name:
#else
#define FASTDIFF_IF_AVX512_BF16(name)
#endif
#ifdef FASTDIFF_HAVE_AVX512
#define FASTDIFF_IF_AVX512(name) ::fastdiff::vector_isa() == ::fastdiff::Isa::Avx512 ? AVX512::name:
#else
#define FASTDIFF_IF_AVX512(name)
#endif
#ifdef FASTDIFF_HAVE_AVX2
#define FASTDIFF_IF_AVX2(name) ::fastdiff::vector_isa() == ::fastdiff::Isa::Avx2 ? AVX2::name:
#else
#define FASTDIFF_IF_AVX2(name)
#endif
// clang-format off
#define FASTDIFF_KERNEL(name)                                                       \
  (FASTDIFF_IF_AVX512_BF16(name) FASTDIFF_IF_AVX512(name) FASTDIFF_IF_AVX2(name) \
   DEFAULT::name)
// clang-format on

// The same for the kernels in csrc/cpu/kernels/bf16. FASTDIFF_BF16_KERNEL(name) is null where
// neither tiles nor dot products run.
#define FASTDIFF_DECLARE_BF16(name, ...) \
  namespace AVX512_BF16 {                \
  void name(__VA_ARGS__);                \
  }                                      \
  namespace AMX {                        \
  void name(__VA_ARGS__);                \
  }

#ifdef FASTDIFF_HAVE_TILES
#define FASTDIFF_IF_TILES(name) ::fastdiff::isa() == ::fastdiff::Isa::Amx ? AMX::name:
#else
#define FASTDIFF_IF_TILES(name)
#endif
#ifdef FASTDIFF_HAVE_DOTS
#define FASTDIFF_IF_DOTS(name) ::fastdiff::isa() == ::fastdiff::Isa::Avx512Bf16 ? AVX512_BF16::name:
#else
#define FASTDIFF_IF_DOTS(name)
#endif
// clang-format off
#define FASTDIFF_BF16_KERNEL(name) (FASTDIFF_IF_TILES(name) FASTDIFF_IF_DOTS(name) nullptr)
// clang-format on
