#pragma once

#include <cstdint>
#include <vector>

#include "cuda/launch.h"

namespace fastdiff::cuda {

// An average and the parameter that it follows: two dense tensors that are walked flat together.
struct EmaPair {
  void* average;
  const void* parameter;
  int64_t count;  // elements of each
};

// The table that the kernel walks: int64 [chunks, 3], a row (address in the average, address in the
// parameter, elements) for each piece of at most kEmaChunk elements of a pair. It depends on the
// addresses, the counts and the two dtypes only. So it is made and copied to the device once for a
// list of pairs (all of the same two dtypes), and kept. A captured graph reads it at a fixed
// address, so the device tensor has to live as long as the graph. Empty pairs have no row.
constexpr int64_t kEmaChunk = 4096;

std::vector<int64_t> ema_update_table(const std::vector<EmaPair>& pairs, Dtype average,
                                      Dtype parameter);

struct EmaUpdateArgs {
  Dtype average, parameter;  // of all rows of the table
  int64_t chunks;            // rows of the table; with 0 nothing is launched
  const int64_t* table;      // on the device
  const float* weight;       // one element on the device
};

// One launch for the whole list.
void ema_update_cuda(const EmaUpdateArgs& args, Stream stream);

}  // namespace fastdiff::cuda
