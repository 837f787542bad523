// SPDX-License-Identifier: Apache-2.0
#include "transport/endpoint.h"

#include <algorithm>

#include "base/error.h"

namespace tern {

void Endpoint::put(Put put, Deadline deadline) {
  // A provider that cannot take more now does not always say when it can.
  constexpr int kRetryMs = 1;
  while (!try_put(put)) {
    if (deadline.passed())
      fail(TERN_TIMEOUT, "transport: could not put {} bytes to rank {} until the deadline (channel {}, epoch {}, {} messages under way)",
           put.num_bytes, put.peer, put.channel, put.epoch, num_outstanding());
    wait(Deadline::in_ms(std::min(kRetryMs, deadline.remaining_ms())));
  }
}

}  // namespace tern
