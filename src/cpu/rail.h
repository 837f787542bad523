// SPDX-License-Identifier: Apache-2.0
// One lane's way to the ranks of the same index in the other nodes. What goes to a node in one epoch is one contiguous piece of memory:
//
//   rail.start_round(trip, epoch);                              // waits until all peers have taken epoch - 2
//   for each node: rail.next_slot(trip, epoch, node) ...        // to be filled; the own node's stay here
//   rail.send_round(trip, epoch);
//   for each node: rail.await_arrived(trip, epoch, node)        // its slots, in the order in which they were filled there
//   rail.finish_round(epoch);                                   // they are no longer needed
//
// Every round exchanges something with each node. Two may be under way, on both sides.
// While the lane waits, for whomever, it moves the network's bytes.
// Memory: what await_arrived() returns is visible and stays until finish_round(). Threads: those of the lane.
#pragma once

#include <span>
#include <vector>

#include "cpu/epochs.h"
#include "cpu/lane.h"
#include "cpu/standing.h"
#include "layout/rail.h"
#include "transport/proxy.h"

namespace tern::cpu {

// What one operation is to its rail. A round holds what belongs to this many tokens of each owner.
struct RailTrip {
  tern_operation operation = TERN_OP_NONE;
  layout::CallShape shape;
  layout::RailBankLayout bank;
  int64_t tokens_per_round = 1;
  int64_t num_rounds = 1;
};

// What all rails of a rank share.
struct RailPlace {
  int node = 0;
  std::vector<int> ranks;       // [num_nodes] the rail's rank in each node
  std::vector<uint8_t> serves;  // [num_nodes] 0: that rank is masked out, so nothing goes to its node or comes from there
  layout::RailMemoryLayout layout;
  const Region* memory = nullptr;
  std::vector<RemoteRegion> remote;     // [num_nodes]
  layout::RailBanksLayout whole_banks;  // header, counts and slots: those of `layout`, or of the memory where slots lie apart
  const Region* slots = nullptr;        // that memory; nullptr: slots lie in `memory`
  std::vector<RemoteRegion> remote_slots;
  Proxy* proxy = nullptr;        // nullptr: no rail serves
  Standing* standing = nullptr;  // with TERN_ON_TIMEOUT_MASK and a proxy
};

class Rail {
 public:
  Rail(Lane& lane, const RailPlace& place);

  int num_nodes() const { return static_cast<int>(place_.ranks.size()); }
  int own_node() const { return place_.node; }
  int64_t bank_bytes() const { return place_.whole_banks.bank_bytes; }
  // For header and counts of a bank.
  int64_t head_bytes() const { return place_.layout.banks.bank_bytes; }

  void check_room(tern_operation operation, int64_t num_rounds) const { epochs_.check_room(operation, lane_.index(), num_rounds); }
  uint64_t begin(tern_operation operation, int64_t num_rounds) {
    check_room(operation, num_rounds);
    return epochs_.take(num_rounds);
  }

  // Can the round of that epoch be started without waiting?
  bool has_room(uint64_t epoch) const;
  void start_round(const RailTrip& trip, uint64_t epoch);
  int32_t* counts_for(const RailTrip& trip, uint64_t epoch, int node) const {
    return reinterpret_cast<int32_t*>(out(epoch, node) + trip.bank.counts());
  }
  std::byte* next_slot(const RailTrip& trip, uint64_t epoch, int node) {
    return out(epoch, node) + trip.bank.slot_at(num_slots_[static_cast<size_t>(node)]++);
  }
  // Can anything go to that node, and come from there? Not if the rail's rank there is masked out, or was given up. The own node's always serves.
  bool serves(int node) const { return place_.serves[static_cast<size_t>(node)] != 0 && !lane_.gave_up_rank(rank_in(node)); }
  // Instead: somebody else has filled so many, and the counts. Where slots lie apart that is how they are filled.
  void set_num_slots(int node, int32_t num_slots) { num_slots_[static_cast<size_t>(node)] = num_slots; }
  // Returns the bytes of the round, to all other nodes.
  int64_t send_round(const RailTrip& trip, uint64_t epoch);
  // The bank of that node's slots, or where these lie apart of header and counts; nullptr: its rank of the rail has been given up.
  const std::byte* await_arrived(const RailTrip& trip, uint64_t epoch, int node);
  void finish_round(uint64_t epoch);
  uint64_t next_epoch() const { return epochs_.next(); }
  uint64_t progress() const { return epochs_.progress(); }
  bool has_unreceived() const { return epochs_.any_open(); }
  // Under TERN_ON_TIMEOUT_MASK: see Standing.
  void begin_operation(uint64_t number) const {
    if (place_.standing != nullptr) place_.standing->begin(number);
  }
  void hear_standing() const {
    if (place_.standing != nullptr) place_.standing->hear();
  }
  bool have_all_begun(uint64_t number) const { return place_.standing == nullptr || place_.standing->have_all_begun(number); }

  // Those whose rail serves.
  template <typename Visitor>
  void for_each_other_node(Visitor visit) const {
    for (int i = 1; i < num_nodes(); ++i)
      if (const int node = (place_.node + i) % num_nodes(); serves(node)) visit(node);
  }

 private:
  int64_t out_at(uint64_t epoch, int node) const {
    return place_.layout.banks_begin() + place_.layout.banks.out(lane_.index(), epoch, node);
  }
  int64_t in_at(uint64_t epoch, int node) const { return place_.layout.banks_begin() + place_.layout.banks.in(lane_.index(), epoch, node); }
  std::byte* out(uint64_t epoch, int node) const { return place_.memory->address() + out_at(epoch, node); }
  int64_t put_bank(const RailTrip& trip, uint64_t epoch, int node) const;
  bool hear_given_up(const Awaited& from, int node, int num_given_up);
  int rank_in(int node) const { return place_.ranks[static_cast<size_t>(node)]; }

  Lane& lane_;
  const RailPlace& place_;
  Epochs epochs_;
  std::vector<int32_t> num_slots_;  // [num_nodes] filled in the round under way
};

}  // namespace tern::cpu
