// Runs every kernel through its launcher on small data, without Python and PyTorch, so that a
// sanitizer sees nothing but the kernels: every dtype, layout, width of access and path. Inputs
// have buffers of their own of just their size, outputs start as NaN and must end without; that
// values are right is for the tests in tests/gpu. Arguments: operations to run, or none for all.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda/add_time_embedding.h"
#include "cuda/conv_epilogue.h"
#include "cuda/denoising_loss.h"
#include "cuda/device.cuh"
#include "cuda/ema_update.h"
#include "cuda/group_norm_silu.h"
#include "cuda/group_norm_silu_backward.h"
#include "cuda/philox_normal.h"
#include "cuda/q_sample.h"
#include "cuda/sampler_step.h"
#include "cuda/upsample_nearest2x.h"

namespace fastdiff::cuda {
namespace {

constexpr Stream kStream = nullptr;
constexpr Dtype kDtypes[] = {Dtype::Float32, Dtype::BFloat16, Dtype::Float16};

// What a case is run in: `shift` elements off alignment.
struct Form {
  Dtype dtype;
  bool channels_last;
  int shift;
};

// The buffers of one case.
class Memory {
 public:
  explicit Memory(Form form) : form_(form) {}

  // Values of about -1..1 in the case's dtype.
  void* values(int64_t count) {
    void* at = room(count, form_.dtype);
    write(at, count, form_.dtype, [this] { return next(); });
    return at;
  }
  float* floats(const std::vector<float>& from) { return copy(from); }
  int64_t* integers(const std::vector<int64_t>& from) { return copy(from); }

  // NaN now, to be written by the kernel.
  void* result(int64_t count) { return expect(count, form_.dtype); }
  float* float_result(int64_t count) {
    return static_cast<float*>(expect(count, Dtype::Float32, 0));
  }
  void* workspace(int64_t bytes) {
    auto* at =
        static_cast<char*>(kept_.emplace_back(std::aligned_alloc(16, (bytes + 16) & ~15)).get());
    std::memset(at, 0xff, bytes);
    return at;
  }

  // Whether all results have been written.
  bool finished() const {
    for (const auto& [at, count, dtype] : results_)
      for (int64_t i = 0; i < count; ++i)
        if (std::isnan(read(at, i, dtype))) return false;
    return true;
  }

 private:
  struct Free {
    void operator()(void* at) const { std::free(at); }
  };
  struct Result {
    const void* at;
    int64_t count;
    Dtype dtype;
  };

  float next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<int32_t>(state_ >> 32)) * 0x1p-31f;
  }
  void* room(int64_t count, Dtype dtype, int shift) {
    const int64_t bytes = count * size_of(dtype), before = shift * size_of(dtype);
    auto* at = kept_.emplace_back(std::malloc(before + bytes)).get();
    return static_cast<char*>(at) + before;
  }
  void* room(int64_t count, Dtype dtype) { return room(count, dtype, form_.shift); }
  void* expect(int64_t count, Dtype dtype, int shift) {
    void* at = room(count, dtype, shift);
    std::memset(at, 0xff, count * size_of(dtype));
    results_.push_back({at, count, dtype});
    return at;
  }
  void* expect(int64_t count, Dtype dtype) { return expect(count, dtype, form_.shift); }
  template <class T>
  T* copy(const std::vector<T>& from) {
    auto* at = static_cast<T*>(kept_.emplace_back(std::malloc(from.size() * sizeof(T))).get());
    std::memcpy(at, from.data(), from.size() * sizeof(T));
    return at;
  }
  template <class F>
  static void write(void* at, int64_t count, Dtype dtype, F value) {
    for_dtype(dtype, [&]<class T>(T) {
      for (int64_t i = 0; i < count; ++i) static_cast<T*>(at)[i] = from_float<T>(value());
    });
  }
  static float read(const void* at, int64_t i, Dtype dtype) {
    return for_dtype(dtype, [&]<class T>(T) { return to_float(static_cast<const T*>(at)[i]); });
  }

  Form form_;
  uint64_t state_ = 1;
  std::list<std::unique_ptr<void, Free>> kept_;
  std::vector<Result> results_;
};

int failures = 0;

const std::vector<Form> kOne{{Dtype::Float32, false, 0}};
// Forms that differ in everything from one to the next.
const std::vector<Form> kFew{{Dtype::Float32, false, 0},
                             {Dtype::BFloat16, true, 0},
                             {Dtype::BFloat16, false, 1},
                             {Dtype::Float32, true, 1}};
