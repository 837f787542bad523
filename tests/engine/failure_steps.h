// SPDX-License-Identifier: Apache-2.0
// What the scenes of ranks that fail are made of: a rank with its exchange, and steps that must go right or wrong in a certain way. A step
// throws what it did not like.
#pragma once

#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <tern/tern.hpp>
#include <thread>

#include "conformance/processes.h"
#include "engine/failure_scenes.h"
#include "engine/support.h"

namespace tern::conformance {

inline constexpr uint64_t kReady = 1, kStruck = 1, kFailed = 2, kRecovered = 2, kWokenUp = 2, kAnswered = 2;

inline Case ordinary_case(const SceneSettings& settings) {
  Case c;
  c.seed = 7;
  c.num_ranks = settings.num_ranks;
  c.ranks_per_node = settings.run.ranks_per_node;
  c.num_topk = 3;
  c.layout = TERN_LAYOUT_EXPERT_MAJOR;
  c.extent = settings.fused ? TERN_EXTENT_WORST : settings.extent;
  c.fused = settings.fused;
  c.weighting = TERN_WEIGHTS_DISPATCH;
  if (settings.in_windows) {
    c.layout = TERN_LAYOUT_RANK_MAJOR;
    c.weighting = TERN_WEIGHTS_NONE;
    c.max_tokens = 200;
    c.hidden = 2048;
    c.window_tokens = c.window_dispatch = c.window_combine = true;
    c.mode = TERN_MODE_THROUGHPUT;
  }
  return c;
}

inline std::vector<uint8_t> only_victim(const SceneSettings& settings) {
  std::vector<uint8_t> mask(static_cast<size_t>(settings.num_ranks), 0);
  mask[static_cast<size_t>(settings.victim())] = 1;
  return mask;
}

inline void require(bool condition, const std::string& what) {
  if (!condition) throw std::runtime_error(what);
}

inline void require_ok(tern_status status, const char* what) {
  require(status == TERN_OK, fmt::format("{}: {}: {}", what, tern_status_name(status), tern_last_error()));
}

inline std::string group_name(const char* scene) { return fmt::format("failure-{}-{}", scene, getpid()); }

// A rank's device, group and exchange, in its process.
struct Member {
  Member(RankSeat& seat, const std::string& name, const Scenario& scenario, const SceneSettings& of,
         tern_timeout_policy policy = TERN_ON_TIMEOUT_ABORT)
      : settings(of),
        device(make_rank_device(of.run, seat.rank())),
        group(Group::from_allgather(seat.rank(), seat.num_ranks(), RankSeat::allgather, &seat, group_options(name))),
        exchange(group, exchange_options(scenario, policy)) {}

  tern_group_options group_options(const std::string& name) const {
    tern_group_options options;
    options.name = name.c_str();
    options.ranks_per_node = settings.run.ranks_per_node;
    return options;
  }
  tern_exchange_options exchange_options(const Scenario& scenario, tern_timeout_policy policy) const {
    constexpr int32_t kMostTrips = 2;  // a rank keeps that before the failure
    tern_exchange_options options = with(scenario.exchange_options(kMostTrips), settings.run, *device);
    options.on_timeout = policy;
    return options;
  }

  tern_exchange* get() const { return exchange.get(); }
  RoundTrip trip(const Scenario& scenario) const { return RoundTrip(scenario, group.rank(), exchange.get(), *device); }

