// SPDX-License-Identifier: Apache-2.0
// Kernels that wait for peers, and what may keep a peer from running: other exchanges in another order, ranks on the same GPU, compute that
// takes all SMs, a runtime that waits for the GPU. Whatever waits in vain ends at its deadline and fails the test.
#include <atomic>
#include <chrono>
#include <tern/tern.hpp>
#include <thread>

#include "conformance/random.h"
#include "gpu/cases.h"
#include "gpu/cuda_support.h"
#include "gpu/support.h"

namespace tern::conformance {
namespace {

// Runs `work(device_index)` on a thread for each device, over and over, until destroyed. Its errors are failures of the test.
class Beside {
 public:
  Beside(int32_t num_devices, std::function<void(int32_t)> work) {
    load_spin(num_devices);
    for (int32_t device = 0; device < num_devices; ++device)
      threads_.emplace_back([this, device, work] {
        try {
          require_cuda(cudaSetDevice(device), "cudaSetDevice");
          while (!stop_) {
            work(device);
            ++num_turns_;
          }
        } catch (const std::exception& error) {
          ADD_FAILURE() << "beside the ranks, device " << device << ": " << error.what();
        }
      });
  }
  ~Beside() {
    stop_ = true;
    for (std::thread& thread : threads_) thread.join();
  }
  int64_t num_turns() const { return num_turns_; }

 private:
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> num_turns_{0};
  std::vector<std::thread> threads_;
};

// What the kernels of all ranks of a GPU take at the most, two exchanges each.
constexpr int kSmsOfRanks = 64;

class GpuDeadlock : public testing::TestWithParam<Placing> {
 protected:
  void SetUp() override {
    if (test_device() == TERN_DEVICE_CPU) GTEST_SKIP() << "needs GPUs: CPU ranks do not enqueue";
    TERN_NEED_GPU();
  }

