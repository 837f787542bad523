// SPDX-License-Identifier: Apache-2.0
#include "domain/proposal.h"

#include <atomic>
#include <thread>

namespace tern {
namespace {

uint64_t load(uint64_t& word) { return std::atomic_ref<uint64_t>(word).load(std::memory_order_seq_cst); }
void store(uint64_t& word, uint64_t value) { std::atomic_ref<uint64_t>(word).store(value, std::memory_order_seq_cst); }

// nullopt: it is being written.
std::optional<Proposal> try_read(layout::ProposalCell& cell, int num_ranks) {
  const uint64_t version = load(cell.version);
  if (version % 2 != 0) return std::nullopt;
  Proposal proposal{load(cell.generation), load(cell.committed) != 0, std::vector<uint8_t>(static_cast<size_t>(num_ranks))};
  for (size_t r = 0; r < proposal.mask.size(); ++r) proposal.mask[r] = load(cell.mask[r / 64]) >> (r % 64) & 1;
  if (load(cell.version) != version) return std::nullopt;
  return proposal;
}

}  // namespace

void write_proposal(layout::ProposalCell& cell, const Proposal& proposal) {
  const uint64_t version = load(cell.version);
  store(cell.version, version + 1);
  store(cell.generation, proposal.generation);
  store(cell.committed, proposal.committed ? 1 : 0);
  for (size_t word_idx = 0; word_idx < layout::kMaxRanks / 64; ++word_idx) {
    uint64_t word = 0;
    for (size_t bit = 0; bit < 64 && word_idx * 64 + bit < proposal.mask.size(); ++bit)
      word |= static_cast<uint64_t>(proposal.mask[word_idx * 64 + bit] != 0) << bit;
    store(cell.mask[word_idx], word);
  }
  store(cell.version, version + 2);
}

// A cell is half written for less than a microsecond.
std::optional<Proposal> read_proposal(layout::ProposalCell& cell, int num_ranks) {
  constexpr int kMostAttempts = 1000;
  for (int attempt = 0; attempt < kMostAttempts; ++attempt) {
    if (auto proposal = try_read(cell, num_ranks)) return proposal;
    std::this_thread::yield();
  }
  return std::nullopt;
}

}  // namespace tern
