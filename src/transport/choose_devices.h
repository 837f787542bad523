// SPDX-License-Identifier: Apache-2.0
// Which network devices a rank takes if nobody names them: those closest to its GPU, spread over the ranks that are equally close.
//
//   const std::vector<size_t> taken = choose_devices(devices, {.gpu_place = pci_place("0000:1b:00.0"), .rank_idx = 3, .num_ranks = 8});
#pragma once

#include <string>
#include <vector>

namespace tern {

struct NetworkDevice {
  std::string name;
  std::string place;  // as of pci_place(); "": not known, or not on a PCI bus
};

struct DeviceWish {
  std::string gpu_place = {};  // "": the rank has no GPU
  int rank_idx = 0;            // of the ranks of its host
  int num_ranks = 1;
  int num_devices = 1;
};

// Indices of `devices`, of which there is one at least; `num_devices` of them, some more than once if there are fewer. Devices are the closer
// the more their place has in common with the GPU's; of those that are equally close, which without a GPU are all, ranks of one host take
// different ones. Where no place is known, as of TCP, it is the first again and again: others may lead elsewhere.
std::vector<size_t> choose_devices(const std::vector<NetworkDevice>& devices, const DeviceWish& wish);

// Where a device is, from the NUMA node down through the tree of PCI bridges, by what `link` leads to in sysfs; "" if to nothing.
std::string place_of(const std::string& link);
// By its address, "0000:1b:00.0", in any case of letters; "" for none.
std::string pci_place(const std::string& address);

}  // namespace tern
