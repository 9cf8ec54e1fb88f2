// ema_update on CUDA tensors: one launch for each pair of dtypes, from a table of addresses that is
// copied to the device when a list of tensors is first seen.
#include "cuda/ema_update.h"

#include <list>
#include <mutex>

#include "cuda/bindings/common.h"

namespace fastdiff::cuda {
namespace {

constexpr size_t kTables = 16;  // kept, besides the tables that a captured graph reads

struct Table {
  std::vector<int64_t> rows;
  c10::Device device;
  Stream stream;  // a freed table's memory goes to the stream's next kernels, so it serves this one
  at::Tensor on_device;
  bool captured;  // a graph reads it at each replay, so it is kept forever
};

// The table on the device. The list begins with the most recently used table.
at::Tensor table_for(std::vector<int64_t> rows, const at::Tensor& x, Stream stream) {
  static std::mutex lock;
  static auto& tables = *new std::list<Table>;  // never destroyed: at exit the device may be gone
  const std::lock_guard guard(lock);
  const bool capturing = OnDevice::capturing();
  auto found = std::find_if(tables.begin(), tables.end(), [&](const Table& table) {
    return table.device == x.device() && table.stream == stream && table.rows == rows;
  });
  if (found == tables.end() && capturing)  // a stream that captures has seen it on another one
    found = std::find_if(tables.begin(), tables.end(), [&](const Table& table) {
      return table.device == x.device() && table.rows == rows;
    });
  if (found == tables.end()) {
    TORCH_CHECK(!capturing,
                "ema_update must have run once with these tensors before it is captured");
    const auto pinned = at::TensorOptions(at::kLong).pinned_memory(kDevice != at::kCPU);
    const auto host = at::empty({static_cast<int64_t>(rows.size())}, pinned);
    std::copy(rows.begin(), rows.end(), host.mutable_data_ptr<int64_t>());
    auto copy = at::empty(host.sizes(), x.options().dtype(at::kLong));
    copy.copy_(host, /*non_blocking=*/true);
    found = tables.insert(tables.end(), {std::move(rows), x.device(), stream, copy, false});
  }
  found->captured |= capturing;
  tables.splice(tables.begin(), tables, found);
  size_t kept = 0;
  for (auto table = tables.begin(); table != tables.end();)
    table = table->captured || ++kept <= kTables ? std::next(table) : tables.erase(table);
  return tables.front().on_device;
}

void ema_update(at::TensorList averages, at::TensorList parameters, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(averages.size() == parameters.size(),
                    "there must be as many averages as parameters, got ", averages.size(), " and ",
                    parameters.size());
  if (averages.empty()) return;
  const auto& first = averages[0];
  check_scalar(weight, at::kFloat, first, "weight");
  constexpr int kDtypes = 3;
  std::vector<EmaPair> pairs[kDtypes][kDtypes];
  for (size_t i = 0; i < averages.size(); ++i) {
    const auto &average = averages[i], &parameter = parameters[i];
    const auto a = dtype_of(average, "an average"), p = dtype_of(parameter, "a parameter");
    check_device(average, first.device(), "an average");
    check_tensor(parameter, average.sizes(), parameter.scalar_type(), first.device(),
                 "a parameter");
    TORCH_CHECK_VALUE(average.is_non_overlapping_and_dense() &&
                          parameter.is_non_overlapping_and_dense() &&
                          average.strides() == parameter.strides(),
                      "an average and its parameter must be dense and of the same strides, got ",
                      average.strides(), " and ", parameter.strides());
    pairs[static_cast<int>(a)][static_cast<int>(p)].push_back(
        {average.mutable_data_ptr(), parameter.const_data_ptr(), average.numel()});
  }
  const OnDevice on(first);
  for (int a = 0; a < kDtypes; ++a)
    for (int p = 0; p < kDtypes; ++p) {
      const auto average = static_cast<Dtype>(a), parameter = static_cast<Dtype>(p);
      auto rows = ema_update_table(pairs[a][p], average, parameter);
      if (rows.empty()) continue;
      const auto chunks = static_cast<int64_t>(rows.size() / 3);
      const auto table = table_for(std::move(rows), first, on.stream);
      ema_update_cuda({average, parameter, chunks, table.const_data_ptr<int64_t>(),
                       weight.const_data_ptr<float>()},
                      on.stream);
    }
  for (const auto& average : averages) bump_version(average);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(FASTDIFF_NAMESPACE, m) {
  m.def("ema_update(Tensor(a!)[] averages, Tensor[] parameters, Tensor weight) -> ()");
}

TORCH_LIBRARY_IMPL(FASTDIFF_NAMESPACE, FASTDIFF_KEY, m) { m.impl("ema_update", ema_update); }

}  // namespace fastdiff::cuda
