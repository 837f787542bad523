// SPDX-License-Identifier: Apache-2.0
#include "bench/packed_exchange.h"

#include <algorithm>
#include <cstring>

namespace tern::bench {

PackedExchange::PackedExchange(const Workload& workload, AllToAll& all_to_all) : workload_(workload), all_to_all_(all_to_all) {
  const Shape& shape = workload.shape();
  destinations_.resize(static_cast<size_t>(shape.num_tokens));
  num_sent_.resize(static_cast<size_t>(shape.num_ranks));
  num_received_.resize(static_cast<size_t>(shape.num_ranks));
  next_row_.resize(static_cast<size_t>(shape.num_ranks));
  terms_.reserve(static_cast<size_t>(shape.num_ranks));
  packed_ = make_private_memory(workload.num_sent() * shape.row_bytes());
  received_ = make_private_memory(workload.num_received() * shape.row_bytes());
  returned_ = make_private_memory(workload.num_sent() * shape.row_bytes());
  combined_ = make_private_memory(shape.num_tokens * shape.row_bytes());
  route();
}

void PackedExchange::route() {
  const Shape& shape = workload_.shape();
  std::fill(num_sent_.begin(), num_sent_.end(), 0);
  const int64_t* experts = workload_.topk_idx();
  for (uint64_t& destinations : destinations_) {
    destinations = 0;
    for (int k = 0; k < shape.num_topk; ++k) destinations |= uint64_t{1} << shape.rank_of_expert(*experts++);
    for_each_rank(destinations, [&](int rank) { ++num_sent_[static_cast<size_t>(rank)]; });
  }
  all_to_all_.exchange_counts(num_sent_, num_received_);
}

void PackedExchange::pack() {
  const int64_t row_bytes = workload_.shape().row_bytes();
  std::byte* next = packed_->data();
  for (size_t rank = 0; rank < next_row_.size(); ++rank) {
    next_row_[rank] = next;
    next += num_sent_[rank] * row_bytes;
  }
  const std::byte* token = workload_.tokens();
  for (const uint64_t destinations : destinations_) {
    for_each_rank(destinations, [&](int rank) {
      std::memcpy(next_row_[static_cast<size_t>(rank)], token, static_cast<size_t>(row_bytes));
      next_row_[static_cast<size_t>(rank)] += row_bytes;
    });
    token += row_bytes;
  }
}

void PackedExchange::dispatch() {
  pack();
  all_to_all_.exchange_rows({packed_->data(), num_sent_, received_->data(), num_received_, workload_.shape().row_bytes()});
}

void PackedExchange::combine() {
  const Shape& shape = workload_.shape();
  // What a rank received it gives back, so the counts change places.
  all_to_all_.exchange_rows({workload_.expert_rows(), num_received_, returned_->data(), num_sent_, shape.row_bytes()});
  std::byte* next = returned_->data();
  for (size_t rank = 0; rank < next_row_.size(); ++rank) {
    next_row_[rank] = next;
    next += num_sent_[rank] * shape.row_bytes();
  }
  std::byte* out = combined_->data();
  for (const uint64_t destinations : destinations_) {
    terms_.clear();
    for_each_rank(destinations, [&](int rank) {
      terms_.push_back({next_row_[static_cast<size_t>(rank)], 1.0f});
      next_row_[static_cast<size_t>(rank)] += shape.row_bytes();
    });
    cpu::sum_rows({.dtype = TERN_DTYPE_BF16,
                   .hidden = shape.hidden,
                   .weighted = false,
                   .terms = terms_,
                   .group_ends = {},
                   .bias = {},
                   .out = out,
                   .store = cpu::Store::kCached});
    out += shape.row_bytes();
  }
}

void PackedExchange::add_to(Contenders& contenders) {
  const int64_t row_bytes = workload_.shape().row_bytes();
  const std::span received(received_->data(), static_cast<size_t>(workload_.num_received() * row_bytes));
  const std::span combined(combined_->data(), static_cast<size_t>(workload_.shape().num_tokens * row_bytes));
  const auto route_and_dispatch = [this] {
    route();
    dispatch();
  };
  const std::string name = all_to_all_.name();
  contenders.push_back({"dispatch", name, Kind::kOther, Result::kDispatched, received, [this] { dispatch(); }});
  contenders.push_back({"route and dispatch", name, Kind::kOther, Result::kDispatched, received, route_and_dispatch});
  contenders.push_back({"combine", name, Kind::kOther, Result::kCombined, combined, [this] { combine(); }});
}

}  // namespace tern::bench