const std::vector<Form> kMany{{Dtype::Float32, false, 0},  {Dtype::Float32, true, 0},
                              {Dtype::BFloat16, false, 0}, {Dtype::BFloat16, true, 0},
                              {Dtype::Float16, false, 0},  {Dtype::BFloat16, false, 1},
                              {Dtype::BFloat16, true, 1}};

template <class F>
void in_forms(const std::string& name, F run, const std::vector<Form>& forms = kMany) {
  for (const Form& form : forms) {
    Memory memory(form);
    run(form, memory);
    if (memory.finished()) continue;
    std::printf("%s: not all results were written (dtype %d, channels_last %d, shift %d)\n",
                name.c_str(), static_cast<int>(form.dtype), form.channels_last, form.shift);
    ++failures;
  }
}

void add_time_embedding() {
  for (const int64_t pixels : {16, 9})
    in_forms("add_time_embedding", [&](Form form, Memory& m) {
      const int64_t n = 2, c = pixels == 16 ? 8 : 5, all = n * c * pixels;
      add_time_embedding_cuda({form.dtype, form.channels_last, n, c, pixels, m.values(all),
                               m.values(n * c), m.result(all)},
                              kStream);
    });
}

struct Epilogue {
  int64_t c, pixels, spans;
  bool all_inputs;
};

void conv_epilogue() {
  // The last has a span that several warps share.
  for (const Epilogue& s :
       {Epilogue{16, 48, 0, true}, Epilogue{5, 35, 0, false}, Epilogue{16, 48, 3, true},
        Epilogue{5, 35, 3, false}, Epilogue{2, 1024, 1, true}})
    in_forms("conv_epilogue", [&](Form form, Memory& m) {
      if (s.pixels > 48 && form.dtype != Dtype::Float32) return;  // it takes long
      const int64_t n = 2, all = n * s.c * s.pixels;
      conv_epilogue_cuda(
          {form.dtype, form.channels_last, n, s.c, s.pixels, s.spans, m.values(all),
           s.all_inputs ? m.values(s.c) : nullptr, s.all_inputs ? m.values(n * s.c) : nullptr,
           s.all_inputs ? m.values(all) : nullptr, m.result(all),
           s.spans ? m.float_result(n * s.spans * 4 * s.c) : nullptr},
          kStream);
    });
}

void upsample_nearest2x() {
  for (const int64_t width : {8, 3})
    in_forms("upsample_nearest2x", [&](Form form, Memory& m) {
      const int64_t n = 1, c = width == 8 ? 8 : 3, all = n * c * 2 * width;
      upsample_nearest2x_cuda(
          {form.dtype, form.channels_last, n, c, 2, width, m.values(all), m.result(4 * all)},
          kStream);
      upsample_nearest2x_backward_cuda(
          {form.dtype, form.channels_last, n, c, 2, width, m.values(4 * all), m.result(all)},
          kStream);
    });
}

void q_sample() {
  for (const int64_t c : {8, 4, 3})
    in_forms("q_sample", [&](Form form, Memory& m) {
      const int64_t n = 2, pixels = c == 3 ? 7 : 8, image = c * pixels;
      const auto *t = m.integers({2, 0}), *seed = m.integers({5, 0, 5, 1}), *row = m.integers({9});
      const auto *signal = m.floats({.9f, .7f, .4f}), *sigma = m.floats({.1f, .3f, .8f});
      q_sample_cuda({form.dtype, n, image, m.values(n * image), m.values(n * image),
                     m.result(n * image), t, 3, signal, sigma},
                    kStream);
      q_sample_from_seed_cuda({form.dtype, form.channels_last, n, c, pixels, m.values(n * image),
                               m.result(n * image), t, 3, signal, sigma, seed, row},
                              kStream);
    });
}

