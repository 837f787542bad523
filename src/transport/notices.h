// SPDX-License-Identifier: Apache-2.0
// How a receiver knows that all messages of an epoch have come, though no message is ordered behind another.
//
// Each message brings a notice: who sent it, channel, epoch, and, on the last message of the epoch, how many the epoch has. The
// receiver counts. An epoch is complete when its number is known and as many have come, whichever came first:
//
//   arrivals.count(code.decode(data));
//   if (arrivals.complete(peer, channel, epoch)) { use(what_came); arrivals.retire(peer, channel, epoch); }
//
// Epochs of a (peer, channel) are 1, 2, 3 ..., and each has a message. Two may be under way: epoch e may be sent once e - 2 is
// retired, which the sender must know from what came back. So an epoch's lowest bits name it, and there are two counters.
// Threads: none of these classes is shared between threads.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace tern {

struct Notice {
  int sender = 0;
  int channel = 0;
  int64_t epoch = 0;          // decoded: modulo 4
  uint64_t num_messages = 0;  // of this epoch; 0: not known yet
};

// A notice as remote completion data, of which providers carry 4 or 8 bytes. From the lowest bit:
//
//   epoch modulo 4 (2) | channel (as many as needed) | sender (as many as needed) | number of messages (the rest, at most 32)
//
// The least number of bits is left for the number where 4 bytes must serve 2048 ranks and 8 channels: 16, or 65535 messages.
class NoticeCode {
 public:
  // TERN_UNSUPPORTED if fewer than 8 bits are left for the number.
  NoticeCode(int num_ranks, int num_channels, size_t data_bytes);

  uint64_t encode(const Notice& notice) const;
  Notice decode(uint64_t data) const;
  uint64_t most_messages() const { return (uint64_t{1} << number_bits_) - 1; }

 private:
  int channel_bits_, sender_bits_, number_bits_;
};

// One epoch of one (peer, channel), on either side.
struct EpochCount {
  int64_t epoch = 0;
  uint64_t num_seen = 0;      // messages sent, or arrived
  uint64_t num_messages = 0;  // of the whole epoch; 0: not known yet
  bool complete() const { return num_messages != 0 && num_seen == num_messages; }
};

class EpochTable {
 public:
  EpochTable(int num_peers, int num_channels);

  EpochCount& at(int peer, int channel, int64_t epoch) { return pairs_[index(peer, channel)][epoch & 1]; }
  const EpochCount& at(int peer, int channel, int64_t epoch) const { return pairs_[index(peer, channel)][epoch & 1]; }
  // TERN_INVALID_ARGUMENT if there is no such peer or channel.
  void check(int peer, int channel) const;

 private:
  size_t index(int peer, int channel) const { return size_t(peer) * num_channels_ + channel; }

  int num_channels_;
  std::vector<std::array<EpochCount, 2>> pairs_;
};

// What was sent. The two epochs under way may be sent in turns.
class Departures {
 public:
  Departures(int num_peers, int num_channels) : table_(num_peers, num_channels) {}

  // TERN_INVALID_STATE unless messages of this epoch may be sent: epochs follow each other, and none is sent to after its last message.
  void check(int peer, int channel, int64_t epoch) const;
  uint64_t num_sent(int peer, int channel, int64_t epoch) const;
  void count(int peer, int channel, int64_t epoch, bool last);

 private:
  EpochTable table_;
};

// What has come.
class Arrivals {
 public:
  Arrivals(int num_peers, int num_channels);

  // TERN_MISMATCH, naming the sender, for what cannot be: an epoch that is not awaited, or more messages than the epoch has.
  void count(const Notice& notice);
  bool complete(int peer, int channel, int64_t epoch) const;
  // The epoch's counter is free for epoch + 2. TERN_INVALID_STATE unless it is complete and the oldest that is not retired.
  void retire(int peer, int channel, int64_t epoch);

 private:
  EpochTable table_;
};

}  // namespace tern
