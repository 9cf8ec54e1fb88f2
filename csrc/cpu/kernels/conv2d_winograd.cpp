#include "cpu/kernels/conv2d_winograd.h"

#include "cpu/kernels/conv2d_winograd_pack.h"
#include "cpu/kernels/dtypes.h"
#include "cpu/kernels/gemm.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

// Of float32, by gemm.h.
class Float32Products {
 public:
  using Element = float;
  static constexpr int64_t kPanel = CPU_CAPABILITY::kPanel, kDepth = kLanes, kHeight = 1;
  static constexpr int64_t kChannels = kLine, kTiles = 48, kManyTiles = 128, kRows = 1;

  static constexpr int64_t width(int64_t filters) { return packed_columns(filters); }

  static void pack(const float* row, int64_t, int64_t columns, int64_t channel, float* plane) {
    std::memcpy(plane + channel * columns, row, columns * sizeof(float));
  }

  Float32Products(const float* v, int64_t tiles, int64_t ld, int64_t depth)
      : depth_(depth), rows_(tiles) {
    for (int64_t t = 0; t < tiles; ++t) rows_.add(v + t * ld);
  }

  void multiply(int64_t plane, const float* b, int64_t filters, Next next, float* c,
                int64_t ld) const {
    const int64_t packed = width(filters);
    for (int64_t d = 0; d < depth_; d += CPU_CAPABILITY::kDepth) {
      const int64_t deep = std::min(CPU_CAPABILITY::kDepth, depth_ - d);
      const float* from = b + d * packed;
      multiply_panel(rows_.size(), rows_.data(), plane + d, deep, from, filters,
                     {d + deep < depth_ ? from + deep * packed : next.b, next.a + d * packed},
                     Into{c, ld, d > 0});
    }
  }

 private:
  const int64_t depth_;
  Array<const float*> rows_;
};

template <int m, int r>
void winograd(const Conv2d& p) {
  for_float_or_bfloat16(p.dtype, [&]<class T>() { Winograd<T, m, r, Float32Products>(p).run(); });
}

template <int m, int r>
void pack(const ConvWeight& size, const WeightValues& weight, void* packed, int64_t* count,
          const Threads& threads) {
  winograd_pack<m, r, Float32Products>(size, weight, packed, count, threads);
}

}  // namespace

void conv2d_winograd2(const Conv2d& p) { winograd<2, 3>(p); }

void conv2d_winograd2_pack(const ConvWeight& size, const WeightValues& weight, void* packed,
                           int64_t* count, const Threads& threads) {
  pack<2, 3>(size, weight, packed, count, threads);
}

void conv2d_winograd4(const Conv2d& p) { winograd<4, 3>(p); }

void conv2d_winograd4_pack(const ConvWeight& size, const WeightValues& weight, void* packed,
                           int64_t* count, const Threads& threads) {
  pack<4, 3>(size, weight, packed, count, threads);
}

void conv2d_phases4(const Conv2d& p) { winograd<4, 2>(p); }

void conv2d_phases4_pack(const ConvWeight& size, const WeightValues& weight, void* packed,
                         int64_t* count, const Threads& threads) {
  pack<4, 2>(size, weight, packed, count, threads);
}

}  // namespace fastdiff::CPU_CAPABILITY