  int32_t num_ranks() const { return GetParam().num_ranks; }
  RunOptions options() const { return gpu_options(num_ranks(), GetParam().most_gpus); }
  int32_t num_sms() const {
    const int32_t ranks_per_gpu = (num_ranks() + options().num_devices - 1) / options().num_devices;
    return std::max(1, kSmsOfRanks / (2 * ranks_per_gpu));
  }
  Case worst_case(uint64_t seed) const {
    Case c = ordinary_case(num_ranks(), TERN_LAYOUT_EXPERT_MAJOR);
    c.seed = seed;
    c.extent = TERN_EXTENT_WORST;
    c.max_tokens = 100;
    return c.normalized();
  }
  // Round trips of all ranks while `beside` goes on.
  void expect_right_beside(const Beside& beside) const {
    std::vector<Case> cases;
    for (const tern_layout layout : kLayouts)
      for (const tern_extent extent : {TERN_EXTENT_EXACT, TERN_EXTENT_WORST})
        for (const bool window : {false, true}) {
          Case c = ordinary_case(num_ranks(), layout);
          c.extent = extent;
          c.max_tokens = 100;
          c.window_dispatch = c.window_combine = window;
          c.delays = true;
          cases.push_back(c.normalized());
        }
    expect_all_right(cases, [&](const Case& c) {
      const Scenario scenario(c);
      tern_exchange_options wanted = scenario.exchange_options();
      wanted.num_sms = num_sms();
      return run_threads(c.num_ranks, wanted, options(), [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
        RoundTrip trip(scenario, rank, exchange, device);
        for (int64_t repeat = 0; repeat < scaled(5); ++repeat) trip.run();
        return trip.differences();
      });
    });
    EXPECT_GT(beside.num_turns(), 0);
  }
};

INSTANTIATE_TEST_SUITE_P(Ranks, GpuDeadlock, testing::Values(Placing{2, 2}, Placing{2, 1}, Placing{4, 4}, Placing{4, 1}, Placing{8, 4}),
                         placing_name);

// All operations of both trips are on their streams before any of them is awaited; which comes first differs from rank to rank.
std::vector<std::string> run_in_drawn_order(RoundTrip& a, RoundTrip& b, int32_t rank) {
  for (int64_t batch = 0; batch < scaled(100); ++batch) {
    a.prepare(static_cast<int>(batch));
    b.prepare(static_cast<int>(batch));
    const bool a_first = Draw(1, rank, batch).one_in(0, 2) != (rank % 2 == 0);
    (a_first ? a : b).enqueue();
    (a_first ? b : a).enqueue();
    (a_first ? a : b).settle();
    (a_first ? b : a).settle();
    if (!a.differences().empty() || !b.differences().empty()) break;
  }
  std::vector<std::string> differences = a.differences();
  differences.insert(differences.end(), b.differences().begin(), b.differences().end());
  return differences;
}

TEST_P(GpuDeadlock, TwoLanesInOppositeOrder) {
  Case c = worst_case(1);
  c.num_lanes = 2;
  const Scenario a(c);
  c.seed = 2;
  c.lane = 1;
  const Scenario b(c);
  tern_exchange_options wanted = a.exchange_options(2);
  wanted.num_sms = num_sms();
  expect_right(c, run_threads(num_ranks(), wanted, options(), [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
                 const std::unique_ptr<RankDevice> other = tools::make_rank_device(device.type(), device.index());
                 RoundTrip trip_a(a, rank, exchange, device), trip_b(b, rank, exchange, *other);
                 return run_in_drawn_order(trip_a, trip_b, rank);
               }));
}

TEST_P(GpuDeadlock, TwoExchangesInOppositeOrder) {
  const Scenario a(worst_case(3)), b(worst_case(4));
  const RunOptions how = options();
  const std::vector<Group> groups = Group::local(num_ranks());
  std::vector<std::vector<std::string>> differences(groups.size());
  std::vector<std::thread> threads;
  for (int32_t rank = 0; rank < num_ranks(); ++rank) {
    threads.emplace_back([&, rank] {
      const auto self = static_cast<size_t>(rank);
      try {
        const std::unique_ptr<RankDevice> device_a = make_rank_device(how, rank), device_b = make_rank_device(how, rank);
        tern_exchange_options wanted = a.exchange_options();
        wanted.num_sms = num_sms();
        const Exchange first(groups[self], with(wanted, how, *device_a)), second(groups[self], with(wanted, how, *device_b));
        RoundTrip trip_a(a, rank, first.get(), *device_a), trip_b(b, rank, second.get(), *device_b);
        differences[self] = run_in_drawn_order(trip_a, trip_b, rank);
      } catch (const std::exception& error) {
        differences[self].push_back(fmt::format("rank {}: {}", rank, error.what()));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& of_rank : differences) expect_right(a.c, of_rank);
}

// A kernel of several milliseconds takes every SM that the exchanges leave.
TEST_P(GpuDeadlock, ComputeOnTheOtherSms) {
  const Beside beside(options().num_devices, [](int32_t device) {
    thread_local const Stream stream;
    spin(stream.get(), std::max(1, num_sms_of(device) - kSmsOfRanks), 3000);
    require_cuda(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  });
  expect_right_beside(beside);
}

// It takes all of them: operations start when it ends, and it starts when they end.
TEST_P(GpuDeadlock, ComputeOnAllSms) {
  const Beside beside(options().num_devices, [](int32_t device) {
    thread_local const Stream stream;
    spin(stream.get(), num_sms_of(device), 2000);
    require_cuda(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  });
  expect_right_beside(beside);
}

// These wait for the GPU, or make the driver wait.
TEST_P(GpuDeadlock, AllocationsBeside) {
  // cudaFree waits for all kernels of its GPU, and no other kernel can be launched there meanwhile: a rule of CUDA.
  if (options().num_devices < GetParam().num_ranks) GTEST_SKIP() << "ranks that share a GPU must not call cudaFree while an operation runs";
  const Beside beside(options().num_devices, [turn = std::make_shared<std::atomic<int>>(0)](int32_t) {
    void* memory = nullptr;
    require_cuda(cudaMalloc(&memory, size_t{1} << (12 + (*turn)++ % 15)), "cudaMalloc");
    require_cuda(cudaFree(memory), "cudaFree");
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // or exchanges that are being made hardly get at the driver
  });
  expect_right_beside(beside);
}

// Making and ending a plan takes and gives back memory, while other ranks are an operation ahead.
TEST_P(GpuDeadlock, PlansComeAndGo) {
  for (const tern_extent extent : {TERN_EXTENT_WORST, TERN_EXTENT_EXACT}) {
    Case c = worst_case(6);
    c.extent = extent;
    c.delays = true;
    const Scenario scenario(c);
    tern_exchange_options wanted = scenario.exchange_options();
    wanted.num_sms = num_sms();
    expect_right(c, run_threads(num_ranks(), wanted, options(), [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
                   std::vector<std::string> differences;
                   for (int64_t repeat = 0; repeat < scaled(50) && differences.empty(); ++repeat) {
                     RoundTrip trip(scenario, rank, exchange, device);
                     trip.run();
                     differences = trip.differences();
                   }
                   return differences;
                 }));
  }
}

// So does an exchange.
TEST_P(GpuDeadlock, ExchangesComeAndGoBesideOthers) {
  const Scenario scenario(worst_case(7));
  const RunOptions how = options();
  tern_exchange_options wanted = scenario.exchange_options();
  wanted.num_sms = num_sms();
  const std::vector<Group> groups = Group::local(num_ranks());
  std::vector<std::vector<std::string>> differences(groups.size());
  std::vector<std::thread> threads;
  for (int32_t rank = 0; rank < num_ranks(); ++rank) {
    threads.emplace_back([&, rank] {
      const auto self = static_cast<size_t>(rank);
      try {
        const std::unique_ptr<RankDevice> device = make_rank_device(how, rank);
        for (int64_t repeat = 0; repeat < scaled(20); ++repeat) {
          const Exchange exchange(groups[self], with(wanted, how, *device));
          RoundTrip trip(scenario, rank, exchange.get(), *device);
          trip.run();
          differences[self] = trip.differences();
        }
      } catch (const std::exception& error) {
        differences[self].push_back(fmt::format("rank {}: {}", rank, error.what()));
      }
    });
  }
  expect_right(scenario.c, run_threads(num_ranks(), wanted, how, [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
                 RoundTrip trip(scenario, rank, exchange, device);
                 for (int64_t repeat = 0; repeat < scaled(100); ++repeat) trip.run();
                 return trip.differences();
               }));
  for (std::thread& thread : threads) thread.join();
  for (const auto& of_rank : differences) expect_right(scenario.c, of_rank);
}

// On the exchange's own stream, between an event of the caller's stream and one that it waits for; the caller's stream computes meanwhile.
TEST_P(GpuDeadlock, OwnStreamBesideComputeOfTheCaller) {
  const Scenario scenario(worst_case(5));
  tern_exchange_options wanted = scenario.exchange_options();
  wanted.num_sms = num_sms();
  load_spin(options().num_devices);
  expect_right(scenario.c, run_threads(num_ranks(), wanted, options(), [&](int32_t rank, tern_exchange* exchange, RankDevice& device) {
                 const auto stream = static_cast<cudaStream_t>(device.stream());
                 const int num_blocks = std::max(1, num_sms_of(device.index()) - kSmsOfRanks);
                 const Event before, behind;
                 RoundTrip trip(scenario, rank, exchange, device);
                 Launching launching;
                 launching.launch.own_stream = 1;
                 launching.launch.after_event = before.get();
                 launching.launch.done_event = behind.get();
                 launching.before = [&] { before.record(stream); };
                 launching.after = [&] {
                   spin(stream, num_blocks, 500);
                   behind.await(stream);
                 };
                 trip.launch_with(launching);
                 for (int batch = 0; batch < 10; ++batch) {
                   trip.prepare(batch);
                   trip.enqueue();
                   trip.settle();
                 }
                 return trip.differences();
               }));
}

}  // namespace
}  // namespace tern::conformance
