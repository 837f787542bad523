// SPDX-License-Identifier: Apache-2.0
#include "cpu/rail.h"

#include <algorithm>

#include "rows/rows.h"

namespace tern::cpu {

Rail::Rail(Lane& lane, const RailPlace& place) : lane_(lane), place_(place), num_slots_(place.ranks.size()) {
  lane.set_network(place.proxy, place.standing);
}

bool Rail::has_room(uint64_t epoch) const {
  bool has = true;
  for_each_other_node([&](int node) {
    has =
        has && (epoch <= layout::kNumBanks || load_acquire(place_.proxy->taken(rank_in(node), lane_.index())) + layout::kNumBanks >= epoch);
  });
  return has;
}

void Rail::start_round(const RailTrip& trip, uint64_t epoch) {
  std::fill(num_slots_.begin(), num_slots_.end(), 0);
  if (epoch <= layout::kNumBanks) return;
  for_each_other_node([&](int node) {
    const uint64_t& taken = place_.proxy->taken(rank_in(node), lane_.index());
    lane_.await_network({rank_in(node), trip.operation, epoch - layout::kNumBanks, taken, TERN_AWAITED_CONSUMED});
  });
}

int64_t Rail::send_round(const RailTrip& trip, uint64_t epoch) {
  for (int node = 0; node < num_nodes(); ++node) {
    auto& header = *reinterpret_cast<layout::RailHeader*>(out(epoch, node));
    header.shape = trip.shape;
    header.operation = static_cast<int16_t>(trip.operation);
    header.num_given_up = static_cast<int16_t>(lane_.num_given_up());
    header.num_slots = num_slots_[static_cast<size_t>(node)];
  }
  store_fence();  // the network's thread reads rows that were streamed
  int64_t num_bytes = 0;
  for_each_other_node([&](int node) { num_bytes += put_bank(trip, epoch, node); });
  lane_.counters().network_bytes.fetch_add(static_cast<uint64_t>(num_bytes), std::memory_order_relaxed);
  epochs_.open(epoch);
  return num_bytes;
}

// In one piece, or two. Returns their bytes.
int64_t Rail::put_bank(const RailTrip& trip, uint64_t epoch, int node) const {
  const int64_t num_bytes = trip.bank.bytes(num_slots_[static_cast<size_t>(node)]), head_bytes = trip.bank.slots();
  const bool has_slots_apart = place_.slots != nullptr && num_bytes > head_bytes;
  Put put{.peer = rank_in(node),
          .from = place_.memory,
          .from_offset = static_cast<size_t>(out_at(epoch, node)),
          .to = place_.remote[static_cast<size_t>(node)],
          .to_offset = static_cast<uint64_t>(in_at(epoch, place_.node)),
          .num_bytes = static_cast<size_t>(has_slots_apart ? head_bytes : num_bytes),
          .channel = lane_.index(),
          .epoch = static_cast<int64_t>(epoch),
          .last = !has_slots_apart};
  place_.proxy->put(put);
  if (!has_slots_apart) return num_bytes;
  const layout::RailBanksLayout& banks = place_.whole_banks;
  put.from = place_.slots;
  put.from_offset = static_cast<size_t>(banks.out(lane_.index(), epoch, node) + head_bytes);
  put.to = place_.remote_slots[static_cast<size_t>(node)];
  put.to_offset = static_cast<uint64_t>(banks.in(lane_.index(), epoch, place_.node) + head_bytes);
  put.num_bytes = static_cast<size_t>(num_bytes - head_bytes);
  put.last = true;
  place_.proxy->put(put);
  return num_bytes;
}

const std::byte* Rail::await_arrived(const RailTrip& trip, uint64_t epoch, int node) {
  if (node == place_.node) return out(epoch, node);
  const Awaited awaited{rank_in(node), trip.operation, epoch, place_.proxy->arrived(rank_in(node), lane_.index()), TERN_AWAITED_MESSAGES};
  if (!lane_.await_network(awaited)) return nullptr;
  const std::byte* bank = place_.memory->address() + in_at(epoch, node);
  const auto& header = *reinterpret_cast<const layout::RailHeader*>(bank);
  if (header.operation != trip.operation) return lane_.mismatch(awaited, header.operation);
  if (header.shape != trip.shape) return lane_.mismatch(awaited, trip.shape, header.shape);
  return hear_given_up(awaited, node, header.num_given_up) ? bank : nullptr;
}

// What has come from a rank that has given up others lacks their share: this one must know of them too before the operation ends.
bool Rail::hear_given_up(const Awaited& from, int node, int num_given_up) {
  if (num_given_up == 0 || place_.standing == nullptr) return true;
  const bool has_told = lane_.await_word_of(from, [&] { return place_.standing->has_told(node, num_given_up); });
  lane_.hear_given_up();
  return has_told && serves(node);
}

void Rail::finish_round(uint64_t epoch) {
  epochs_.close(epoch);
  if (place_.proxy != nullptr) place_.proxy->finish(lane_.index(), epochs_.consumed());
}

}  // namespace tern::cpu
