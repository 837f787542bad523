// SPDX-License-Identifier: Apache-2.0
// How operations stand to the caller's streams, events, threads and SMs.
#include <atomic>
#include <chrono>
#include <tern/tern.hpp>
#include <thread>

#include "gpu/cases.h"
#include "gpu/cuda_support.h"
#include "gpu/support.h"

namespace tern::conformance {
namespace {

class GpuStreams : public testing::TestWithParam<Placing> {
 protected:
  void SetUp() override {
    if (test_device() == TERN_DEVICE_CPU) GTEST_SKIP() << "needs GPUs: uses CUDA itself";
    TERN_NEED_GPU();
    load_spin(options().num_devices);
  }

  int32_t num_ranks() const { return GetParam().num_ranks; }
  RunOptions options() const { return gpu_options(num_ranks(), GetParam().most_gpus); }
  // On two lanes or one, so on one or two streams of the exchange's own.
  std::vector<Case> cases() const {
    std::vector<Case> result;
    for (const tern_layout layout : kLayouts)
      for (const tern_extent extent : {TERN_EXTENT_EXACT, TERN_EXTENT_WORST})
        for (const bool phases : {false, true}) {
          Case c = ordinary_case(num_ranks(), layout);
          c.extent = extent;
          c.phases = phases;
          c.num_lanes = phases ? 2 : 1;
          c.lane = c.num_lanes - 1;
          c.window_dispatch = c.window_combine = phases;
          result.push_back(c.normalized());
        }
    return result;
  }
  // Runs all cases, their operations launched as `launching(device)` says.
  template <typename MakeLaunching>
  void expect_right_launched(const MakeLaunching& make_launching) const {
    expect_all_right(cases(), [&](const Case& c) {
      const Scenario scenario(c);
      return run_threads(c.num_ranks, scenario.exchange_options(), options(),
                         [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
                           const Event before, behind;
                           RoundTrip trip(scenario, rank, exchange, device);
                           trip.launch_with(make_launching(static_cast<cudaStream_t>(device.stream()), before, behind));
                           trip.run();
                           return trip.differences();
                         });
    });
  }
};

INSTANTIATE_TEST_SUITE_P(Ranks, GpuStreams, testing::Values(Placing{1, 1}, Placing{2, 2}, Placing{4, 4}, Placing{4, 1}), placing_name);

// Without an event to wait for, an operation starts after what is on the caller's stream.
TEST_P(GpuStreams, OwnStreamAfterTheCallers) {
  expect_right_launched([](cudaStream_t stream, const Event&, const Event& behind) {
    Launching launching;
    launching.launch.own_stream = 1;
    launching.launch.done_event = behind.get();
    launching.after = [stream, &behind] { behind.await(stream); };
    return launching;
  });
}

TEST_P(GpuStreams, OwnStreamBetweenEvents) {
  expect_right_launched([](cudaStream_t stream, const Event& before, const Event& behind) {
    Launching launching;
    launching.launch.own_stream = 1;
    launching.launch.after_event = before.get();
    launching.launch.done_event = behind.get();
    launching.before = [stream, &before] { before.record(stream); };
    launching.after = [stream, &behind] { behind.await(stream); };
    return launching;
  });
}

TEST_P(GpuStreams, CallersStreamBetweenEvents) {
  expect_right_launched([](cudaStream_t stream, const Event& before, const Event& behind) {
    Launching launching;
    launching.launch.after_event = before.get();
    launching.launch.done_event = behind.get();
    launching.before = [stream, &before] { before.record(stream); };
    launching.after = [stream, &behind] { behind.await(stream); };
    return launching;
  });
}

// A dispatch whose tokens are produced on another stream, late.
struct LateTokens {
  LateTokens(const Scenario& scenario, int32_t rank, tern_exchange* exchange, RankDevice& on)
      : device(on), placement(scenario.placements[static_cast<size_t>(rank)]), plan(make_plan(exchange, scenario.plan_options())) {
    const RankPlace place{rank, exchange, &device, placement.num_tokens};
    routing.load(scenario, place, false);
    dispatch.load(scenario, 0, place);
    num_bytes = placement.num_tokens * scenario.c.token_bytes();
    aside = DeviceMemory(device, num_bytes);
    device.synchronise();
  }

