// SPDX-License-Identifier: Apache-2.0
#include "kernels/node_route.h"

#include <algorithm>

#include "kernels/host_steps.cuh"
#include "kernels/shared_memory.h"

namespace tern::kernels {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / kWarpThreads;
constexpr int64_t kMostBlocks = 32;  // that share the work of a kernel

__device__ int64_t thread_of_all() { return int64_t{blockIdx.x} * kThreads + threadIdx.x; }
__device__ int64_t num_all_threads() { return int64_t{gridDim.x} * kThreads; }

// ---- Numbering: a block walks over the tokens in order, and adds up how many before each have a slot, and how many entries.

struct ScanShared {
  int32_t tokens[kWarps], entries[kWarps];
};

struct Position {
  int32_t tokens, entries;
};

// All threads of the block: what those before this one have, on top of `before`, which becomes what all have.
__device__ Position scan(ScanShared& shared, Position own, Position& before) {
  Position up_to = own;
#pragma unroll
  for (int step = 1; step < kWarpThreads; step *= 2) {
    const int32_t tokens = __shfl_up_sync(~0u, up_to.tokens, step), entries = __shfl_up_sync(~0u, up_to.entries, step);
    if (static_cast<int>(device::lane_idx()) < step) continue;
    up_to.tokens += tokens;
    up_to.entries += entries;
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarpThreads;
  if (device::lane_idx() == kWarpThreads - 1) {
    shared.tokens[warp] = up_to.tokens;
    shared.entries[warp] = up_to.entries;
  }
  __syncthreads();
  Position result{before.tokens + up_to.tokens - own.tokens, before.entries + up_to.entries - own.entries};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    before.tokens += shared.tokens[w];
    before.entries += shared.entries[w];
    if (w >= warp) continue;
    result.tokens += shared.tokens[w];
    result.entries += shared.entries[w];
  }
  __syncthreads();
  return result;
}

// Where chunks or rounds begin, among tokens with a slot or among entries: [num_parts + 1] each, nullptr: not wanted.
struct PartBegins {
  int64_t tokens_per_part;
  int32_t num_parts;
  int32_t* begins;
  int32_t* reported;
};
constexpr int kEnds = layout::kMaxChunks + 1;

// By the thread that has the token: how many there were before it if a part begins with it, and behind the last token how many there are.
__device__ void set_begins(const PartBegins& parts, int64_t token, int64_t max_tokens, int32_t own, int32_t before) {
  const auto set = [&](int64_t part, int32_t value) {
    if (parts.begins != nullptr) parts.begins[part] = value;
    if (parts.reported != nullptr) parts.reported[part] = value;
  };
  if (token % parts.tokens_per_part == 0) set(token / parts.tokens_per_part, before);
  if (token + 1 == max_tokens)
    for (int64_t part = token / parts.tokens_per_part + 1; part <= parts.num_parts; ++part) set(part, before + own);
}

// The same for the chunks of a batch that is in this node.
__device__ void set_begins_here(const NodeRouteArgs& args, int32_t node, int64_t token, const Position& own, const Position& before) {
  const PlanView& plan = args.plan;
  set_begins({plan.tokens_per_chunk, plan.num_chunks, args.rails.here_begin + node * kEnds, args.report.here_begin + node * kEnds}, token,
             plan.max_tokens, own.tokens, before.tokens);
  set_begins(
      {plan.tokens_per_chunk, plan.num_chunks, args.rails.entries_here_begin + node * kEnds, args.report.entries_here_begin + node * kEnds},
      token, plan.max_tokens, own.entries, before.entries);
}

// What this rank's tokens have in one node.
class OwnTokens {
 public:
  __device__ OwnTokens(const NodeRouteArgs& args, int32_t node, int32_t* counters)
      : args_(args),
        plan_(args.plan),
        node_(node),
        first_expert_(node * plan_.num_experts),
        first_rank_(node * args.exchange.num_ranks),
        counters_(counters),
        num_tokens_(args.device_num_tokens == nullptr ? args.num_tokens : max(0, min(*args.device_num_tokens, args.num_tokens))) {}

  __device__ int32_t num_tokens() const { return num_tokens_; }
  __device__ bool has_invalid() const { return has_invalid_; }

