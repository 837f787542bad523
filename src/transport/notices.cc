// SPDX-License-Identifier: Apache-2.0
#include "transport/notices.h"

#include <algorithm>
#include <bit>

#include "base/error.h"

namespace tern {
namespace {

constexpr int kEpochBits = 2;
constexpr int kLeastNumberBits = 8;
constexpr int kMostNumberBits = 32;

int bits_for(int num_values) { return std::bit_width(static_cast<unsigned>(num_values - 1)); }

uint64_t low_bits(uint64_t value, int num_bits) { return value & ((uint64_t{1} << num_bits) - 1); }

}  // namespace

NoticeCode::NoticeCode(int num_ranks, int num_channels, size_t data_bytes)
    : channel_bits_(bits_for(num_channels)), sender_bits_(bits_for(num_ranks)) {
  const int left = static_cast<int>(std::min<size_t>(data_bytes, sizeof(uint64_t)) * 8) - kEpochBits - channel_bits_ - sender_bits_;
  if (left < kLeastNumberBits)
    fail(TERN_UNSUPPORTED,
         "transport: {} ranks and {} channels leave {} bits of the provider's {} bytes of completion data, {} are needed; use fewer "
         "channels",
         num_ranks, num_channels, left, data_bytes, kLeastNumberBits);
  number_bits_ = std::min(left, kMostNumberBits);
}

uint64_t NoticeCode::encode(const Notice& notice) const {
  uint64_t data = notice.num_messages;
  data = data << sender_bits_ | static_cast<uint64_t>(notice.sender);
  data = data << channel_bits_ | static_cast<uint64_t>(notice.channel);
  return data << kEpochBits | low_bits(static_cast<uint64_t>(notice.epoch), kEpochBits);
}

Notice NoticeCode::decode(uint64_t data) const {
  Notice notice;
  notice.epoch = static_cast<int64_t>(low_bits(data, kEpochBits));
  data >>= kEpochBits;
  notice.channel = static_cast<int>(low_bits(data, channel_bits_));
  data >>= channel_bits_;
  notice.sender = static_cast<int>(low_bits(data, sender_bits_));
  notice.num_messages = low_bits(data >> sender_bits_, number_bits_);
  return notice;
}

// Epochs 0 and -1 count as over, so that 1 and 2 are the first.
EpochTable::EpochTable(int num_peers, int num_channels) : num_channels_(num_channels), pairs_(size_t(num_peers) * num_channels) {
  for (auto& pair : pairs_) pair = {EpochCount{0, 1, 1}, EpochCount{-1, 1, 1}};
}

void EpochTable::check(int peer, int channel) const {
  const int num_peers = static_cast<int>(pairs_.size()) / num_channels_;
  if (peer < 0 || peer >= num_peers || channel < 0 || channel >= num_channels_)
    fail(TERN_INVALID_ARGUMENT, "transport: rank {} and channel {} are asked for, there are {} ranks and {} channels", peer, channel,
         num_peers, num_channels_);
}

// The counter holds this epoch and it is not over, or it holds the one before the previous and that is over.
void Departures::check(int peer, int channel, int64_t epoch) const {
  table_.check(peer, channel);
  const EpochCount& count = table_.at(peer, channel, epoch);
  if (count.epoch == epoch && count.complete())
    fail(TERN_INVALID_STATE, "transport: a message to rank {}, channel {}, for epoch {}, whose last message was sent", peer, channel,
         epoch);
  if (count.epoch != epoch && (count.epoch != epoch - 2 || !count.complete()))
    fail(TERN_INVALID_STATE, "transport: a message to rank {}, channel {}, for epoch {} while epoch {} is {}; epochs follow each other",
         peer, channel, epoch, count.epoch, count.complete() ? "the last one sent of every other" : "not over");
}

uint64_t Departures::num_sent(int peer, int channel, int64_t epoch) const {
  const EpochCount& count = table_.at(peer, channel, epoch);
  return count.epoch == epoch ? count.num_seen : 0;
}

void Departures::count(int peer, int channel, int64_t epoch, bool last) {
  EpochCount& count = table_.at(peer, channel, epoch);
  if (count.epoch != epoch) count = {epoch, 0, 0};
  ++count.num_seen;
  if (last) count.num_messages = count.num_seen;
}

// A counter holds the epoch that it counts; those of epochs 1 and 2 are open from the beginning.
Arrivals::Arrivals(int num_peers, int num_channels) : table_(num_peers, num_channels) {
  for (int peer = 0; peer < num_peers; ++peer)
    for (int channel = 0; channel < num_channels; ++channel)
      for (const int64_t epoch : {1, 2}) table_.at(peer, channel, epoch) = {epoch, 0, 0};
}

void Arrivals::count(const Notice& notice) {
  table_.check(notice.sender, notice.channel);
  EpochCount& count = table_.at(notice.sender, notice.channel, notice.epoch);
  if ((count.epoch & 3) != notice.epoch)
    fail(TERN_MISMATCH,
         "transport: rank {} sent to channel {} for an epoch that is {} modulo 4, but {} is awaited; it did not wait for credit",
         notice.sender, notice.channel, notice.epoch, count.epoch);
  ++count.num_seen;
  const bool two_numbers = count.num_messages != 0 && notice.num_messages != 0;
  if (notice.num_messages != 0) count.num_messages = notice.num_messages;
  if (two_numbers || (count.num_messages != 0 && count.num_seen > count.num_messages))
    fail(TERN_MISMATCH, "transport: rank {} sent more to channel {} for epoch {} than the {} messages that it announced", notice.sender,
         notice.channel, count.epoch, count.num_messages);
}

bool Arrivals::complete(int peer, int channel, int64_t epoch) const {
  table_.check(peer, channel);
  const EpochCount& count = table_.at(peer, channel, epoch);
  return count.epoch > epoch || (count.epoch == epoch && count.complete());
}

void Arrivals::retire(int peer, int channel, int64_t epoch) {
  table_.check(peer, channel);
  EpochCount& count = table_.at(peer, channel, epoch);
  // The other counter holds the previous epoch until that is retired.
  if (count.epoch != epoch || !count.complete() || table_.at(peer, channel, epoch + 1).epoch != epoch + 1)
    fail(TERN_INVALID_STATE, "transport: epoch {} of rank {}, channel {}, is retired, but {}", epoch, peer, channel,
         count.epoch != epoch ? "it is not under way"
         : count.complete()   ? "the one before it was not"
                              : "it is not complete");
  count = {epoch + 2, 0, 0};
}

}  // namespace tern
