// SPDX-License-Identifier: Apache-2.0
// A build of the command without CUDA.
#include "base/error.h"
#include "tools/cuda_facts.h"
#include "tools/link_ceiling.h"
#include "tools/stream_timer.h"

namespace tern::tools {

bool built_with_cuda() { return false; }

CudaReport read_cuda() {
  CudaReport report;
  report.problem = "this build of Tern has no CUDA";
  return report;
}

void test_cuda_pairs(CudaReport&) {}

std::string cuda_version_text(int) { return ""; }

std::unique_ptr<StreamTimer> make_stream_timer(RankDevice&, const StreamTimerOptions&) {
  fail(TERN_UNSUPPORTED, "times on a GPU's stream are asked for, but this build has no CUDA");
}

std::unique_ptr<LinkCeiling> make_link_ceiling(RankContext&, RankDevice&) {
  fail(TERN_UNSUPPORTED, "copies between GPUs are asked for, but this build has no CUDA");
}

}  // namespace tern::tools
