// Mean and 1 / deviation of groups of channels, from the mean and variance of each channel. These
// are a few hundred numbers an image, too few for vectors or threads.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/tensors.h"

namespace fastdiff {

// Statistics float64 [N, C_i, 2] of tensors whose concatenation along the channels is normalised.
class GroupStatistics {
 public:
  GroupStatistics(at::TensorList statistics, int64_t groups, double eps)
      : groups_(groups), eps_(eps) {
    TORCH_CHECK_VALUE(!statistics.empty(), "statistics must be given for one tensor at least");
    images_ = statistics[0].dim() == 3 ? statistics[0].size(0) : 0;
    for (const auto& part : statistics) {
      TORCH_CHECK_VALUE(part.dim() == 3, "statistics must have shape [N, C, 2], got ",
                        part.sizes());
      check_tensor(part, {images_, part.size(1), 2}, at::kDouble, "statistics");
      channels_ += part.size(1);
      parts_.push_back(part.contiguous());
    }
    TORCH_CHECK_VALUE(groups >= 1 && channels_ % groups == 0,
                      "num_groups must divide the channels: got ", groups, " groups for ",
                      channels_, " channels");
    TORCH_CHECK_VALUE(eps >= 0, "eps must not be negative, got ", eps);
    mean_.resize(channels_);
    variance_.resize(channels_);
  }

  int64_t images() const { return images_; }
  int64_t channels() const { return channels_; }
  at::TensorOptions options() const { return parts_[0].options(); }

  // Calls body(first channel, last + 1, mean, 1 / deviation) for each group of an image.
  template <class Body>
  void for_groups(int64_t image, Body&& body) {
    int64_t c = 0;
    for (const auto& part : parts_) {
      const double* from = part.const_data_ptr<double>() + image * part.size(1) * 2;
      for (int64_t i = 0; i < part.size(1); ++i, ++c)
        mean_[c] = from[2 * i], variance_[c] = from[2 * i + 1];
    }
    const int64_t width = channels_ / groups_;
    for (int64_t first = 0; first < channels_; first += width) {
      double centre = 0, spread = 0;
      for (c = first; c < first + width; ++c) centre += mean_[c];
      centre /= static_cast<double>(width);
      for (c = first; c < first + width; ++c)
        spread += variance_[c] + (mean_[c] - centre) * (mean_[c] - centre);
      body(first, first + width, centre, 1 / std::sqrt(spread / static_cast<double>(width) + eps_));
    }
  }

 private:
  int64_t groups_, images_ = 0, channels_ = 0;
  double eps_;
  std::vector<at::Tensor> parts_;
  std::vector<double> mean_, variance_;  // of the channels of an image
};

}  // namespace fastdiff