  const SceneSettings& settings;
  std::unique_ptr<RankDevice> device;
  Group group;
  Exchange exchange;
};

// Starts the ranks of a scene, each with its exchange: act(seat, member) throws what it did not like.
template <typename Act>
RankProcesses start_ranks(const char* scene, const Scenario& scenario, const SceneSettings& settings, Act act,
                          tern_timeout_policy policy = TERN_ON_TIMEOUT_ABORT) {
  const std::string name = group_name(scene);
  return RankProcesses(settings.num_ranks, settings.process_timeout_ms, [&](RankSeat& seat) {
    act(seat, Member(seat, name, scenario, settings, policy));
    return std::string();
  });
}

inline void require_right(const RoundTrip& trip) { require(trip.differences().empty(), join_lines(trip.differences())); }

// A whole cycle with a new plan must be right.
inline void require_right(const Scenario& scenario, const Member& member) {
  RoundTrip trip = member.trip(scenario);
  trip.run();
  require_right(trip);
}

// A plan of an old generation lives again once it is routed.
inline void require_right_again(RoundTrip& trip) {
  constexpr int kBatch = 3;
  trip.route();
  trip.dispatch(kBatch);
  trip.combine(kBatch);
  require_right(trip);
}

// The device takes new memory, writes and copies.
inline void require_device_works(RankDevice& device) {
  constexpr int64_t kNumBytes = 1 << 20;
  const DeviceMemory memory(device, kNumBytes);
  Bytes found(kNumBytes), half(kNumBytes / 2, 0x11);
  device.fill(memory.data(), 0x77, kNumBytes);
  device.copy_in(memory.data(), half.data(), kNumBytes / 2);
  device.copy_out(found.data(), memory.data(), kNumBytes);
  require(std::count(found.begin(), found.end(), 0x11) == kNumBytes / 2 && found.back() == 0x77,
          "memory of the device does not hold its contents");
}

// Runs a step that must fail within reasonable time because of a rank that is gone; returns the text of the error.
template <typename Step>
inline std::string failing(const Member& member, Step step) {
  const auto start = std::chrono::steady_clock::now();
  std::string text;
  try {
    step();
  } catch (const std::runtime_error& error) {
    text = error.what();
  }
  const auto elapsed = std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - start).count();
  require(!text.empty(), "the operation succeeded without the missing rank");
  require(elapsed < 10 * member.settings.run.timeout_ms, fmt::format("the error took {} ms", elapsed));
  require_device_works(*member.device);
  return text;
}

