// SPDX-License-Identifier: Apache-2.0
#include "cuda/plan_memory.h"

#include <algorithm>

namespace tern::cuda {
namespace {

// Places tables one after the other; with no memory it only measures.
class Placer {
 public:
  explicit Placer(std::byte* memory) : memory_(memory) {}
  template <typename T>
  void place(T*& table, int64_t size) {
    table = memory_ == nullptr ? nullptr : reinterpret_cast<T*>(memory_ + num_bytes_);
    num_bytes_ += layout::align_up(size * static_cast<int64_t>(sizeof(T)), 256);
  }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  std::byte* memory_;
  int64_t num_bytes_ = 0;
};

void set_sizes(const PlanShape& shape, kernels::PlanView& v) {
  constexpr int32_t kTopkGranule = 4;  // rows of tables are loaded 16 bytes at a time
  v.max_tokens = shape.max_tokens;
  v.num_sources = shape.num_ranks;
  v.first_source = shape.first_rank();
  v.num_experts = shape.node_experts();
  v.local_experts = shape.local_experts();
  v.num_topk = shape.num_topk;
  v.topk_stride = static_cast<int32_t>(layout::align_up(shape.num_topk, kTopkGranule));
  v.messages_per_token = shape.max_messages_per_token();
  v.tokens_per_chunk = static_cast<int32_t>((shape.max_tokens + layout::kMaxChunks - 1) / layout::kMaxChunks);
  v.num_chunks = static_cast<int32_t>((shape.max_tokens + v.tokens_per_chunk - 1) / v.tokens_per_chunk);
  v.layout = shape.layout;
  v.alignment = shape.alignment;
  v.row_capacity = shape.row_capacity;
  v.padded_group_rows = shape.padded_group_rows();
}

void place_rail_tables(const PlanShape& shape, const kernels::PlanView& v, Placer& p, kernels::RailTables& r) {
  const int64_t num_nodes = shape.num_nodes, batches = num_nodes * shape.max_tokens, chunk_ends = num_nodes * (layout::kMaxChunks + 1);
  r.num_nodes = shape.num_nodes;
  r.own_node = shape.node();
  p.place(r.experts, batches * shape.num_topk);
  p.place(r.entry_rows, batches * shape.num_topk);
  p.place(r.messages, batches * v.messages_per_token);
  p.place(r.here, batches);
  p.place(r.here_begin, chunk_ends);
  p.place(r.entries_here, batches * shape.num_topk);
  p.place(r.entries_here_begin, chunk_ends);
  p.place(r.node_of_entry, shape.max_tokens * shape.num_topk);
  p.place(r.there, batches);
  p.place(r.there_begin, chunk_ends);
  p.place(r.entries_there, shape.max_tokens * shape.num_topk);
  p.place(r.entries_there_begin, chunk_ends);
  p.place(r.owner_weights, batches * shape.num_topk);
}

void place_route_tables(const PlanShape& shape, const kernels::PlanView& v, Placer& p, kernels::NodeRouteTables& r) {
  const int64_t num_nodes = shape.num_nodes, messages = num_nodes * shape.ranks_per_node() * shape.max_tokens;
  p.place(r.batch_tokens, num_nodes);
  p.place(r.token_in_rank, shape.num_topk == 0 ? messages : 0);
  p.place(r.given_entries, shape.num_experts);
  p.place(r.received_begin, num_nodes * (shape.ranks_per_node() + 1));
  p.place(r.source_token, messages);
  p.place(r.received_experts, messages * v.topk_stride);
  p.place(r.received_rows, messages * v.topk_stride);
  p.place(r.group_begin, v.local_experts + 1);
  p.place(r.source_begin, int64_t{v.local_experts} * shape.ranks_per_node());
}

}  // namespace

PlacedTables::PlacedTables(const PlanShape& shape, std::byte* memory) {
  kernels::PlanView& v = plan;
  set_sizes(shape, v);
  const int64_t num_entries = shape.max_tokens * shape.num_topk, num_received = shape.max_messages() * v.topk_stride;
  Placer p(memory);
  p.place(v.received_begin, shape.num_ranks + 1);
  p.place(v.group_begin, v.local_experts + 1);
  p.place(v.source_begin, int64_t{v.local_experts} * shape.num_ranks);
  if (shape.num_nodes > 1) p.place(route.row_begins, shape.num_nodes * int64_t{shape.num_row_begins()});
  told_bytes = p.num_bytes();
  p.place(v.num_tokens, shape.num_ranks);
  p.place(v.counts, int64_t{shape.num_ranks} * v.num_counts(shape.ranks_per_node()));
  p.place(v.chunk_begin, int64_t{shape.num_ranks} * (layout::kMaxChunks + 1));
  p.place(v.source_token, shape.max_messages());
  p.place(v.received_experts, num_received);
  p.place(v.received_rows, num_received);
  if (shape.num_nodes > 1) {
    place_rail_tables(shape, v, p, rails);
    place_route_tables(shape, v, p, route);
  } else {
    p.place(v.experts, num_entries);
    p.place(v.entry_rows, num_entries);
    p.place(v.messages, shape.max_tokens * v.messages_per_token);
  }
  p.place(v.weights_sent, num_entries);
  p.place(v.weights_received, num_received);
  p.place(v.weights_from_owner, num_received);
  p.place(v.dispatch_ticket, 1);
  p.place(v.combine_ticket, 1);
  total_bytes = p.num_bytes();
}

PlacedReport::PlacedReport(const PlanShape& shape, int64_t num_rounds, std::byte* memory) {
  const int64_t chunk_ends = shape.num_nodes * int64_t{layout::kMaxChunks + 1};
  Placer p(memory);
  p.place(report.entries, shape.num_experts);
  p.place(report.messages, shape.num_ranks);
  p.place(report.num_tokens, 1);
  p.place(report.round_begin, shape.num_nodes * (num_rounds + 1));
  p.place(report.there_begin, chunk_ends);
  p.place(report.here_begin, chunk_ends);
  p.place(report.entries_here_begin, chunk_ends);
  total_bytes = p.num_bytes();
}

PlanTables::PlanTables(const std::shared_ptr<DevicePool>& pool, const PlanShape& shape)
    : memory_(pool, static_cast<size_t>(PlacedTables(shape, nullptr).total_bytes)), placed_(shape, memory_.data()) {}

PlanMemory::PlanMemory(const std::shared_ptr<DevicePool>& pool, const PlanShape& shape, int32_t num_lanes) : tables(pool, shape) {
  for (int32_t i = 0; i < num_lanes; ++i) ends.push_back(std::make_shared<Event>(pool->device()));
  size_t elements = 0;
  for (int32_t num_blocks = 1; num_blocks <= kernels::kMostRouteBlocks; ++num_blocks) {
    const kernels::RouteMemory memory(tables.view(), shape.ranks_per_node(), num_blocks);
    if (!memory.fits_shared()) elements = std::max(elements, static_cast<size_t>(num_blocks) * static_cast<size_t>(memory.size));
  }
  if (elements > 0) workspace = {pool, elements};
  if (shape.extent == TERN_EXTENT_EXACT && shape.num_nodes == 1) {
    const auto of_a_source = static_cast<size_t>(shape.local_experts() + shape.num_ranks + 1);
    host_counts = {pool->device(), static_cast<size_t>(shape.num_ranks) * of_a_source};
  }
}

bool PlanMemory::is_idle() const {
  return std::all_of(ends.begin(), ends.end(), [](const std::shared_ptr<Event>& end) { return end->passed(); });
}

}  // namespace tern::cuda
