// SPDX-License-Identifier: Apache-2.0
#include "base/short_pauses.h"

#include <sys/prctl.h>

namespace tern {

void allow_short_pauses() {
  constexpr unsigned long kSlackNs = 1000;
  static_cast<void>(::prctl(PR_SET_TIMERSLACK, kSlackNs));
}

}  // namespace tern
