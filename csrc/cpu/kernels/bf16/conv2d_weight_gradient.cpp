// The gradient of a convolution's weight with products of bfloat16 and sums in float32:
//
//   dw[k, r, s, c] = sum over n, i, j of dy[n, i, j, k] h[n, i stride_h + r, j stride_w + s, c],
//
// h being the padded image that the convolution multiplies. For each tap (r, s) it is a product of
// dy, transposed, and of a patch, both of which are rearranged a block of pixels at a time
// (pixel_pairs.h): dy is read once, x once and the lines that blocks share, and dw is read and
// written once a block. It takes 2 K C R S operations for each output.
//
// A unit of the work is 32 filters and 32 channels, of which the taps are multiplied one after
// another, while both operands are in the first-level cache. Each unit's part of dw is fetched
// while it is multiplied. Every element of dw is the sum of the blocks' sums in their order.
#include "cpu/kernels/conv2d_weight_gradient.h"

#include "cpu/kernels/bf16/pixel_pairs.h"
#include "cpu/kernels/conv2d_grid.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

// How the steps of a line lie: those of dy side by side, those of the patch a line apart.
struct Lines {
  Array<int64_t> of_dy, of_patch;
  Walk walk;

  explicit Lines(const PixelPairs& pixels) {
    for (int64_t i = 0; i < pixels.height; ++i) {
      of_dy.add(i * kStepBytes);
      of_patch.add(pixels.at(i, 0, 0));
    }
    walk.spacing = 64;
    walk.plane = pixels.height * kStepBytes;
    walk.taps = pixels.height;
    walk.tap = of_dy.data();
    walk.step = of_patch.data();
    walk.b_plane = kGroup * PixelPairs::kPairBytes;
    walk.last_pairs = pairs_of_last_plane(2 * pixels.line());
  }
};

class WeightGradient {
 public:
  explicit WeightGradient(const ConvWeightGradient& given)
      : p(in_lines(given)),
        pixels(p, block_pixels()),
        lines(pixels),
        panels((p.filters + kColumns - 1) / kColumns),
        ld(p.kernel_h * p.kernel_w * p.channels),
        sums(p.images, p.filters) {}

  void run() {
    static thread_local Scratch scratch;
    const int64_t planes = pixels.planes(), patch_bytes = planes * pixels.plane_bytes();
    char* const patch = scratch.at_least<char>(patch_bytes + panels * pixels.panel_bytes());
    char* const dy = patch + patch_bytes;
    for (int64_t plane = 1; plane <= planes; ++plane)
      std::memset(patch + plane * pixels.plane_bytes() - PixelPairs::kBehind, 0,
                  PixelPairs::kBehind);
    for (int64_t number = 0; number < pixels.blocks; ++number) {
      const auto block = pixels.block(number);
      const int64_t of_patch = pixels.lines(), of_dy = pixels.steps(),
                    chunks = (p.filters + kSummed - 1) / kSummed;
      each(of_patch + of_dy + chunks, [&](int64_t i) {
        if (i < of_patch) return pixels.read_line(block, i, patch);
        if (i < of_patch + of_dy) return pixels.read_dy(block, i - of_patch, dy);
        sum(block, (i - of_patch - of_dy) * kSummed);
      });
      each(planes * panels, [&](int64_t i) {
        const Tiles tiles;
        multiply(i / panels, i % panels, patch, dy, number > 0);
      });
    }
    sums.store(p.sums, p.images);
  }

 private:
  static constexpr int64_t kSummed = 64;  // filters whose sums are taken by one thread
#ifdef FASTDIFF_TILES
  static constexpr int64_t kBlockBytes = 1 << 20;  // of both operands: half of a core's L2
#else
  static constexpr int64_t kBlockBytes = 512 << 10;
#endif

  // Blocks of fewer pixels would read and write dw too often.
  int64_t block_pixels() const {
    const int64_t each = (p.filters + p.channels) * int64_t{sizeof(bf16)};
    return std::clamp<int64_t>(kBlockBytes / each, 256, 2048);
  }

  // body(i) for 0..count-1, several at a time where they are many: each may be little work.
  template <class Body>
  void each(int64_t count, const Body& body) const {
    const int64_t parts = std::min(count, 64 * p.threads.count);
    share(p.threads, parts, [&](int64_t begin, int64_t end) {
      for (int64_t i = count * begin / parts; i < count * end / parts; ++i) body(i);
    });
  }

  // The products of a block for 32 filters, a panel, and 32 channels, a plane.
  void multiply(int64_t plane, int64_t panel, const char* patch, const char* dy,
                bool accumulate) const {
    const char* a = dy + panel * pixels.panel_bytes();
    const int64_t k = panel * kColumns, c = plane * kColumns;
    const int64_t filters = std::min(kColumns, p.filters - k),
                  channels = std::min(kColumns, pixels.channels - c);
    const Rows rows{a, a + kGroup * 64, filters};
    // Else what is written is more than there is.
    const bool whole = channels % kGroup == 0 && filters % kGroup == 0;
    for (int64_t r = 0; r < pixels.kernel_h; ++r)
      for (int64_t s = 0; s < pixels.kernel_w; ++s) {
        const char* b = patch + plane * pixels.plane_bytes() + pixels.at(0, r, s);
        float* out = p.dw + k * ld + (r * pixels.kernel_w + s) * p.channels + c;
        for (int64_t i = 0; i < filters; ++i)
          for (int64_t j = 0; j < channels; j += kLine) __builtin_prefetch(out + i * ld + j, 1);
        const auto products = [&](float* to, int64_t to_ld, bool add) {
          CPU_CAPABILITY::multiply<PairsOfB>(rows, lines.walk, pixels.groups(), b, channels, to,
                                             to_ld, add);
        };
        if (whole) {
          products(out, ld, accumulate);
          continue;
        }
        alignas(64) float block[kColumns][kColumns];
        products(block[0], kColumns, false);
        for (int64_t i = 0; i < filters; ++i)
          for (int64_t j = 0; j < channels; ++j)
            out[i * ld + j] = accumulate ? out[i * ld + j] + block[i][j] : block[i][j];
      }
  }

  // Adds a block's pixels of dy to the sums of filters begin..begin+kSummed-1.
  void sum(const Array<PixelPairs::Segment>& block, int64_t begin) {
    const int64_t end = std::min(begin + kSummed, p.filters);
    for (int64_t i = 0; i < block.size(); ++i)
      for (int64_t line = 0; line < pixels.height; ++line)
        if (const bf16* dy = pixels.dy(block[i], line, 0))
          sums.add(block[i].image, begin, end, dy + begin,
                   std::min(pixels.width, p.out_width - block[i].left), p.dy_ld);
  }

  const ConvWeightGradient p;
  const PixelPairs pixels;
  const Lines lines;
  const int64_t panels, ld;  // ld: floats of a filter
  PixelSums sums;
};

}  // namespace

void conv2d_direct_bf16_weight_gradient(const ConvWeightGradient& p) { WeightGradient(p).run(); }

}  // namespace fastdiff::CPU_CAPABILITY
