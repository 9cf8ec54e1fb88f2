// Winograd's F(2x2, 3x3) of bfloat16 images with products in bfloat16. Where these run at twice the
// rate of float32's, it takes 2/9 of the time of a direct convolution in float32; F(4x4, 3x3) in
// float32 takes 1/4, of a weight that has 4.5 times the bytes.
//
// Accuracy: the transforms are in float32, and each of their results is rounded once. That makes
// the error of a bare convolution 2.6 times that of rounding its result. So it is for convolutions
// through SiLU, which is applied in float32 on the way in: PyTorch rounds what the norm gives, what
// SiLU gives and the result, and the error is then at most 1.6 times PyTorch's, or 1.9 times
// without a norm (relative L2 against float64, C = 16 to 2560). Larger tiles do not stay below
// twice: with the best points found, F(2x4, 3x3) is at 2.1 behind a norm, F(2x3, 3x3) at 2.2.
#include "cpu/kernels/conv2d_winograd.h"

#include "cpu/kernels/bf16/conv2d_pack.h"
#include "cpu/kernels/bf16/products.h"
#include "cpu/kernels/conv2d_winograd_pack.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

class Bf16Products {
 public:
  using Element = bf16;
  static constexpr int64_t kPanel = kColumns, kDepth = kColumns, kHeight = kGroup;
  static constexpr int64_t kChannels = kColumns, kTiles = 64, kManyTiles = 128, kRows = 2;

  // Of what is multiplied next, B is fetched: A is in L2, or is read fast enough without.
  struct Next {
    const bf16 *b, *a;
  };

  static constexpr int64_t width(int64_t filters) { return rounded_up(filters, kColumns); }

  // A pair of channels: filters in `row` and `ld` behind it.
  static void pack(const float* row, int64_t ld, int64_t, int64_t channel, bf16* plane) {
    bf16* pair = plane + channel / kColumns * kStepValues + channel % kColumns / 2 * kColumns;
    for (int64_t k = 0; k < kColumns; k += kGroup)
      pack_pairs<1>(row + k, row + ld + k, pair + k * kColumns);
  }

  Bf16Products(const bf16* v, int64_t tiles, int64_t ld, int64_t depth)
      : v_(v), tiles_(tiles), ld_(ld), steps_(depth / kColumns) {}

  void multiply(int64_t plane, const bf16* b, int64_t filters, Next next, float* c,
                int64_t ld) const {
    const int64_t tap = 0;
    const Walk walk{ld_ * int64_t{sizeof(bf16)}, kColumns * sizeof(bf16), 1, &tap};
    const int64_t lines = kStepBytes / 64, calls = (tiles_ + kTogetherRows - 1) / kTogetherRows;
    Fetch fetch{bytes(next.b), static_cast<int>((lines + calls - 1) / calls)};
    for (int64_t t = 0; t < tiles_; t += kTogetherRows, fetch.from += fetch.lines * steps_ * 64) {
      const bf16* rows = v_ + plane + t * ld_;
      CPU_CAPABILITY::multiply(
          {bytes(rows), bytes(rows + kGroup * ld_), std::min(kTogetherRows, tiles_ - t)}, walk,
          steps_, bytes(b), filters, c + t * ld, ld, false, fetch);
    }
  }

 private:
  static const char* bytes(const bf16* p) { return reinterpret_cast<const char*>(p); }

  const bf16* const v_;
  const int64_t tiles_, ld_, steps_;
  const Tiles configured_;
};

}  // namespace

void conv2d_winograd2_bf16(const Conv2d& p) { Winograd<bf16, 2, 3, Bf16Products>(p).run(); }

void conv2d_winograd2_bf16_pack(const ConvWeight& size, const WeightValues& weight, void* packed,
                                int64_t* count, const Threads& threads) {
  winograd_pack<2, 3, Bf16Products>(size, weight, packed, count, threads);
}

}  // namespace fastdiff::CPU_CAPABILITY
