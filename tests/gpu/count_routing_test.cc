// SPDX-License-Identifier: Apache-2.0
// The kernel that counts a routing, against the host's loops.
#include "plan/count_routing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "cuda/buffers.h"
#include "gpu/gpus.h"
#include "kernels/count_routing.h"
#include "unit/test_ranks.h"

namespace tern::cuda {
namespace {

using namespace test;

struct Shape {
  int32_t num_ranks, num_nodes, num_experts, num_topk;
  int64_t num_tokens;
};

struct Counts {
  explicit Counts(const Shape& s)
      : per_rank(s.num_ranks, -1), per_node(s.num_nodes, -1), per_expert(s.num_experts, -1), in_rank(s.num_tokens * s.num_ranks, 7) {}
  tern_routing_counts pointers() {
    tern_routing_counts counts;
    counts.tokens_per_rank = per_rank.data();
    counts.tokens_per_node = per_node.data();
    counts.tokens_per_expert = per_expert.data();
    counts.token_in_rank = in_rank.data();
    return counts;
  }
  bool operator==(const Counts&) const = default;

  std::vector<int32_t> per_rank, per_node, per_expert;
  std::vector<uint8_t> in_rank;
};

// In pinned memory the GPU reads and writes what the host does.
template <typename T>
PinnedBuffer<T> pinned(const std::vector<T>& values) {
  PinnedBuffer<T> buffer(0, std::max<size_t>(1, values.size()));
  std::copy(values.begin(), values.end(), buffer.data());
  return buffer;
}

Counts counted_by_gpu(const Shape& s, const std::vector<int64_t>& topk_idx, const std::vector<uint8_t>& in_rank, bool is_int32) {
  const auto wide = pinned(topk_idx);
  const auto narrow = pinned(std::vector<int32_t>(topk_idx.begin(), topk_idx.end()));
  const auto given = pinned(in_rank);
  Counts counts(s);
  const auto per_rank = pinned(std::vector<int32_t>(counts.per_rank.size()));
  const auto per_node = pinned(std::vector<int32_t>(counts.per_node.size()));
  const auto per_expert = pinned(std::vector<int32_t>(counts.per_expert.size()));
  const auto goes = pinned(counts.in_rank);
  const Stream stream(0);
  const kernels::CountRoutingArgs args{.topk_idx = is_int32 ? static_cast<const void*>(narrow.data()) : wide.data(),
                                       .given_in_rank = s.num_topk == 0 ? given.data() : nullptr,
                                       .is_int32 = is_int32,
                                       .num_topk = s.num_topk,
                                       .num_tokens = s.num_tokens,
                                       .num_ranks = s.num_ranks,
                                       .ranks_per_node = s.num_ranks / s.num_nodes,
                                       .num_experts = s.num_experts,
                                       .tokens_per_rank = per_rank.data(),
                                       .tokens_per_node = per_node.data(),
                                       .tokens_per_expert = per_expert.data(),
                                       .token_in_rank = goes.data()};
  check(kernels::launch_count_routing(args, stream.get()), "counting a routing");
  stream.wait(ample(), "counting a routing");
  std::copy_n(per_rank.data(), counts.per_rank.size(), counts.per_rank.begin());
  std::copy_n(per_node.data(), counts.per_node.size(), counts.per_node.begin());
  std::copy_n(per_expert.data(), counts.per_expert.size(), counts.per_expert.begin());
  std::copy_n(goes.data(), counts.in_rank.size(), counts.in_rank.begin());
  return counts;
}

void expect_as_the_host_counts(const Shape& s) {
  std::mt19937 random(7);
  std::vector<int64_t> topk_idx(s.num_tokens * s.num_topk);
  for (int64_t& expert : topk_idx) expert = static_cast<int64_t>(random() % (s.num_experts + 1u)) - 1;
  std::vector<uint8_t> in_rank(s.num_topk == 0 ? s.num_tokens * s.num_ranks : 0);
  for (uint8_t& goes : in_rank) goes = random() % 2 == 0 ? 0 : 1;
  const PlanShape shape{.num_ranks = s.num_ranks,
                        .num_nodes = s.num_nodes,
                        .max_tokens = std::max<int64_t>(1, s.num_tokens),
                        .num_experts = s.num_experts,
                        .num_topk = s.num_topk};
  tern_routing routing;
  routing.num_tokens = s.num_tokens;
  if (s.num_topk > 0)
    routing.topk_idx = topk_idx.data();
  else
    routing.token_in_rank = in_rank.data();
  Counts wanted(s);
  count_routing(shape, routing, wanted.pointers());
  for (const bool is_int32 : {false, true})
    require(
        counted_by_gpu(s, topk_idx, in_rank, is_int32) == wanted,
        fmt::format("{} ranks, {} experts, {} tokens, {} indices", s.num_ranks, s.num_experts, s.num_tokens, is_int32 ? "int32" : "int64"));
}

TEST(CountRouting, AsTheHostCounts) {
  if (num_gpus() < 1) GTEST_SKIP() << too_few_gpus(1);
  expect_all_done(run_ranks(1, [](RankSeat&) {
    const DeviceGuard guard(0);
    check(kernels::prepare_count_routing(), "loading the kernel");
    // 40000 counters do not fit a block's shared memory.
    for (const Shape& s : {Shape{1, 1, 1, 1, 1}, Shape{4, 1, 256, 8, 4096}, Shape{8, 2, 64, 64, 333}, Shape{64, 8, 512, 10, 20000},
                           Shape{4, 4, 40000, 6, 1000}, Shape{3, 1, 6, 0, 500}, Shape{2, 1, 8, 4, 0}})
      expect_as_the_host_counts(s);
  }));
}

}  // namespace
}  // namespace tern::cuda
