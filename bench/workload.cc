// SPDX-License-Identifier: Apache-2.0
#include "bench/workload.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>

#include "base/numeric.h"

namespace tern::bench {
namespace {

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// Which row: of a token as its rank has it, or of what rank `expert_rank` makes of it.
struct RowName {
  int source;
  int64_t token;
  int expert_rank = -1;
};

// Random bf16 numbers with magnitudes from 2^-7 to 2.
void make_row(const Shape& shape, const RowName& name, std::byte* row) {
  const uint64_t seed = mix(shape.seed ^ mix(static_cast<uint64_t>(name.token) << 16 ^ static_cast<uint64_t>(name.source) << 8 ^
                                             static_cast<uint64_t>(name.expert_rank + 1)));
  for (int64_t at = 0; at < shape.row_bytes(); at += 8) {
    const uint64_t four = (mix(seed + static_cast<uint64_t>(at)) & 0x83ff83ff83ff83ff) | 0x3c003c003c003c00;
    std::memcpy(row + at, &four, std::min<size_t>(sizeof(four), static_cast<size_t>(shape.row_bytes() - at)));
  }
}

// `num` different numbers below `bound`, each choice equally likely (Floyd's sampling).
template <typename Random>
void sample(int num, int bound, Random& random, int64_t* out) {
  for (int i = 0; i < num; ++i) {
    const int last = bound - num + i;
    const int64_t candidate = std::uniform_int_distribution<int>(0, last)(random);
    out[i] = std::find(out, out + i, candidate) == out + i ? candidate : last;
  }
}

}  // namespace

std::shared_ptr<Segment> make_private_memory(int64_t num_bytes) {
  return HostSegment::create(static_cast<size_t>(std::max<int64_t>(num_bytes, 1)), SharedBy::kThreads);
}

Workload::Workload(const Shape& shape, int rank)
    : shape_(shape),
      rank_(rank),
      topk_idx_(index(shape.num_ranks)),
      destinations_(index(shape.num_ranks)),
      num_rows_(index(shape.num_ranks * shape.num_ranks)) {
  for (int source = 0; source < shape.num_ranks; ++source) route(source);
  tokens_ = make_private_memory(shape.num_tokens * shape.row_bytes());
  expert_rows_ = make_private_memory(num_received() * shape.row_bytes());
  for (int64_t token = 0; token < shape.num_tokens; ++token) make_row(shape, {rank, token}, tokens_->data() + token * shape.row_bytes());
  std::byte* row = expert_rows_->data();
  for (int source = 0; source < shape.num_ranks; ++source) {
    for (int64_t token = 0; token < shape.num_tokens; ++token) {
      if ((destinations_[index(source)][index(token)] >> rank & 1) == 0) continue;
      make_row(shape, {source, token, rank}, row);
      row += shape.row_bytes();
    }
  }
}

void Workload::route(int source) {
  std::mt19937_64 random(mix(shape_.seed + static_cast<uint64_t>(source)));
  auto& topk = topk_idx_[index(source)];
  auto& destinations = destinations_[index(source)];
  topk.resize(index(shape_.num_tokens * shape_.num_topk));
  destinations.assign(index(shape_.num_tokens), 0);
  for (int64_t token = 0; token < shape_.num_tokens; ++token) {
    int64_t* experts = topk.data() + token * shape_.num_topk;
    sample(shape_.num_topk, shape_.num_experts, random, experts);
    for (int k = 0; k < shape_.num_topk; ++k) destinations[index(token)] |= uint64_t{1} << shape_.rank_of_expert(experts[k]);
    for_each_rank(destinations[index(token)], [&](int destination) { ++num_rows_[index(source * shape_.num_ranks + destination)]; });
  }
}

int64_t Workload::first_row(int source, int destination) const {
  int64_t result = 0;
  for (int before = 0; before < source; ++before) result += num_rows(before, destination);
  return result;
}

int64_t Workload::num_sent() const {
  const auto own = num_rows_.begin() + rank_ * shape_.num_ranks;
  return std::accumulate(own, own + shape_.num_ranks, int64_t{0});
}

bool Workload::check(Result result, std::span<const std::byte> output) const {
  switch (result) {
    case Result::kDispatched: return check_dispatched(output.data());
    case Result::kReturned: return check_returned(output.data());
    case Result::kCombined: return check_combined(output.data(), 1);
    case Result::kCombinedByNode: return check_combined(output.data(), shape_.num_nodes());
    case Result::kCrossed:
    case Result::kLeaving: return check_crossing(result, output.data());
  }
  return false;
}

bool Workload::goes_to_node(int source, int64_t token, int node) const {
  const uint64_t ranks = ((uint64_t{1} << (shape_.ranks_per_node - 1)) * 2 - 1) << node * shape_.ranks_per_node;
  return (destinations_[index(source)][index(token)] & ranks) != 0;
}

int64_t Workload::num_crossing(int source, int node) const {
  int64_t result = 0;
  for (int64_t token = 0; token < shape_.num_tokens; ++token) result += goes_to_node(source, token, node) ? 1 : 0;
  return result;
}

template <typename Visit>
void Workload::for_each_crossing(Result result, Visit visit) const {
  const int own_node = shape_.node_of(rank_);
  for (int node = 0; node < shape_.num_nodes(); ++node) {
    if (node == own_node) continue;
    const int source = result == Result::kLeaving ? rank_ : node * shape_.ranks_per_node + rank_ % shape_.ranks_per_node;
    for (int64_t token = 0; token < shape_.num_tokens; ++token)
      if (goes_to_node(source, token, result == Result::kLeaving ? node : own_node)) visit(source, token);
  }
}

void Workload::fill_leaving(std::byte* out) const {
  for_each_crossing(Result::kLeaving, [&](int source, int64_t token) {
    make_row(shape_, {source, token}, out);
    out += shape_.row_bytes();
  });
}

bool Workload::check_crossing(Result result, const std::byte* output) const {
  std::vector<std::byte> expected(index(shape_.row_bytes()));
  bool right = true;
  for_each_crossing(result, [&](int source, int64_t token) {
    make_row(shape_, {source, token}, expected.data());
    right = right && std::memcmp(output, expected.data(), expected.size()) == 0;
    output += expected.size();
  });
  return right;
}

// By (source rank, source token).
bool Workload::check_dispatched(const std::byte* output) const {
  std::vector<std::byte> expected(index(shape_.row_bytes()));
  for (int source = 0; source < shape_.num_ranks; ++source) {
    for (int64_t token = 0; token < shape_.num_tokens; ++token) {
      if ((destinations_[index(source)][index(token)] >> rank_ & 1) == 0) continue;
      make_row(shape_, {source, token}, expected.data());
      if (std::memcmp(output, expected.data(), expected.size()) != 0) return false;
      output += expected.size();
    }
  }
  return true;
}

// By (rank of the experts, token).
bool Workload::check_returned(const std::byte* output) const {
  std::vector<std::byte> expected(index(shape_.row_bytes()));
  for (int expert_rank = 0; expert_rank < shape_.num_ranks; ++expert_rank) {
    for (int64_t token = 0; token < shape_.num_tokens; ++token) {
      if ((destinations()[index(token)] >> expert_rank & 1) == 0) continue;
      make_row(shape_, {rank_, token, expert_rank}, expected.data());
      if (std::memcmp(output, expected.data(), expected.size()) != 0) return false;
      output += expected.size();
    }
  }
  return true;
}

// Summed in FP32 in ascending order of ranks, rounded once for each group of ranks, and then in the order of the groups.
bool Workload::check_combined(const std::byte* output, int num_groups) const {
  std::vector<uint16_t> row(index(shape_.hidden));
  std::vector<float> sum(index(shape_.hidden)), of_group(index(shape_.hidden));
  const int ranks_per_group = shape_.num_ranks / num_groups;
  for (int64_t token = 0; token < shape_.num_tokens; ++token, output += shape_.row_bytes()) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    int group = -1;
    const auto add_group = [&] {
      for (size_t i = 0; i < sum.size() && group >= 0; ++i) sum[i] += num_groups == 1 ? of_group[i] : bf16_to_f32(f32_to_bf16(of_group[i]));
      std::fill(of_group.begin(), of_group.end(), 0.0f);
    };
    for_each_rank(destinations()[index(token)], [&](int expert_rank) {
      if (expert_rank / ranks_per_group != group) add_group();
      group = expert_rank / ranks_per_group;
      make_row(shape_, {rank_, token, expert_rank}, reinterpret_cast<std::byte*>(row.data()));
      for (size_t i = 0; i < sum.size(); ++i) of_group[i] += bf16_to_f32(row[i]);
    });
    add_group();
    std::transform(sum.begin(), sum.end(), row.begin(), f32_to_bf16);
    if (std::memcmp(output, row.data(), index(shape_.row_bytes())) != 0) return false;
  }
  return true;
}

}  // namespace tern::bench
