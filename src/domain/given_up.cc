// SPDX-License-Identifier: Apache-2.0
#include "domain/given_up.h"

#include <algorithm>
#include <array>

#include "domain/doorbell.h"

namespace tern {

bool is_given_up(const Domain& domain, int rank_of_group) {
  const auto rank = static_cast<size_t>(rank_of_group);
  return (load_acquire(domain.given_up(domain.rank).ranks[rank / 64]) >> (rank % 64) & 1) != 0;
}

bool is_any_given_up(const Domain& domain) {
  return std::ranges::any_of(domain.given_up(domain.rank).ranks, [](const uint64_t& word) { return load_acquire(word) != 0; });
}

void announce_given_up(const Domain& domain, int rank_of_group) {
  const auto rank = static_cast<size_t>(rank_of_group);
  std::array<uint64_t, layout::kMaxRanks / 64> ranks = {};
  ranks[rank / 64] = uint64_t{1} << (rank % 64);
  announce_given_up(domain, ranks);
}

void announce_given_up(const Domain& domain, RankBits ranks) {
  domain.for_each_member([&](int owner) {
    bool is_news = false;
    for (size_t i = 0; i < ranks.size(); ++i) {
      uint64_t& word = domain.given_up(owner).ranks[i];
      if ((ranks[i] & ~load_acquire(word)) == 0) continue;
      std::atomic_ref<uint64_t>(word).fetch_or(ranks[i], std::memory_order_acq_rel);
      is_news = true;
    }
    for (int lane = 0; is_news && lane < domain.layout.num_lanes; ++lane) ring(domain.doorbell(owner, lane));
  });
}

}  // namespace tern