  // Counts its entries and messages. Of the own node, writes them down as what the batch's route begins with.
  __device__ Position count(int64_t token) {
    Position found{0, 0};
    if (token >= num_tokens_) return found;
    constexpr int kRanks = 64;
    for (int32_t first = 0; first < args_.exchange.num_ranks; first += kRanks) {
      uint64_t ranks = 0;
      if (plan_.num_topk == 0)
        ranks = ranks_given(token, first, min(kRanks, args_.exchange.num_ranks - first));
      else
        ranks = ranks_of_entries(token, first, kRanks, found.entries);
      if (ranks != 0) found.tokens = 1;
      for (; ranks != 0; ranks &= ranks - 1) atomicAdd(counters_ + plan_.num_experts + first + __ffsll(static_cast<int64_t>(ranks)) - 1, 1);
    }
    return found;
  }

  // Slots of the token's entries in this node, from `slot` on.
  __device__ void number_entries(int64_t token, int32_t slot) const {
    for_each_number(token, [&](int k, int64_t number) {
      const int64_t entry = token * plan_.num_topk + k;
      const int32_t expert = usable_expert(number);
      const bool here = is_here(expert);
      if (is_own()) {
        const int64_t of_batch = node_ * plan_.max_tokens * plan_.num_topk + entry;
        args_.rails.experts[of_batch] = here ? expert - first_expert_ : -1;
        args_.rails.entries_here[of_batch] = here ? slot : -1;
      }
      if (here || (expert < 0 && is_own())) {
        args_.rails.node_of_entry[entry] = here ? node_ : -1;
        args_.rails.entries_there[entry] = here ? slot : -1;
      }
      slot += here ? 1 : 0;
    });
  }

  // The token, and where it goes in this node: what the node's ranks are told.
  __device__ void put_words(int64_t token, int32_t* words) const {
    words[0] = static_cast<int32_t>(token);
    for_each_number(token, [&](int k, int64_t number) {
      const int32_t expert = usable_expert(number);
      words[1 + k] = is_here(expert) ? expert : -1;
    });
    for (int w = 0; plan_.num_topk == 0 && 1 + w < args_.slots.layout.num_routing_words; ++w) {
      uint32_t bits = 0;
      for (int b = 0; b < 32 && 32 * w + b < args_.exchange.num_ranks; ++b) bits |= goes_to(token, first_rank_ + 32 * w + b) ? 1u << b : 0u;
      words[1 + w] = static_cast<int32_t>(bits);
    }
  }

 private:
  __device__ bool is_own() const { return node_ == args_.rails.own_node; }
  __device__ bool is_here(int32_t expert) const { return expert >= first_expert_ && expert < first_expert_ + plan_.num_experts; }
  __device__ int64_t given(int64_t entry) const {
    return args_.is_int32 ? static_cast<const int32_t*>(args_.topk_idx)[entry] : static_cast<const int64_t*>(args_.topk_idx)[entry];
  }
  // -1 for entries to ranks that are not reached, and for numbers that are no expert.
  __device__ int32_t usable_expert(int64_t number) const {
    if (number < 0 || number >= args_.num_group_experts()) return -1;
    const auto expert = static_cast<int32_t>(number);
    return args_.reaches(expert / plan_.local_experts) ? expert : -1;
  }
  // Calls visit(k, number) for the token's entries in order, which are -1 beyond the last token; several are asked for at a time.
  template <typename Visit>
  __device__ void for_each_number(int64_t token, Visit visit) const {
    constexpr int kAtOnce = 8;
#pragma unroll 1
    for (int k = 0; k < plan_.num_topk;) {
      int64_t numbers[kAtOnce];
#pragma unroll
      for (int u = 0; u < kAtOnce; ++u)
        numbers[u] = token < num_tokens_ && k + u < plan_.num_topk ? given(token * plan_.num_topk + k + u) : -1;
#pragma unroll 1
      for (int u = 0; u < kAtOnce && k < plan_.num_topk; ++u, ++k) {
        visit(k, numbers[0]);
#pragma unroll
        for (int next = 1; next < kAtOnce; ++next) numbers[next - 1] = numbers[next];
      }
    }
  }

