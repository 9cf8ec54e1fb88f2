// A 3x3 convolution of an upsampled image as four convolutions of the image itself, its phases: of
// outputs of even and odd rows and columns. A window has but 2x2 different pixels, so their kernels
// are sums of taps.
#pragma once

#include "cpu/kernels/conv2d.h"
#include "cpu/kernels/vectors.h"

namespace fastdiff::CPU_CAPABILITY {

// The taps of a 3x3 kernel that a phase's kernel has in place of each of its r = 2; for r = 3 there
// is one phase, the kernel itself. `which` is the parity of the padding above the phase's first
// window, times two, and of that to its left.
template <int r, class V>
FASTDIFF_INLINE void phase_taps(const V (&g)[9], int64_t which, V (&out)[r][r]) {
  // Of an even number of rows above, 0 and 1 are the same pixel, else 1 and 2.
  const auto first = [](int a, bool odd) { return a == 0 ? 0 : odd ? 1 : 2; };
  const auto last = [](int a, bool odd) { return a == 1 ? 2 : odd ? 0 : 1; };
  for (int a = 0; a < r; ++a)
    for (int q = 0; q < r; ++q) {
      if (r == 3) {
        out[a][q] = g[a * 3 + q];
        continue;
      }
      const bool odd_row = which / 2, odd_column = which % 2;
      out[a][q] = V{};
      for (int i = first(a, odd_row); i <= last(a, odd_row); ++i)
        for (int j = first(q, odd_column); j <= last(q, odd_column); ++j) out[a][q] += g[i * 3 + j];
    }
}

}  // namespace fastdiff::CPU_CAPABILITY