  // The tokens vanish at once, and are back in some milliseconds, on `producer`.
  void take_away(cudaStream_t producer) const {
    void* const tokens = const_cast<void*>(dispatch.args.tokens);
    const auto size = static_cast<size_t>(num_bytes);
    require_cuda(cudaMemcpyAsync(aside.data(), tokens, size, cudaMemcpyDeviceToDevice, producer), "cudaMemcpyAsync");
    require_cuda(cudaMemsetAsync(tokens, 0, size, producer), "cudaMemsetAsync");
    require_cuda(cudaStreamSynchronize(producer), "cudaStreamSynchronize");
    spin(producer, 1, 20'000);
    require_cuda(cudaMemcpyAsync(tokens, aside.data(), size, cudaMemcpyDeviceToDevice, producer), "cudaMemcpyAsync");
  }

  RankDevice& device;
  const Placement& placement;
  PlanHandle plan;
  RoutingCall routing;
  DispatchCall dispatch;
  DeviceMemory aside;
  int64_t num_bytes = 0;
};

TEST_P(GpuStreams, OperationsWaitForTheirEvent) {
  for (const bool own_stream : {false, true}) {
    Case c = ordinary_case(num_ranks(), TERN_LAYOUT_RANK_MAJOR);
    c.max_tokens = 200;
    c = c.normalized();
    const Scenario scenario(c);
    expect_right(
        c, run_threads(c.num_ranks, scenario.exchange_options(), options(), [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
          const auto stream = static_cast<cudaStream_t>(device.stream());
          const Stream producer;
          const Event produced, done;
          LateTokens late(scenario, rank, exchange, device);
          tern_launch launch;
          launch.stream = stream;
          if (tern_plan_route(late.plan.get(), &late.routing.routing, &launch, nullptr) != TERN_OK)
            throw std::runtime_error(tern_last_error());
          late.take_away(producer.get());
          produced.record(producer.get());
          launch.own_stream = own_stream ? 1 : 0;
          launch.after_event = produced.get();
          launch.done_event = done.get();
          if (tern_dispatch(late.plan.get(), &late.dispatch.args, &launch) != TERN_OK) throw std::runtime_error(tern_last_error());
          done.await(stream);
          device.synchronise();
          return late.dispatch.differences(late.placement);
        }));
  }
}

void work_with(RankDevice& device) {
  constexpr int64_t kNumBytes = 1 << 16;
  Bytes sent(kNumBytes, 7), back(kNumBytes);
  for (int turn = 0; turn < 50; ++turn) {
    const DeviceMemory memory(device, kNumBytes);
    spin(static_cast<cudaStream_t>(device.stream()), 1, 10);
    device.copy_in(memory.data(), sent.data(), kNumBytes);
    device.copy_out(back.data(), memory.data(), kNumBytes);
    EXPECT_EQ(back, sent);
  }
}

// While one rank waits in a route with exact extent, another thread of its process works with the same GPU. The other ranks come
// only when it has got somewhere.
TEST_P(GpuStreams, OtherThreadsRunDuringAnExactRoute) {
  if (num_ranks() == 1) GTEST_SKIP() << "one rank waits for nobody";
  const Case c = ordinary_case(num_ranks(), TERN_LAYOUT_EXPERT_MAJOR).normalized();
  const Scenario scenario(c);
  std::atomic<bool> routing{false}, worked{false};
  const auto await = [deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60)](const std::atomic<bool>& flag) {
    while (!flag && std::chrono::steady_clock::now() < deadline) std::this_thread::sleep_for(std::chrono::microseconds(100));
    return flag.load();
  };
  const std::unique_ptr<RankDevice> other = make_rank_device(options(), 0);  // rank 0's GPU
  std::thread worker([&] {
    if (!await(routing)) return;
    try {
      work_with(*other);
      worked = true;
    } catch (const std::exception& error) {
      ADD_FAILURE() << "beside the ranks: " << error.what();
    }
  });
  expect_right(
      c, run_threads(c.num_ranks, scenario.exchange_options(), options(), [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
        RoundTrip trip(scenario, rank, exchange, device);
        if (rank == 0) routing = true;
        if (rank != 0 && !await(worked)) throw std::runtime_error("the other thread of rank 0 did not get on");
        trip.run();
        return trip.differences();
      }));
  worker.join();
}

// The number of SMs of the last operation can be read back: at most what was asked for, the call before the exchange.
TEST_P(GpuStreams, NumberOfSms) {
  const int32_t per_gpu = (num_ranks() + options().num_devices - 1) / options().num_devices;
  for (const int32_t of_exchange : {0, 12})
    for (const int32_t of_call : {0, 4, 20}) {
      const bool beyond_the_exchanges = of_exchange > 0 && of_call > of_exchange;
      if (beyond_the_exchanges || std::max(of_exchange, of_call) * per_gpu > num_sms_of(0)) continue;
      Case c = ordinary_case(num_ranks(), TERN_LAYOUT_EXPERT_MAJOR);
      c.max_tokens = 500;
      c = c.normalized();
      const Scenario scenario(c);
      tern_exchange_options wanted = scenario.exchange_options();
      wanted.num_sms = of_exchange;
      expect_right(c, run_threads(c.num_ranks, wanted, options(), [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
                     RoundTrip trip(scenario, rank, exchange, device);
                     Launching launching;
                     launching.launch.num_sms = of_call;
                     trip.launch_with(launching);
                     trip.run();
                     tern_plan_info info;
                     EXPECT_EQ(tern_plan_get_info(trip.plan(), &info), TERN_OK);
                     const int32_t most = of_call > 0 ? of_call : of_exchange > 0 ? of_exchange : num_sms_of(device.index());
                     EXPECT_GT(info.num_sms, 0);
                     EXPECT_LE(info.num_sms, most);
                     return trip.differences();
                   }));
    }
}

// The number of tokens stands in device memory; what lies behind them is garbage.
TEST_P(GpuStreams, NumberOfTokensOnTheDevice) {
  for (const tern_layout layout : kLayouts)
    for (const tern_extent extent : {TERN_EXTENT_EXACT, TERN_EXTENT_WORST})
      for (const Spread spread : {Spread::kFull, Spread::kRandom, Spread::kEmpty, Spread::kNothing}) {
        Case c = ordinary_case(num_ranks(), layout);
        c.extent = extent;
        c.spread = spread;
        c.max_tokens = 70;
        c = c.normalized();
        const Scenario scenario(c);
        expect_right(c, run_threads(c.num_ranks, scenario.exchange_options(), options(),
                                    [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
                                      RoundTrip trip(scenario, rank, exchange, device);
                                      Launching launching;
                                      launching.count_on_device = true;
                                      trip.launch_with(launching);
                                      trip.run();
                                      return trip.differences();
                                    }));
      }
}

}  // namespace
}  // namespace tern::conformance
