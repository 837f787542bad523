// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace tern {

// From now on the calling thread's sleeps end on time; otherwise each ends up to 50 us late.
void allow_short_pauses();

}  // namespace tern
