// SPDX-License-Identifier: Apache-2.0
#include "transport/choose_devices.h"

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <ranges>
#include <system_error>
#include <utility>

namespace tern {
namespace {

// How many steps down two places have in common.
size_t closeness(const std::string& a, const std::string& b) {
  const std::string x = a + '/', y = b + '/';
  const auto differs = std::ranges::mismatch(x, y).in1;
  return static_cast<size_t>(std::count(x.begin(), differs, '/'));
}

}  // namespace

std::vector<size_t> choose_devices(const std::vector<NetworkDevice>& devices, const DeviceWish& wish) {
  const auto num_devices = static_cast<size_t>(wish.num_devices);
  std::vector<size_t> choice;
  for (size_t i = 0; i < devices.size(); ++i)
    if (!devices[i].place.empty()) choice.push_back(i);
  if (choice.empty()) return std::vector<size_t>(num_devices, 0);

  const auto distance = [&](size_t i) { return -static_cast<int64_t>(closeness(devices[i].place, wish.gpu_place)); };
  const int64_t least = std::ranges::min(choice | std::views::transform(distance));
  std::vector<size_t> closest = choice;
  std::erase_if(closest, [&](size_t i) { return distance(i) != least; });
  // Ranks that share their closest devices begin with different ones, as far apart as they can; then all go round in one direction.
  const size_t step = std::max(num_devices, closest.size() / static_cast<size_t>(wish.num_ranks));
  const size_t first = closest[static_cast<size_t>(wish.rank_idx) * step % closest.size()];
  std::ranges::sort(choice, {}, [&](size_t i) { return std::pair(distance(i), (i + devices.size() - first) % devices.size()); });
  const size_t num_found = choice.size();
  for (size_t i = num_found; i < num_devices; ++i) choice.push_back(choice[i % num_found]);
  choice.resize(num_devices);
  return choice;
}

std::string place_of(const std::string& link) {
  std::error_code ignored;
  const std::filesystem::path device = std::filesystem::canonical(link, ignored);
  if (device.empty()) return "";
  std::string numa_node;
  std::ifstream(device / "numa_node") >> numa_node;
  return numa_node + device.string();
}

std::string pci_place(const std::string& address) {
  if (address.empty()) return "";
  std::string name = address;
  std::ranges::transform(name, name.begin(), [](unsigned char letter) { return static_cast<char>(std::tolower(letter)); });
  return place_of("/sys/bus/pci/devices/" + name);
}

}  // namespace tern