  __device__ uint64_t ranks_of_entries(int64_t token, int32_t first, int num, int32_t& num_entries) {
    uint64_t ranks = 0;
    for_each_number(token, [&](int, int64_t number) {
      has_invalid_ = has_invalid_ || number < -1 || number >= args_.num_group_experts();
      const int32_t expert = usable_expert(number);
      if (!is_here(expert)) return;
      const int32_t rank = (expert - first_expert_) / plan_.local_experts - first;
      if (first == 0) {
        ++num_entries;
        atomicAdd(counters_ + expert - first_expert_, 1);
      }
      if (rank >= 0 && rank < num) ranks |= uint64_t{1} << rank;
    });
    return ranks;
  }
  __device__ bool goes_to(int64_t token, int32_t rank) const {
    return args_.token_in_rank[token * args_.num_group_ranks() + rank] != 0 && args_.reaches(rank);
  }
  __device__ uint64_t ranks_given(int64_t token, int32_t first, int num) const {
    uint64_t ranks = 0;
    for (int i = 0; i < num; ++i) {
      const bool goes = goes_to(token, first_rank_ + first + i);
      if (goes) ranks |= uint64_t{1} << i;
      if (is_own()) args_.route.token_in_rank[(node_ * plan_.max_tokens + token) * args_.exchange.num_ranks + first + i] = goes ? 1 : 0;
    }
    return ranks;
  }

