// SPDX-License-Identifier: Apache-2.0
// Random values from the system, for what nobody may guess, or have too by chance.
#pragma once

#include <sys/random.h>

#include <type_traits>

#include "base/error.h"

namespace tern {

// Every bit of T. `what` it is for, in the error's text: TERN_SYSTEM_ERROR.
template <typename T>
T random_value(const char* what) {
  static_assert(std::has_unique_object_representations_v<T> && sizeof(T) <= 256, "getrandom gives up to 256 bytes at once");
  T value;
  if (::getrandom(&value, sizeof(value), 0) != sizeof(value)) fail_errno("getrandom", what);
  return value;
}

}  // namespace tern
