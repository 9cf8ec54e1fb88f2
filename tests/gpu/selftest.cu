// Kernels that try the emulation itself, right ones and wrong ones; the argument names one. Prints
// what it finds, or the error.
#include <cmath>
#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "cuda/device.cuh"

extern "C" void fastdiff_emulation_traffic(uint64_t* counts);

namespace fastdiff::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;

__global__ void exchange(int* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int* at = out + 6 * threadIdx.x;
  store_one(at, __shfl_xor_sync(kAll, lane, 3));
  store_one(at + 1, __shfl_down_sync(kAll, lane, 5u));
  store_one(at + 2, __shfl_up_sync(kAll, lane, 5u));
  store_one(at + 3, __shfl_sync(kAll, lane, 40));
  store_one(at + 4, __shfl_down_sync(kAll, lane, 3u, 8));
  store_one(at + 5, static_cast<int>(__ballot_sync(kAll, lane % 3 == 0)));
}

__global__ void votes(int* out) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const bool any = __any_sync(kAll, lane == 9), none = __any_sync(kAll, lane == 32);
  const bool all = __all_sync(kAll, lane < 32), some = __all_sync(kAll, lane < 31);
  const bool once = __syncthreads_or(threadIdx.x == 70), never = __syncthreads_or(0);
  store_one(out + threadIdx.x, any + 2 * none + 4 * all + 8 * some + 16 * once + 32 * never);
}

// Halves of a warp that exchange by themselves, one of them more often.
__global__ void halves(int* out) {
  const unsigned lane = threadIdx.x % 32, mask = lane < 16 ? 0xffffu : 0xffff0000u;
  int value = 1;
  for (int i = lane < 16 ? 3 : 0; i < 4; ++i) value += __shfl_xor_sync(mask, value, 1 << i);
  store_one(out + threadIdx.x, value);
}

// Every thread's number by the next one, through shared memory.
__global__ void rotate(int* out) {
  __shared__ int number[256];
  for (int round = 0; round < 3; ++round) {
    number[threadIdx.x] = static_cast<int>(threadIdx.x) + round;
    __syncthreads();
    store_one(out + threadIdx.x, number[(threadIdx.x + 1) % blockDim.x]);
    __syncthreads();
  }
}

// As a block finds its shared memory, and as it leaves it.
__global__ void fresh(int* out) {
  __shared__ float variable[300];
  float* dynamic = dynamic_shared<float>();
  int nan = 0;
  for (unsigned i = threadIdx.x; i < 300; i += blockDim.x)
    nan += std::isnan(variable[i]) && std::isnan(dynamic[i]);
  store_one(out + blockIdx.x * blockDim.x + threadIdx.x, nan);
  for (unsigned i = threadIdx.x; i < 300; i += blockDim.x) variable[i] = dynamic[i] = 0;
}

__global__ void sums(float* out) {
  const float v = block_sum(static_cast<float>(threadIdx.x));
  const double w = block_sum(1.0);
  store_one(out + threadIdx.x, v + static_cast<float>(w));
}