  const NodeRouteArgs& args_;
  const PlanView& plan_;
  const int32_t node_, first_expert_, first_rank_;
  int32_t* const counters_;
  const int32_t num_tokens_;
  bool has_invalid_ = false;
};

// This rank's tokens in a node, by a block.
__device__ void number_own(const NodeRouteArgs& args, const Operation& op, OwnTokens& tokens, int32_t node, int32_t* counters) {
  __shared__ ScanShared scanned;
  const PlanView& plan = args.plan;
  const RailTables& rails = args.rails;
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const int32_t num_ranks = args.exchange.num_ranks;
  const bool is_own = node == rails.own_node;
  for (int32_t c = thread; c < plan.num_experts + num_ranks; c += kThreads) counters[c] = 0;
  __syncthreads();
  Position before{0, 0};
  for (int64_t first = 0; first < plan.max_tokens; first += kThreads) {
    const int64_t token = first + thread;
    const Position own = token < plan.max_tokens ? tokens.count(token) : Position{0, 0};
    const Position at = scan(scanned, own, before);
    if (token >= plan.max_tokens) continue;
    const int32_t slot = own.tokens != 0 ? at.tokens : -1;
    rails.there[node * plan.max_tokens + token] = slot;
    if (is_own) rails.here[node * plan.max_tokens + token] = slot;
    tokens.number_entries(token, at.entries);
    set_begins({plan.tokens_per_chunk, plan.num_chunks, rails.there_begin + node * kEnds, args.report.there_begin + node * kEnds}, token,
               plan.max_tokens, own.tokens, at.tokens);
    set_begins({args.tokens_per_round, args.num_rounds, nullptr, args.report.round_begin + node * (args.num_rounds + 1)}, token,
               plan.max_tokens, own.tokens, at.tokens);
    set_begins({plan.tokens_per_chunk, plan.num_chunks, rails.entries_there_begin + node * kEnds, nullptr}, token, plan.max_tokens,
               own.entries, at.entries);
    if (is_own) set_begins_here(args, node, token, own, at);
  }
  __syncthreads();
  if (tokens.has_invalid() && is_own) op.post_notice(TERN_INVALID_ARGUMENT);
  for (int32_t e = thread; e < plan.num_experts; e += kThreads) {
    int32_t num = counters[e];
    if (plan.num_topk == 0) num = args.tokens_per_expert == nullptr ? 0 : args.tokens_per_expert[node * plan.num_experts + e];
    if (plan.num_topk == 0 && is_own) args.route.given_entries[node * plan.num_experts + e] = num;
    args.report.entries[node * plan.num_experts + e] = num;
  }
  for (int32_t r = thread; r < num_ranks; r += kThreads) args.report.messages[node * num_ranks + r] = counters[plan.num_experts + r];
  if (!is_own || thread != 0) return;
  *args.report.num_tokens = args.route.batch_tokens[node] = tokens.num_tokens();
  plan.num_tokens[plan.first_source + args.exchange.rank] = tokens.num_tokens();  // for who packs before the batch is routed
}

// The tokens of another node's batch, by a block. That of the own node is numbered already.
__device__ void number_batch(const NodeRouteArgs& args, int32_t node, int32_t num_tokens) {
  __shared__ ScanShared scanned;
  const PlanView& plan = args.plan;
  const RailTables& rails = args.rails;
  const int64_t first_token = node * plan.max_tokens;
  Position before{0, 0};
  for (int64_t first = 0; first < plan.max_tokens; first += kThreads) {
    const int64_t token = first + threadIdx.x;
    Position own{0, 0};
    for (int k = 0; k < plan.num_topk && token < num_tokens; ++k)
      own.entries += rails.experts[(first_token + token) * plan.num_topk + k] >= 0 ? 1 : 0;
    for (int r = 0; plan.num_topk == 0 && r < args.exchange.num_ranks && token < num_tokens; ++r)
      if (args.route.token_in_rank[(first_token + token) * args.exchange.num_ranks + r] != 0) own.tokens = 1;
    if (own.entries > 0) own.tokens = 1;
    const Position at = scan(scanned, own, before);
    if (token >= plan.max_tokens) continue;
    rails.here[first_token + token] = own.tokens != 0 ? at.tokens : -1;
    int32_t slot = at.entries;
    for (int k = 0; k < plan.num_topk; ++k) {
      const int64_t entry = (first_token + token) * plan.num_topk + k;
      const bool here = token < num_tokens && rails.experts[entry] >= 0;
      rails.entries_here[entry] = here ? slot++ : -1;
    }
    set_begins_here(args, node, token, own, at);
  }
}

// ---- Over the rail

// Those of the round that go to another node, by a block: a thread takes one after the other.
__device__ void put_tokens(const NodeRouteArgs& args, const OwnTokens& tokens, int32_t node) {
  const int64_t begin = args.round * args.tokens_per_round, end = min(begin + args.tokens_per_round, args.plan.max_tokens);
  const int32_t first_slot = args.round == 0 ? 0 : args.report.round_begin[node * (args.num_rounds + 1) + args.round];
  for (int64_t token = begin + threadIdx.x; token < end; token += kThreads) {
    const int32_t slot = args.rails.there[node * args.plan.max_tokens + token];
    if (slot < 0) continue;
    tokens.put_words(token, reinterpret_cast<int32_t*>(args.slots.nth(node, slot - first_slot) + args.slots.layout.words()));
  }
}

// Block n: node n. In the first round this rank's tokens are numbered while the host waits for room.
__global__ void __launch_bounds__(kThreads) give_kernel(const __grid_constant__ NodeRouteArgs args) {
  extern __shared__ __align__(16) int32_t shared[];
  const Operation op{args.exchange, TERN_OP_ROUTE, 0};
  if (op.is_poisoned()) return;
  const HostTalker host(op, args.steps);
  const auto node = static_cast<int32_t>(blockIdx.x);
  OwnTokens tokens(args, node, shared);
  host.ask_first();
  if (args.round == 0) number_own(args, op, tokens, node, shared);
  if (!host.await()) return;
  if (node != args.rails.own_node) put_tokens(args, tokens, node);
  host.finish();
}

// Nothing is known of a batch yet, by a block.
__device__ void clear_batch(const NodeRouteArgs& args, int32_t node) {
  const PlanView& plan = args.plan;
  const int64_t first_token = node * plan.max_tokens;
  for (int64_t i = threadIdx.x; i < plan.max_tokens * plan.num_topk; i += kThreads)
    args.rails.experts[first_token * plan.num_topk + i] = -1;
  for (int64_t i = threadIdx.x; plan.num_topk == 0 && i < plan.max_tokens * args.exchange.num_ranks; i += kThreads)
    args.route.token_in_rank[first_token * args.exchange.num_ranks + i] = 0;
  __syncthreads();
}

// What has come from a node in the round, by a block. Returns the tokens of the batch in all rounds.
__device__ int32_t take_tokens(const NodeRouteArgs& args, int32_t node) {
  const PlanView& plan = args.plan;
  const int32_t num_ranks = args.exchange.num_ranks, first_expert = args.rails.own_node * plan.num_experts;
  const std::byte* const head = args.heads.bank(node);
  const auto* counts = reinterpret_cast<const int32_t*>(head + args.counts_at);
  for (int32_t e = static_cast<int32_t>(threadIdx.x); plan.num_topk == 0 && e < plan.num_experts; e += kThreads)
    args.route.given_entries[node * plan.num_experts + e] = counts[e];
  // Each load is a trip over PCIe, so what can be is asked for together: a thread takes an entry, or what a token says of a rank.
  const int32_t num_tokens = counts[plan.num_experts + args.num_group_ranks()];
  const int32_t num_slots = reinterpret_cast<const layout::RailHeader*>(head)->num_slots;
  const int32_t num_items = plan.num_topk > 0 ? plan.num_topk : num_ranks;
  for (int64_t i = threadIdx.x; i < int64_t{num_slots} * num_items; i += kThreads) {
    const auto item = static_cast<int32_t>(i % num_items);
    const auto* words = reinterpret_cast<const int32_t*>(args.slots.nth(node, i / num_items) + args.slots.layout.words());
    const int32_t word = words[plan.num_topk > 0 ? 1 + item : 1 + item / 32];
    const int64_t at = (node * plan.max_tokens + words[0]) * num_items + item;
    if (plan.num_topk > 0)
      args.rails.experts[at] = word < 0 ? -1 : word - first_expert;
    else
      args.route.token_in_rank[at] = static_cast<uint8_t>(static_cast<uint32_t>(word) >> (item % 32) & 1);
  }
  __syncthreads();
  return num_tokens;
}

// Block n: node n. The tokens of its batch are numbered when the last round has come.
__global__ void __launch_bounds__(kThreads) take_kernel(const __grid_constant__ NodeRouteArgs args) {
  const Operation op{args.exchange, TERN_OP_ROUTE, 0};
  if (op.is_poisoned()) return;
  const HostTalker host(op, args.steps);
  const auto node = static_cast<int32_t>(blockIdx.x);
  const bool is_own = node == args.rails.own_node;
  const bool comes = !is_own && args.reaches(node * args.exchange.num_ranks + args.exchange.rank);
  host.ask_first();
  if (args.round == 0 && !is_own) clear_batch(args, node);
  if (!host.await()) return;
  const int32_t num_tokens = comes && !host.absent_nodes().has(node) ? take_tokens(args, node) : 0;
  if (args.round + 1 == args.num_rounds && !is_own) {
    if (threadIdx.x == 0) {
      args.route.batch_tokens[node] = num_tokens;
      args.plan.num_tokens[node * args.exchange.num_ranks + args.exchange.rank] = num_tokens;  // for who routes all batches at once
    }
    number_batch(args, node, num_tokens);
  }
  host.finish();
}

// ---- Rows of all batches

class Settle {
 public:
  __device__ explicit Settle(const NodeRouteArgs& args)
      : args_(args), plan_(args.plan), num_ranks_(args.exchange.num_ranks), group_rows_(args.batch_group_rows()) {}

