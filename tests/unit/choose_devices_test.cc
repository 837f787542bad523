// SPDX-License-Identifier: Apache-2.0
// The network devices that ranks take by themselves, on hosts as they are built.
#include "transport/choose_devices.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>

namespace tern {
namespace {

using testing::ElementsAre;

using Devices = std::vector<NetworkDevice>;

std::vector<std::string> names(const Devices& devices, const DeviceWish& wish) {
  std::vector<std::string> result;
  for (const size_t i : choose_devices(devices, wish)) result.push_back(devices[i].name);
  return result;
}

// What all ranks of a host take, and how often each device is taken.
std::vector<std::vector<std::string>> of_all(const Devices& devices, const std::vector<std::string>& gpus, int num_ranks, int num_devices) {
  std::vector<std::vector<std::string>> result;
  for (int r = 0; r < num_ranks; ++r)
    result.push_back(names(devices, {.gpu_place = gpus.empty() ? "" : gpus[static_cast<size_t>(r)],
                                     .rank_idx = r,
                                     .num_ranks = num_ranks,
                                     .num_devices = num_devices}));
  return result;
}

std::vector<int> uses(const Devices& devices, const std::vector<std::vector<std::string>>& taken) {
  std::vector<int> result;
  for (const NetworkDevice& device : devices) {
    result.push_back(0);
    for (const auto& of_rank : taken) result.back() += static_cast<int>(std::ranges::count(of_rank, device.name));
  }
  return result;
}

// A switch below a host bridge, GPU and NIC below it; four of them at each of two NUMA nodes.
std::string switch_of(int gpu) {
  return fmt::format("{}/sys/devices/pci0000:{:x}/0000:{:x}:01.0/switch{}", gpu / 4, gpu * 16, gpu * 16, gpu);
}

struct Hgx {
  Devices nics;
  std::vector<std::string> gpus;
};

Hgx make_hgx(int nics_per_gpu) {
  Hgx hgx;
  for (int gpu = 0; gpu < 8; ++gpu) {
    hgx.gpus.push_back(switch_of(gpu) + "/0000:00:00.0/gpu");
    for (int nic = 0; nic < nics_per_gpu; ++nic)
      hgx.nics.push_back({fmt::format("mlx5_{}", gpu * nics_per_gpu + nic), fmt::format("{}/0000:01:{:02x}.0/nic", switch_of(gpu), nic)});
  }
  return hgx;
}

TEST(ChooseDevices, EachGpuHasItsOwn) {
  const Hgx hgx = make_hgx(1);
  const auto one = of_all(hgx.nics, hgx.gpus, 8, 1);
  for (size_t r = 0; r < 8; ++r) EXPECT_THAT(one[r], ElementsAre(hgx.nics[r].name));
  // A process that has GPU 5 alone, or some of the GPUs in another order.
  EXPECT_THAT(names(hgx.nics, {.gpu_place = hgx.gpus[5]}), ElementsAre("mlx5_5"));
  EXPECT_THAT(names(hgx.nics, {.gpu_place = hgx.gpus[2], .rank_idx = 1, .num_ranks = 2}), ElementsAre("mlx5_2"));
  // The others of the same NUMA node come next, and all are taken equally often.
  const auto two = of_all(hgx.nics, hgx.gpus, 8, 2);
  EXPECT_THAT(two[0], ElementsAre("mlx5_0", "mlx5_1"));
  EXPECT_THAT(two[3], ElementsAre("mlx5_3", "mlx5_0"));
  EXPECT_THAT(two[7], ElementsAre("mlx5_7", "mlx5_4"));
  EXPECT_EQ(uses(hgx.nics, two), std::vector<int>(8, 2));
}

TEST(ChooseDevices, OneGpuHasFour) {
  const Hgx p5 = make_hgx(4);
  EXPECT_EQ(uses(p5.nics, of_all(p5.nics, p5.gpus, 8, 4)), std::vector<int>(32, 1));
  EXPECT_THAT(names(p5.nics, {.gpu_place = p5.gpus[6], .rank_idx = 6, .num_ranks = 8, .num_devices = 4}),
              ElementsAre("mlx5_24", "mlx5_25", "mlx5_26", "mlx5_27"));
  for (const int num_devices : {1, 2})
    for (int r = 0; r < 8; ++r)
      for (const size_t i : choose_devices(p5.nics, {p5.gpus[static_cast<size_t>(r)], r, 8, num_devices})) EXPECT_EQ(i / 4, size_t(r));
  // Two ranks that share a GPU share none of its devices.
  EXPECT_THAT(names(p5.nics, {p5.gpus[1], 0, 2, 2}), ElementsAre("mlx5_4", "mlx5_5"));
  EXPECT_THAT(names(p5.nics, {p5.gpus[1], 1, 2, 2}), ElementsAre("mlx5_6", "mlx5_7"));
}

// Two GPUs and two devices below each switch.
TEST(ChooseDevices, GpusOfOneSwitchTakeDifferentOnes) {
  const Hgx hgx = make_hgx(2);
  std::vector<std::string> gpus;
  for (size_t gpu = 0; gpu < 8; ++gpu) gpus.push_back(hgx.gpus[gpu / 2]);
  const Devices nics(hgx.nics.begin(), hgx.nics.begin() + 8);
  EXPECT_EQ(uses(nics, of_all(nics, gpus, 8, 1)), std::vector<int>(8, 1));
  EXPECT_EQ(uses(nics, of_all(nics, gpus, 8, 2)), std::vector<int>(8, 2));
}

TEST(ChooseDevices, RanksWithoutGpusSpread) {
  const Devices eight = make_hgx(1).nics;
  EXPECT_EQ(uses(eight, of_all(eight, {}, 8, 1)), std::vector<int>(8, 1));
  EXPECT_EQ(uses(eight, of_all(eight, {}, 16, 1)), std::vector<int>(8, 2));
  EXPECT_EQ(uses(eight, of_all(eight, {}, 4, 2)), std::vector<int>(8, 1));
  EXPECT_EQ(of_all(eight, {}, 2, 1), (std::vector<std::vector<std::string>>{{"mlx5_0"}, {"mlx5_4"}})) << "one at each NUMA node";
  const Devices two(eight.begin(), eight.begin() + 2);
  EXPECT_EQ(uses(two, of_all(two, {}, 8, 1)), std::vector<int>(2, 4));
  EXPECT_EQ(uses(two, of_all(two, {}, 8, 2)), std::vector<int>(2, 8));
}

TEST(ChooseDevices, FewerThanAreWantedAreTakenAgain) {
  const Devices two{{"a", "0/x/a"}, {"b", "0/x/b"}};
  EXPECT_THAT(names(two, {.num_devices = 5}), ElementsAre("a", "b", "a", "b", "a"));
  EXPECT_THAT(names(two, {.gpu_place = "0/x/b/gpu", .num_devices = 3}), ElementsAre("b", "a", "b"));
}

TEST(ChooseDevices, TheFirstWhereNoPlaceIsKnown) {
  const Devices tcp{{"eth0", ""}, {"docker0", ""}, {"lo", ""}};
  for (int r = 0; r < 8; ++r) EXPECT_THAT(names(tcp, {"0/x/gpu", r, 8, 2}), ElementsAre("eth0", "eth0"));
  const Devices mixed{{"rxe0", ""}, {"mlx5_0", "0/x/nic"}};
  EXPECT_THAT(names(mixed, {}), ElementsAre("mlx5_0"));
}

// Names of steps count as a whole.
TEST(ChooseDevices, StepsAreCompared) {
  const Devices devices{{"far", "0/pci0000:1/a"}, {"near", "0/pci0000:10/b"}};
  EXPECT_THAT(names(devices, {.gpu_place = "0/pci0000:10/c"}), ElementsAre("near"));
}

TEST(PlaceOf, IsWhereALinkLeads) {
  namespace fs = std::filesystem;
  const fs::path root = fs::path(testing::TempDir()) / fmt::format("choose_devices_test-{}", ::getpid());
  fs::create_directories(root / "devices/pci0000:15/0000:17:00.0");
  std::ofstream(root / "devices/pci0000:15/0000:17:00.0/numa_node") << "1\n";
  fs::create_directory_symlink(root / "devices/pci0000:15/0000:17:00.0", root / "link");
  EXPECT_EQ(place_of(root / "link"), fmt::format("1{}/devices/pci0000:15/0000:17:00.0", fs::canonical(root).string()));
  EXPECT_EQ(place_of(root / "nothing"), "");
  fs::remove_all(root);
  EXPECT_EQ(pci_place(""), "");
  EXPECT_EQ(pci_place("ffff:ff:1f.7"), "");
}

}  // namespace
}  // namespace tern
