#include "cpu/isa.h"

#include <ATen/Version.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <iterator>

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastdiff {
namespace {

#ifdef FASTDIFF_TILES_EMULATED
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

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
#ifdef FASTDIFF_HAVE_TILES
    true,
#else
    false,
#endif
};

constexpr Isa kIsas[] = {Isa::Default, Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16, Isa::Amx};

bool built(Isa isa) { return kBuilt[static_cast<int>(isa)]; }

bool processor_has_tiles() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;  // of CPUID leaf 7, EDX
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile);
#else
  return false;
#endif
}

// Asks Linux for the tile registers, which are large: a process's threads have none until it asks,
// and the first tile instruction then is the last one of the process (SIGILL).
bool tiles_permitted() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

// The last set whose vectors the processor has, as PyTorch sees it. PyTorch does not know of
// AVX512_BF16, which also converts to bfloat16 by one instruction instead of about ten.
Isa most_vectors() {
  const std::string capability = at::get_cpu_capability();
#ifdef FASTDIFF_HAVE_AVX512_BF16
  if (capability == "AVX512" && __builtin_cpu_supports("avx512bf16") &&
      !std::getenv("ATEN_CPU_CAPABILITY"))
    return Isa::Avx512Bf16;
#endif
  return capability == "AVX512" ? Isa::Avx512 : capability == "AVX2" ? Isa::Avx2 : Isa::Default;
}

Isa last_built(Isa most) {
  int set = static_cast<int>(most);
  while (!kBuilt[set]) --set;
  return static_cast<Isa>(set);
}

struct Choice {
  Isa vectors, all;
};

// Why real tiles do not run beside these vectors, or nothing if they do.
std::string obstacle(Isa vectors) {
  if (!processor_has_tiles()) return "this processor has no tiles";
  if (!built(Isa::Amx) || kEmulated) return "fastdiff was built without tiles";
  if (vectors != Isa::Avx512Bf16) return "tiles need the vectors of AVX512_BF16";
  if (!tiles_permitted()) return "the operating system does not permit tiles to this process";
  return "";
}

Choice choose() {
  const Isa most = most_vectors(), vectors = last_built(most);
  const char* given = std::getenv("FASTDIFF_ISA");
  if (!given || !*given) return {vectors, obstacle(vectors).empty() ? Isa::Amx : vectors};
  std::string wanted = given;
  for (auto& letter : wanted) letter = static_cast<char>(std::toupper(letter));
  for (const Isa isa : kIsas) {
    if (wanted != isa_name(isa)) continue;
    const bool runs = isa == Isa::Amx ? kEmulated || obstacle(vectors).empty() : isa <= most;
    TORCH_CHECK_VALUE(built(isa), "FASTDIFF_ISA is ", given, ", but fastdiff was built for ",
                      instruction_sets());
    TORCH_CHECK_VALUE(runs, "FASTDIFF_ISA is ", given, ", but ",
                      isa == Isa::Amx ? obstacle(vectors) : "this processor does not have it");
    return {isa == Isa::Amx ? vectors : isa, isa};
  }
  C10_THROW_ERROR(ValueError, "FASTDIFF_ISA is " + wanted +
                                  ", wanted DEFAULT, AVX2, AVX512, AVX512_BF16 or AMX");
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
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
    case Isa::Amx:
      return "AMX";
    default:
      return "DEFAULT";
  }
}

Isa isa() { return choice().all; }

Isa vector_isa() { return choice().vectors; }

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const Isa isa : kIsas)
    if (built(isa)) names.push_back(isa_name(isa));
#ifdef FASTDIFF_SANITIZED
  names[0] = FASTDIFF_SANITIZED;  // whose kernels stand in for the portable ones
#endif
  return names;
}

std::string why_no_tiles() {
  const auto found = obstacle(choice().vectors);
  return found.empty() && isa() != Isa::Amx ? "FASTDIFF_ISA names a lower instruction set" : found;
}

}  // namespace fastdiff