void denoising_loss() {
  struct Case {
    int64_t n, c, pixels;
    bool seeded, x0;
  };
  // Images that several threads, a block or several blocks take, with noise that is given and that
  // of seeds.
  for (const bool seeded : {false, true})
    for (const Case& s :
         {Case{5, 4, 8, seeded, true}, Case{2, 3, 7, seeded, false}, Case{2, 8, 72, seeded, true},
          Case{1, 8, 260, seeded, true}, Case{1, 5, 1800, seeded, true}})
      in_forms(
          "denoising_loss",
          [&](Form form, Memory& m) {
            const int64_t all = s.n * s.c * s.pixels;
            std::vector<int64_t> t(s.n, 2), seeds(2 * s.n, 5);
            std::vector<float> grad(s.n, .5f);
            DenoisingLossArgs args{};
            args.dtype = form.dtype;
            args.channels_last = form.channels_last;
            args.images = s.n, args.channels = s.c, args.pixels = s.pixels;
            args.prediction = m.values(all);
            args.x0 = s.x0 ? m.values(all) : nullptr;
            args.noise = s.seeded ? nullptr : m.values(all);
            args.seed = s.seeded ? m.integers(seeds) : nullptr;
            args.row = s.seeded ? m.integers({9}) : nullptr;
            args.t = m.integers(t);
            args.steps = 3;
            args.target_x0 = m.floats({.9f, .7f, .4f});
            args.target_noise = m.floats({.1f, .3f, .8f});
            args.weight = m.floats({1, 2, 3});
            void* workspace = m.workspace(denoising_loss_workspace(args));
            denoising_loss_cuda(args, m.float_result(s.n), workspace, kStream);
            denoising_loss_backward_cuda(args, m.floats(grad), m.result(all), kStream);
          },
          s.pixels > 72 ? kOne : kMany);
}

void philox_normal() {
  for (const int64_t image : {32, 13})
    in_forms("philox_normal", [&](Form form, Memory& m) {
      philox_normal_cuda({form.dtype, 2, image, m.integers({5, 0, 5, 1}), 7, m.result(2 * image)},
                         kStream);
    });
}

void ema_update() {
  for (const Dtype parameter : kDtypes)
    in_forms("ema_update", [&](Form form, Memory& m) {
      Memory others({parameter, false, form.shift});
      std::vector<EmaPair> pairs;
      for (const int64_t count : {1, 300, 0, 4100})
        pairs.push_back({m.values(count), others.values(count), count});
      const auto rows = ema_update_table(pairs, form.dtype, parameter);
      ema_update_cuda({form.dtype, parameter, static_cast<int64_t>(rows.size() / 3),
                       m.integers(rows), m.floats({.5f})},
                      kStream);
    });
}

// One image shape of group_norm_silu; more than 512 channels in a group do not fit on the chip.
struct Norm {
  int64_t n, c, skip, pixels, groups;
  bool all_inputs, statistics;
};

void group_norm_silu() {
  for (const Norm& s : {Norm{2, 16, 0, 16, 4, true, false}, Norm{1, 6, 0, 9, 2, false, false},
                        Norm{1, 520, 0, 8, 1, true, false}, Norm{1, 515, 0, 3, 1, false, false},
                        Norm{2, 16, 0, 16, 4, true, true}, Norm{1, 16, 8, 16, 3, true, false},
                        Norm{1, 520, 8, 8, 1, false, false}})
    in_forms(
        "group_norm_silu",
        [&](Form form, Memory& m) {
          const int64_t c = s.c + s.skip, all = s.n * c * s.pixels;
          const auto maybe = [&](int64_t count) {
            return s.all_inputs ? m.values(count) : nullptr;
          };
          const void *x = m.values(s.n * s.c * s.pixels),
                     *skip = s.skip ? m.values(s.n * s.skip * s.pixels) : nullptr,
                     *weight = maybe(c), *bias = maybe(c), *add = maybe(s.n * c),
                     *scale = maybe(s.n * c), *shift = maybe(s.n * c), *residual = maybe(all);
          std::vector<float> statistics;
          for (int64_t i = 0; s.statistics && i < s.n * 4 * c; ++i)
            statistics.push_back(i / c % 4 == 0   ? static_cast<float>(s.pixels)
                                 : i / c % 4 == 3 ? 5.0f
                                                  : 0.0f);
          std::vector<double> mean(s.n * s.groups), rstd(s.n * s.groups);
          GroupNormSiluArgs args{form.dtype,
                                 form.channels_last,
                                 s.all_inputs,
                                 s.n,
                                 s.c,
                                 s.skip,
                                 s.pixels,
                                 s.groups,
                                 1e-5,
                                 x,
                                 skip,
                                 weight,
                                 bias,
                                 add,
                                 scale,
                                 shift,
                                 residual,
                                 s.statistics ? m.floats(statistics) : nullptr,
                                 s.statistics ? 1 : 0,
                                 nullptr,
                                 m.result(all),
                                 mean.data(),
                                 rstd.data()};
          args.workspace = m.workspace(group_norm_silu_workspace(args));
          group_norm_silu_cuda(args, kStream);
          GroupNormSiluBackwardArgs back{form.dtype,
                                         form.channels_last,
                                         s.all_inputs,
                                         s.n,
                                         s.c,
                                         s.skip,
                                         s.pixels,
                                         s.groups,
                                         m.values(all),
                                         x,
                                         skip,
                                         mean.data(),
                                         rstd.data(),
                                         weight,
                                         bias,
                                         add,
                                         scale,
                                         shift,
                                         nullptr,
                                         m.result(s.n * s.c * s.pixels),
                                         s.skip ? m.result(s.n * s.skip * s.pixels) : nullptr,
                                         m.result(c),
                                         m.result(c),
                                         m.result(s.n * c),
                                         m.result(s.n * c),
                                         m.result(s.n * c)};
          back.workspace = m.workspace(group_norm_silu_backward_workspace(back));
          group_norm_silu_backward_cuda(back, kStream);
        },
        s.c < 100 ? kMany : kFew);
}