// A rank that waits for nobody hears of the failure of others when their word has come.
inline void await_failed(const Member& member) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(10 * member.settings.run.timeout_ms);
  while (member.exchange.state().health != TERN_HEALTH_FAILED) {
    require(std::chrono::steady_clock::now() < deadline, "the rank that left out a call was not told");
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

// Between nodes the network may say at once that a rank is gone; what a GPU had begun, the next call says.
inline bool says_connection_lost(const std::string& text, const SceneSettings& settings) {
  const auto has = [&](const std::string& part) { return text.find(part) != std::string::npos; };
  const bool said_later = has("TERN_SYSTEM_ERROR") && has(fmt::format("waited for rank {}", settings.victim()));
  return settings.run.ranks_per_node > 0 && (said_later || has(fmt::format("lost its connection to rank {}", settings.victim())));
}

// The error and the record name the rank, the operation and the epoch.
inline void require_names_victim(const std::string& text, const char* operation, tern_operation recorded, const Member& member) {
  const int32_t victim = member.settings.victim();
  if (member.exchange.state().failure.status == TERN_SYSTEM_ERROR && member.settings.run.ranks_per_node > 0) {
    require(member.exchange.state().health == TERN_HEALTH_FAILED, "health is not FAILED");
    return require(says_connection_lost(text, member.settings), text);
  }
  require(text.find("TERN_TIMEOUT") != std::string::npos || text.find("TERN_ABORTED") != std::string::npos, text);
  for (const std::string& part : {fmt::format("rank {}", victim), std::string(operation), std::string("epoch")})
    require(text.find(part) != std::string::npos, fmt::format("\"{}\" is not in: {}", part, text));
  const tern_exchange_state state = member.exchange.state();
  require(state.health == TERN_HEALTH_FAILED, "health is not FAILED");
  require(state.failure.status == TERN_TIMEOUT, fmt::format("the record's status is {}", tern_status_name(state.failure.status)));
  require(state.failure.awaited == victim, fmt::format("the record awaits rank {}", state.failure.awaited));
  require(state.failure.waiter >= 0 && state.failure.waiter < member.settings.num_ranks && state.failure.waiter != victim,
          "the waiter is no survivor");
  require(state.failure.operation == recorded, fmt::format("the record's operation is {}", state.failure.operation));
  require(state.failure.expected_epoch > state.failure.seen_epoch, "the record's epochs make no sense");
}

inline void require_masked(const Member& member, const std::vector<uint8_t>& mask, uint32_t generation) {
  const tern_exchange_state state = member.exchange.state();
  const bool any = std::find(mask.begin(), mask.end(), 1) != mask.end();
  require(state.health == (any ? TERN_HEALTH_DEGRADED : TERN_HEALTH_OK), fmt::format("health is {}", static_cast<int>(state.health)));
  require(state.generation == generation, fmt::format("generation is {}, expected {}", state.generation, generation));
  require(state.failure.status == TERN_OK, "the record of the last generation is still there");
  for (int32_t rank = 0; rank < member.settings.num_ranks; ++rank)
    require(state.masked[rank] == (mask.empty() ? 0 : mask[static_cast<size_t>(rank)]),
            fmt::format("masked[{}] is {}", rank, state.masked[rank]));
}

inline void recover(const Member& member, const tern_recover_options& options = {}) {
  require_ok(tern_exchange_recover(member.get(), &options), "tern_exchange_recover");
}
inline void recover_masking(const Member& member) {
  tern_recover_options options;
  options.allow_mask = 1;
  recover(member, options);
}
inline void recover_without(const std::vector<uint8_t>& mask, const Member& member) {
  tern_recover_options options;
  options.mask = mask.data();
  recover(member, options);
}
inline void recover_readmitting(const Member& member) {
  tern_recover_options options;
  options.readmit = 1;
  recover(member, options);
}
// The others have gone on without this rank.
inline void require_left_out(const Member& member) {
  const tern_status status = tern_exchange_recover(member.get(), nullptr);
  require(status == TERN_MASKED_OUT, fmt::format("recover of a masked rank: {}: {}", tern_status_name(status), tern_last_error()));
}

// While it lives this process gets no memory that others could map.
class NoSharedMemory {
 public:
  explicit NoSharedMemory(bool is_true) {
    getrlimit(RLIMIT_FSIZE, &before_);
    if (!is_true) return;
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit none{0, before_.rlim_max};
    setrlimit(RLIMIT_FSIZE, &none);
  }
  ~NoSharedMemory() { setrlimit(RLIMIT_FSIZE, &before_); }
  NoSharedMemory(const NoSharedMemory&) = delete;
  NoSharedMemory& operator=(const NoSharedMemory&) = delete;

 private:
  rlimit before_ = {};
};

inline void require_stale(const Member& member, RoundTrip& trip) {
  const std::string text = failing(member, [&] { trip.dispatch(1); });
  require(text.find("TERN_STALE_PLAN") != std::string::npos, text);
}

inline void expect_no_complaints(const std::vector<RankReport>& reports, const std::vector<int32_t>& dead = {}) {
  for (size_t rank = 0; rank < reports.size(); ++rank) {
    if (std::ranges::count(dead, static_cast<int32_t>(rank)) != 0) continue;
    EXPECT_TRUE(reports[rank].finished) << "rank " << rank << " left no report";
    EXPECT_EQ(reports[rank].text, "") << "rank " << rank;
  }
}

template <typename Seat>
inline void wait_for_all(const Seat& seat, const SceneSettings& settings, uint64_t stage) {
  for (int32_t rank = 0; rank < settings.num_ranks; ++rank) seat.wait_for_stage(rank, stage);
}
template <typename Seat>
inline void wait_for_survivors(const Seat& seat, const SceneSettings& settings, uint64_t stage) {
  for (int32_t rank = 0; rank < settings.num_ranks; ++rank)
    if (rank != settings.victim()) seat.wait_for_stage(rank, stage);
}

// The end of a scene: the victim gets the signal when all are ready. If it was stopped it wakes up when the survivors are at `stage`.
inline void strike_and_join(RankProcesses& ranks, const SceneSettings& settings, int signal, uint64_t stage = kRecovered) {
  wait_for_all(ranks, settings, kReady);
  ASSERT_EQ(kill(ranks.pid(settings.victim()), signal), 0);
  ranks.set_stage(kStruck);
  if (signal == SIGKILL) return expect_no_complaints(ranks.join(), {settings.victim()});
  wait_for_survivors(ranks, settings, stage);
  ASSERT_EQ(kill(ranks.pid(settings.victim()), SIGCONT), 0);
  ranks.set_stage(kWokenUp);
  expect_no_complaints(ranks.join());
}

}  // namespace tern::conformance
