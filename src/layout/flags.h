// SPDX-License-Identifier: Apache-2.0
// The words through which ranks tell each other how far they are.
//
// Every round trip through the staging banks of a lane has an epoch: 1, 2, 3, ... A flag word holds the epoch, and which
// operation on which lane it belongs to, so that ranks that call different operations find out at once. Words only grow:
// a waiter waits for "at least this epoch", and nobody ever clears one.
#pragma once

#include <cstdint>

namespace tern::layout {

inline constexpr uint64_t kCacheLine = 64;
inline constexpr int kMaxLanes = 16;
inline constexpr int kMaxRanks = 1024;
inline constexpr int kNumBanks = 2;

// Operations as in tern_operation; 4 bits. Lanes: 4 bits. Epochs: 56 bits.
constexpr uint64_t make_flag(uint64_t epoch, int lane, int operation) {
  return epoch << 8 | static_cast<uint64_t>(lane) << 4 | static_cast<uint64_t>(operation);
}
constexpr uint64_t flag_epoch(uint64_t flag) { return flag >> 8; }
constexpr int flag_lane(uint64_t flag) { return static_cast<int>(flag >> 4 & 0xf); }
constexpr int flag_operation(uint64_t flag) { return static_cast<int>(flag & 0xf); }

// What rank `src` says to the owner of the window; one cell for each source and lane, written by `src` alone.
struct alignas(kCacheLine) FlagCell {
  uint64_t ready;                    // flag: src's rows lie at ready_offset of its heap and may be written (dispatch) or read (combine)
  uint64_t ready_offset[kNumBanks];  // [epoch % kNumBanks] bytes from the start of src's heap; stored before `ready`
  uint64_t arrived;                  // flag: what src sends to the owner in this epoch is all there
  uint64_t consumed;                 // epoch: src no longer needs anything that the owner sent to it up to here
};
static_assert(sizeof(FlagCell) == kCacheLine);

// A futex word that peers count up after they have written to a lane's cells, and the number of threads asleep on it. Peers that wait for
// the owner look there whether it is waiting itself.
struct alignas(kCacheLine) Doorbell {
  uint32_t rings;
  uint32_t sleepers;
  uint64_t awaits;  // 1 + the rank of the group that the owner waits for on this lane; 0: none
};
static_assert(sizeof(Doorbell) == kCacheLine);

// Why a generation ended: written once, by whoever claims it first, into every window of the domain.
struct alignas(kCacheLine) FailureCell {
  uint32_t state;  // kFailureNone, kFailureClaimed (being written) or kFailureSet
  int32_t status;
  int32_t waiter;
  int32_t awaited;
  int32_t lane;
  int32_t operation;
  uint64_t expected_epoch;
  uint64_t seen_epoch;
};
inline constexpr uint32_t kFailureNone = 0;
inline constexpr uint32_t kFailureClaimed = 1;
inline constexpr uint32_t kFailureSet = 2;

// What a rank proposes while the survivors agree on a new generation; written by its owner, read by all. Every word is
// read and written sequentially consistent, between two equal, even versions.
struct alignas(kCacheLine) ProposalCell {
  uint64_t version;               // odd while it is being written
  uint64_t generation;            // the generation proposed; 0: none yet
  uint64_t committed;             // 1: every rank that this one knows to go on has proposed the same
  uint64_t mask[kMaxRanks / 64];  // bit r: without rank r
};

// Under TERN_ON_TIMEOUT_MASK: ranks of the group that were given up in this generation. Whoever finds out sets the bit in every window of the
// domain; none is ever cleared.
struct alignas(kCacheLine) GivenUpCell {
  uint64_t ranks[kMaxRanks / 64];  // bit r: rank r
};

// Under TERN_ON_TIMEOUT_MASK, between nodes: the operation that the owner has begun last, by the epochs that it had come to then; and the one that
// all ranks of those nodes have begun of which the owner hears over its rail. Words that only grow.
struct alignas(kCacheLine) BegunCell {
  uint64_t begun;
  uint64_t begun_on_rail;
};

// What a rank says in recoveries: to those who go on, to those who were masked out, or as one that was; written by the owner, read by all, for
// as long as the exchange lives.
struct alignas(kCacheLine) AdmissionCell {
  ProposalCell proposal;
  uint64_t roll_call;     // the generation that is to begin, and that masked ranks may come back with; 0: none yet
  uint64_t present;       // the roll call that this rank, masked out, has answered last; 0: none
  ProposalCell decision;  // who stays masked in the generation of the last roll call
};

}  // namespace tern::layout