  __device__ void run(int32_t node) const {
    settle_received(node);
    const int64_t first_token = node * plan_.max_tokens, num_tokens = args_.route.batch_tokens[node];
    if (!plan_.has_expert_rows()) return settle_messages(node, first_token, num_tokens);
    for (int64_t i = thread_of_all(); i < num_tokens * plan_.num_topk; i += num_all_threads()) {
      const int64_t entry = first_token * plan_.num_topk + i;
      const int32_t expert = args_.rails.experts[entry];
      if (expert < 0) continue;
      const int32_t local = expert % plan_.local_experts;
      args_.rails.entry_rows[entry] = row_of(node, expert, local, args_.rails.entry_rows[entry]);
    }
  }

 private:
  // The messages of a batch follow each other among all that have come.
  __device__ void settle_received(int32_t node) const {
    const int32_t* const received_begin = args_.route.received_begin + node * (num_ranks_ + 1);
    const int32_t num = received_begin[num_ranks_], to = plan_.received_begin[node * num_ranks_];
    const int64_t from = node * args_.batch_messages();
    for (int64_t m = thread_of_all(); m < num; m += num_all_threads()) plan_.source_token[to + m] = args_.route.source_token[from + m];
    for (int64_t i = thread_of_all(); i < int64_t{num} * plan_.topk_stride; i += num_all_threads()) {
      const int64_t at = from * plan_.topk_stride + i, message = to + i / plan_.topk_stride;
      const int32_t local = args_.route.received_experts[at];
      int32_t row = -1;
      if (local >= 0 && plan_.has_expert_rows())
        row = row_of(node, args_.exchange.rank * plan_.local_experts + local, local, args_.route.received_rows[at]);
      else if (local >= 0 && message < plan_.row_capacity)
        row = static_cast<int32_t>(message);
      plan_.received_experts[int64_t{to} * plan_.topk_stride + i] = local;
      plan_.received_rows[int64_t{to} * plan_.topk_stride + i] = row;
    }
  }

