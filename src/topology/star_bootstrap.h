// SPDX-License-Identifier: Apache-2.0
// A bootstrap over stream sockets: every rank has one to rank 0, which gathers and sends back. Frames have a header with the
// number of the allgather, so that ranks that went different ways fail instead of taking each other's bytes.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/fd.h"
#include "topology/bootstrap.h"

namespace tern {

// `links`: on rank 0 one for each rank (its own is empty); elsewhere one, to rank 0. Non-blocking sockets.
std::unique_ptr<Bootstrap> make_star_bootstrap(int rank, int num_ranks, std::vector<Fd> links);

// Tells a rank that waits in its first allgather that there will be none. Does not wait.
void send_failure(int link, tern_status status, const std::string& text);

}  // namespace tern
