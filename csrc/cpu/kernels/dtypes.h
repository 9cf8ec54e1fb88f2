// The one place where a dtype that is known when a kernel is called becomes a C++ type.
#pragma once

#include <c10/core/ScalarType.h>

#include "cpu/kernels/vectors.h"

namespace fastdiff::CPU_CAPABILITY {

// Calls body.template operator()<T>() with the one of the types that `dtype` names. The operation
// has checked that it is one of them.
template <class T, class... Others, class Body>
FASTDIFF_INLINE decltype(auto) for_dtype_of(c10::ScalarType dtype, Body&& body) {
  if constexpr (sizeof...(Others) > 0) {
    if (dtype != c10::CppTypeToScalarType<T>::value)
      return for_dtype_of<Others...>(dtype, static_cast<Body&&>(body));
  }
  return body.template operator()<T>();
}

template <class Body>
FASTDIFF_INLINE decltype(auto) for_floating(c10::ScalarType dtype, Body&& body) {
  return for_dtype_of<float, double, c10::BFloat16, c10::Half>(dtype, static_cast<Body&&>(body));
}

// The types of what only a compiled model calls.
template <class Body>
FASTDIFF_INLINE decltype(auto) for_float_or_bfloat16(c10::ScalarType dtype, Body&& body) {
  return for_dtype_of<float, c10::BFloat16>(dtype, static_cast<Body&&>(body));
}

}  // namespace fastdiff::CPU_CAPABILITY