__global__ void some_wait() {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void wait_apart() {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void lane_missing() {
  if (threadIdx.x != 7) __shfl_xor_sync(kAll, 1, 1);
}
__global__ void masks_differ() { __shfl_xor_sync(threadIdx.x ? kAll : 1u, 1, 0); }
__global__ void outside_mask() {
  if (threadIdx.x < 16) __shfl_xor_sync(0xffffu, 1, 16);
}
__global__ void misaligned(const float* in) { load<4>(in + 1); }
__global__ void misaligned_store(float* out) { store(out + 1, Pack<float, 2>{}); }
__global__ void no_dynamic() { dynamic_shared<int>(); }

// A shuffle in place of the barrier: a warp sees it, another does not have to.
__global__ void shuffle_for_barrier(int* out) {
  __shared__ int number[64];
  number[threadIdx.x] = 1;
  __shfl_sync(kAll, 0, 0);
  store_one(out + threadIdx.x, number[threadIdx.x ^ 1]);
  __syncthreads();
}
__global__ void warp_barrier(int* out) {
  __shared__ int number[64];
  number[threadIdx.x] = 1;
  __syncwarp();
  store_one(out + threadIdx.x, number[threadIdx.x ^ 1]);
}

__global__ void copy(const __half* in, __half* out) {
  store(out + 8 * threadIdx.x, load<8>(in + 8 * threadIdx.x));
  if (threadIdx.x == 0) store_one(out, load_one(in));
}

template <class T>
void round_trip() {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const T value{static_cast<uint16_t>(bits)};
    const float wide = to_float(value);
    if (!std::isnan(wide) && from_float<T>(wide).bits != bits) std::printf("%x ", bits);
  }
}

template <class T>
void print(const std::vector<T>& values, size_t count) {
  for (size_t i = 0; i < count; ++i) std::printf("%g ", static_cast<double>(values[i]));
}

void run(const std::string& name) {
  std::vector<int> out(512, -1);
  std::vector<float> floats(512, -1);
  if (name == "exchange") {
    FASTDIFF_LAUNCH(exchange, 1, 64, 0, nullptr, out.data());
    print(out, 64 * 6);
  } else if (name == "votes") {
    FASTDIFF_LAUNCH(votes, 1, 96, 0, nullptr, out.data());
    print(out, 96);
  } else if (name == "halves") {
    FASTDIFF_LAUNCH(halves, 1, 32, 0, nullptr, out.data());
    print(out, 32);
  } else if (name == "rotate") {
    FASTDIFF_LAUNCH(rotate, 2, 256, 0, nullptr, out.data());
    print(out, 256);
  } else if (name == "fresh") {
    FASTDIFF_LAUNCH(fresh, 3, 100, 1200, nullptr, out.data());
    print(out, 300);
  } else if (name == "sums") {
    FASTDIFF_LAUNCH(sums, 1, 96, 0, nullptr, floats.data());
    print(floats, 96);
  } else if (name == "copy") {
    std::vector<__half> in(256), to(256);
    FASTDIFF_LAUNCH(copy, 2, 16, 0, nullptr, in.data(), to.data());
    uint64_t counts[11];
    fastdiff_emulation_traffic(counts);
    print(std::vector<uint64_t>(counts, counts + 11), 11);
  } else if (name == "round_trip") {
    round_trip<__half>();
    round_trip<__nv_bfloat16>();
    for (const float v : {1 + 0x1p-11f, 1 + 3 * 0x1p-11f, 65519.9f, 65520.0f, 0x1p-25f, 0x1.1p-25f})
      std::printf("%g ", to_float(from_float<__half>(v)));
    for (const float v : {1 + 0x1p-8f, 1 + 3 * 0x1p-8f, 3.4e38f})
      std::printf("%g ", to_float(from_float<__nv_bfloat16>(v)));
  } else if (name == "some_wait") {
    FASTDIFF_LAUNCH(some_wait, 1, 64, 0, nullptr);
  } else if (name == "wait_apart") {
    FASTDIFF_LAUNCH(wait_apart, 1, 64, 0, nullptr);
  } else if (name == "lane_missing") {
    FASTDIFF_LAUNCH(lane_missing, 1, 64, 0, nullptr);
  } else if (name == "masks_differ") {
    FASTDIFF_LAUNCH(masks_differ, 1, 2, 0, nullptr);
  } else if (name == "outside_mask") {
    FASTDIFF_LAUNCH(outside_mask, 1, 32, 0, nullptr);
  } else if (name == "misaligned") {
    FASTDIFF_LAUNCH(misaligned, 1, 1, 0, nullptr, floats.data());
  } else if (name == "misaligned_store") {
    FASTDIFF_LAUNCH(misaligned_store, 1, 1, 0, nullptr, floats.data());
  } else if (name == "no_dynamic") {
    FASTDIFF_LAUNCH(no_dynamic, 1, 1, 0, nullptr);
  } else if (name == "shuffle_for_barrier") {
    FASTDIFF_LAUNCH(shuffle_for_barrier, 1, 64, 0, nullptr, out.data());
  } else if (name == "warp_barrier") {
    FASTDIFF_LAUNCH(warp_barrier, 1, 64, 0, nullptr, out.data());
  } else if (name == "large_block") {
    FASTDIFF_LAUNCH(some_wait, 1, 1025, 0, nullptr);
  } else if (name == "large_grid") {
    FASTDIFF_LAUNCH(some_wait, dim3(1, 65536), 32, 0, nullptr);
  } else if (name == "large_shared") {
    FASTDIFF_LAUNCH(no_dynamic, 1, 32, kSharedLimit + 1, nullptr);
  } else {
    std::printf("unknown: %s", name.c_str());
  }
}

}  // namespace
}  // namespace fastdiff::cuda

int main(int, char** arguments) {
  try {
    fastdiff::cuda::run(arguments[1]);
  } catch (const std::exception& error) {
    std::printf("error: %s", error.what());
  }
}
