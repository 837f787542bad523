// SPDX-License-Identifier: Apache-2.0
// C++ sees the same layout as C, although its structs begin at their defaults there.
#include "layout.c"

#include <tern/tern.hpp>
