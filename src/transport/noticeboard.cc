// SPDX-License-Identifier: Apache-2.0
#include "transport/noticeboard.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "base/error.h"

namespace tern {
namespace {

constexpr int64_t kRetryMs = 500;

}  // namespace

uint64_t note_hash(std::span<const uint64_t> words) {
  constexpr uint64_t kPrime = 0x9E3779B97F4A7C15;
  uint64_t hash = words.size() + 1;
  for (const uint64_t word : words) {
    hash = (hash ^ word) * kPrime;
    hash ^= hash >> 29;
  }
  return hash == 0 ? 1 : hash;
}

Noticeboard::Noticeboard(Bootstrap& bootstrap, size_t note_bytes, const std::vector<int>& readers, EndpointOptions options,
                         Deadline deadline)
    : rank_(bootstrap.rank()), note_bytes_(note_bytes), own_(slot_words()) {
  const auto num_ranks = static_cast<size_t>(bootstrap.num_ranks());
  options.num_rails = 1;
  if (options.domains.size() > 1) options.domains.resize(1);
  options.most_outstanding = std::max(options.most_outstanding, static_cast<int>(num_ranks));
  options.gpu_memory = kNoGpuMemory;
  endpoint_ = make_endpoint(bootstrap, options, deadline);
  memory_.resize((num_ranks + readers.size()) * slot_words());
  region_.emplace(endpoint_->register_memory(memory_.data(), memory_.size() * sizeof(uint64_t)));
  std::vector<RemoteRegion> all(num_ranks);
  bootstrap.allgather(&region_->remote(), all.data(), sizeof(RemoteRegion), deadline);
  for (const int rank : readers) readers_.push_back({.rank = rank, .memory = all[static_cast<size_t>(rank)]});
}

void Noticeboard::write(std::span<const std::byte> note) {
  if (note.size() != note_bytes_) fail(TERN_INTERNAL_ERROR, "noticeboard: a note of {} bytes, not {}", note.size(), note_bytes_);
  {
    const std::lock_guard lock(mutex_);
    std::memcpy(own_.data() + 1, note.data(), note_bytes_);
    own_[0] = note_hash(std::span(own_).subspan(1));
    for (Reader& reader : readers_) reader.is_due = true;
  }
  progress();
}

bool Noticeboard::read(int rank, std::span<std::byte> note) {
  const std::lock_guard lock(mutex_);
  const uint64_t* slot = memory_.data() + static_cast<size_t>(rank) * slot_words();
  std::vector<uint64_t> words(slot_words());
  for (size_t i = 0; i < words.size(); ++i)
    words[i] = std::atomic_ref(const_cast<uint64_t&>(slot[i])).load(std::memory_order_relaxed);  // the network may be writing
  if (words[0] != note_hash(std::span(words).subspan(1))) return false;
  std::memcpy(note.data(), words.data() + 1, note_bytes_);
  return true;
}

// Errors are of ranks that are gone, and who awaits their notes has a deadline.
void Noticeboard::progress() {
  const std::lock_guard lock(mutex_);
  try {
    while (endpoint_->progress()) {
    }
  } catch (const Failure&) {
  }
  for (size_t i = 0; i < readers_.size(); ++i) send(i);
}

void Noticeboard::send(size_t reader_idx) {
  Reader& reader = readers_[reader_idx];
  if (endpoint_->lost(reader.rank) && reader.retry.passed()) {
    endpoint_->try_again(reader.rank);
    reader.is_due = true;  // what was on its way is lost
    reader.retry = Deadline::in_ms(kRetryMs);
  }
  if (!reader.is_due || endpoint_->lost(reader.rank) || endpoint_->num_outstanding_to(reader.rank) != 0) return;
  const size_t num_slots = memory_.size() / slot_words();
  const size_t slot_idx = num_slots - readers_.size() + reader_idx;
  std::copy(own_.begin(), own_.end(), memory_.begin() + static_cast<int64_t>(slot_idx * slot_words()));
  Put put{.peer = reader.rank,
          .from = &*region_,
          .from_offset = slot_idx * slot_bytes(),
          .to = reader.memory,
          .to_offset = static_cast<size_t>(rank_) * slot_bytes(),
          .num_bytes = slot_bytes(),
          .counted = false};
  try {
    reader.is_due = !endpoint_->try_put(put);
  } catch (const Failure&) {
  }
}

}  // namespace tern
