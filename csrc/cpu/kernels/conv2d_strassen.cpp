// A 1x1 convolution with an eighth fewer multiplications (strassen.h): of a block the upper and the
// lower half of its pixels, of the channels the first and the last half. Blocks are of one image
// each, so that no image's result depends on another image.
#include <algorithm>

#include "cpu/kernels/conv2d_direct.h"
#include "cpu/kernels/conv2d_pack.h"
#include "cpu/kernels/strassen.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

// Of a block's rows the list has the upper half, the lower half (one of zeros at the end, where
// their number is odd) and the sums of both.
struct Sevenths {
  static constexpr int64_t kColumns = kPair;

  static int64_t pixels(const Conv2d& p) {
    return std::min<int64_t>(192, p.out_height * p.out_width);
  }

  static int64_t packed(int64_t depth, int64_t filters) { return strassen_packed(depth, filters); }

  const int64_t depth;

  explicit Sevenths(const Conv2d& p) : depth(p.channels) {}

  void complete(Array<const float*>& rows) const {
    static thread_local Scratch scratch;
    const int64_t half = (rows.size() + 1) / 2, ld = strassen_sums_ld(depth);
    float* sums = scratch.at_least(depth + half * ld);
    if (rows.size() < 2 * half) {
      std::fill_n(sums, depth, 0.f);
      rows.add(sums);
    }
    sums += depth;
    for (int64_t i = 0; i < half; ++i, sums += ld) {
      strassen_sums(rows[i], rows[half + i], depth, sums);
      rows.add(sums);
    }
  }

  void multiply(const Array<const float*>& rows, int64_t, const float* packed, int64_t k, int64_t,
                float* c, int64_t ld) const {
    const int64_t half = rows.size() / 3;
    multiply_strassen({half, depth, rows.data(), rows.data() + 2 * half},
                      packed + strassen_packed(depth, k), c, ld);
  }
};

}  // namespace

void conv2d_strassen(const Conv2d& p) { direct<Sevenths>(p); }

void conv2d_strassen_pack(const ConvWeight& size, const WeightValues& weight, void* packed,
                          int64_t* count, const Threads& threads) {
  const int64_t filters = size.filters, channels = size.channels;
  auto* out = static_cast<float*>(packed);
  *count = strassen_packed(channels, filters);
  if (!out) return;
  pack_parts(threads, filters, kPair, channels / 2,
             [&](int64_t first, int64_t columns, int64_t begin, int64_t end) {
               strassen_pack(channels, begin, end, out + strassen_packed(channels, first),
                             [&](int64_t k, int64_t j) {
                               if (j >= columns) return 0.f;
                               return weight.data[(first + j) * weight.filter + k * weight.channel];
                             });
             });
}

}  // namespace fastdiff::CPU_CAPABILITY
