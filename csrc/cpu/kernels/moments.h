// Mean and squared deviations of values that come a run at a time, joined in float64 by the formula
// of Chan, Golub & LeVeque 1983 ("Algorithms for computing the sample variance", eq. 2.1): neither
// a mean that is large beside the deviation nor many values cost accuracy.
//
// A run is given by its mean and `m2`, the sum of squares about the mean, or by its sums of
// x - pivot and (x - pivot)^2. The nearer the pivot is to the run's mean, the less is cancelled.
#pragma once

namespace fastdiff::CPU_CAPABILITY {

// The moments of one series of values.
struct Moments {
  double count = 0, mean = 0, m2 = 0;

  void join(double n, double run_mean, double run_m2) {
    const double delta = run_mean - mean, total = count + n;
    mean += delta * n / total;
    m2 += run_m2 + delta * delta * count * n / total;
    count = total;
  }

  void join_sums(double n, double pivot, double sum, double squares) {
    const double rest = squares - sum * sum / n;
    join(n, pivot + sum / n, rest > 0 ? rest : 0);
  }
};

// Joins a run of `n` values to `count` before them in every channel: the same formula, whose
// quotients are computed once for all channels.
struct JoinChannels {
  double inverse, share, weight;

  JoinChannels(double count, double n)
      : inverse(1 / n), share(n / (count + n)), weight(count * share) {}

  void join(double& mean, double& m2, double run_mean, double run_m2) const {
    const double delta = run_mean - mean;
    mean += delta * share;
    m2 += run_m2 + delta * delta * weight;
  }

  void join_sums(double& mean, double& m2, double pivot, double sum, double squares) const {
    const double rest = squares - sum * sum * inverse;
    join(mean, m2, pivot + sum * inverse, rest > 0 ? rest : 0);
  }
};

}  // namespace fastdiff::CPU_CAPABILITY