  __device__ void settle_messages(int32_t node, int64_t first_token, int64_t num_tokens) const {
    for (int64_t i = thread_of_all(); i < num_tokens * plan_.messages_per_token; i += num_all_threads()) {
      MessageRef& message = args_.rails.messages[first_token * plan_.messages_per_token + i];
      if (message.rank < 0) continue;
      const int64_t row = args_.route.row_begins[node * num_ranks_ + message.rank] + message.row;
      message.row = row < plan_.row_capacity ? static_cast<int32_t>(row) : -1;
    }
  }

  // `row`: in the batch alone, whose groups have group_rows_ each.
  __device__ int32_t row_of(int32_t node, int32_t expert, int32_t local, int32_t row_in_batch) const {
    const int64_t row = args_.route.row_begins[node * plan_.num_experts + expert] + row_in_batch - local * group_rows_;
    if (plan_.layout == TERN_LAYOUT_EXPERT_PADDED && row >= (local + int64_t{1}) * plan_.padded_group_rows) return -1;
    return row < plan_.row_capacity ? static_cast<int32_t>(row) : -1;
  }

  const NodeRouteArgs& args_;
  const PlanView& plan_;
  const int32_t num_ranks_;
  const int64_t group_rows_;
};

__global__ void __launch_bounds__(kThreads) settle_kernel(const __grid_constant__ NodeRouteArgs args) {
  if (Operation{args.exchange, TERN_OP_ROUTE, 0}.is_poisoned()) return;
  const Settle settle(args);
  for (int32_t node = 0; node < args.rails.num_nodes; ++node) settle.run(node);
}

int blocks_for(int64_t num_items) { return static_cast<int>(std::clamp<int64_t>((num_items + kThreads - 1) / kThreads, 1, kMostBlocks)); }

int64_t counter_bytes(const NodeRouteArgs& args) {
  return (int64_t{args.plan.num_experts} + args.exchange.num_ranks) * static_cast<int64_t>(sizeof(int32_t));
}

}  // namespace

cudaError_t prepare_node_route() {
  cudaError_t error = allow_shared(give_kernel, kMostNodeCounters * static_cast<int64_t>(sizeof(int32_t)));
  if (error == cudaSuccess) error = allow_shared(take_kernel, 0);
  if (error == cudaSuccess) error = allow_shared(settle_kernel, 0);
  return error;
}

cudaError_t launch_give(const NodeRouteArgs& args, cudaStream_t stream) {
  return launch(give_kernel, {args.rails.num_nodes, kThreads, counter_bytes(args), false}, stream, args);
}
cudaError_t launch_take(const NodeRouteArgs& args, cudaStream_t stream) {
  return launch(take_kernel, {args.rails.num_nodes, kThreads, 0, false}, stream, args);
}
cudaError_t launch_settle(const NodeRouteArgs& args, cudaStream_t stream) {
  return launch(settle_kernel, {blocks_for(args.batch_messages() * args.plan.topk_stride), kThreads, 0, false}, stream, args);
}

}  // namespace tern::kernels
