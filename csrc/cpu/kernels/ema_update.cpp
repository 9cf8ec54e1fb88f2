// a += weight (p - a), flat over the memory of an average a and its parameter p.
//
// Reads 2 S and writes 1 S for tensors of S bytes, the least there is. A parameter of another dtype
// is converted a few elements at a time.
#include "cpu/kernels/ema_update.h"

#include "cpu/kernels/dtypes.h"
#include "cpu/kernels/lerp.h"

namespace fastdiff::CPU_CAPABILITY {
namespace {

template <class T, class From>
FASTDIFF_INLINE Values<T> load_from(const From* p, int64_t count) {
  using X = Values<T>;
  if constexpr (std::is_same_v<T, From>) {
    return X::load(p, count);
  } else {
    typename X::Wide values[X::size] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<typename X::Wide>(p[i]);
    return X::load_wide(values);
  }
}

}  // namespace

void ema_update(const EmaTensors& t, double weight, int64_t begin, int64_t end) {
  for_floating(t.average_dtype, [&]<class A>() {
    const Lerp<A> lerp(weight);
    A* a = static_cast<A*>(t.average) + begin;
    for_floating(t.parameter_dtype, [&]<class P>() {
      const P* p = static_cast<const P*>(t.parameter) + begin;
      for_values<A>(end - begin, [&](int64_t i, int64_t count) FASTDIFF_HOT {
        lerp(Values<A>::load(a + i, count), load_from<A>(p + i, count)).store(a + i, count);
      });
    });
  });
}

}  // namespace fastdiff::CPU_CAPABILITY