void sampler_step() {
  struct Case {
    bool guided, has_variance, noise, seed, per_image;
    int depth;
    int64_t channels, pixels, images = 2;
  };
  for (const Case& s : {Case{false, false, false, false, false, 0, 4, 16},
                        Case{true, false, false, true, true, 2, 4, 16},
                        Case{false, true, true, false, true, 1, 8, 8},
                        Case{true, true, false, true, false, 1, 3, 7},
                        // More images than blocks take one each.
                        Case{false, false, false, false, true, 0, 1, 2, 265}})
    in_forms(
        "sampler_step",
        [&](Form form, Memory& m) {
          const int64_t n = s.images, all = n * s.channels * s.pixels;
          std::vector<float> row(kSamplerColumns + s.depth, .3f);
          row[kGuidance] = 2;
          row[kRescale] = s.per_image && s.guided ? .5f : 0;
          row[kClipMin] = -1, row[kClipMax] = 1.5f;
          row[kQuantile] = s.per_image ? .9f : 0;
          row[kSlot] = s.depth ? 0 : -1;
          std::vector<float> history(s.depth * all, .25f);
          SamplerStepArgs args{};
          args.dtype = form.dtype;
          args.images = n, args.channels = s.channels, args.pixels = s.pixels;
          args.channels_last = form.channels_last;
          args.guided = s.guided, args.has_variance = s.has_variance;
          args.x = m.values(all);
          args.model_out = m.values(all * (s.guided ? 2 : 1) * (s.has_variance ? 2 : 1));
          args.noise = s.noise ? m.values(all) : nullptr;
          args.seed = s.seed ? m.integers({5, 0, 5, 1}) : nullptr;
          args.out = m.result(all);
          args.table = m.floats(row);
          args.rows = 1;
          args.row_stride = static_cast<int64_t>(row.size());
          args.column_stride = 1;
          args.step = m.integers({0});
          args.history = s.depth ? m.floats(history) : nullptr;
          args.depth = s.depth;
          args.slot_stride = all;
          args.workspace = m.workspace(sampler_step_workspace(args));
          sampler_step_cuda(args, kStream);
        },
        s.images == 2 ? kMany : kOne);
}

}  // namespace
}  // namespace fastdiff::cuda

int main(int count, char** names) {
  using namespace fastdiff::cuda;
  const std::map<std::string, std::function<void()>> operations{
      {"add_time_embedding", add_time_embedding},
      {"conv_epilogue", conv_epilogue},
      {"denoising_loss", denoising_loss},
      {"ema_update", ema_update},
      {"group_norm_silu", group_norm_silu},
      {"philox_normal", philox_normal},
      {"q_sample", q_sample},
      {"sampler_step", sampler_step},
      {"upsample_nearest2x", upsample_nearest2x}};
  std::vector<std::string> wanted(names + 1, names + count);
  for (const auto& [name, run] : operations)
    if (count == 1) wanted.push_back(name);
  for (const auto& name : wanted) operations.at(name)();
  return failures == 0 ? 0 : 1;
}
