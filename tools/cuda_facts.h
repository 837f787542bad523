// SPDX-License-Identifier: Apache-2.0
// What CUDA says of the GPUs that this process can use, and what a copy between each pair of them shows.
//
//   const CudaReport report = read_cuda();   // initialises CUDA: no rank may be forked from this process afterwards
//   if (report.problem.empty()) test_cuda_pairs(report);
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace tern::tools {

struct CudaDeviceFacts {
  std::string name;
  std::string pci_bus_id;
  int compute_major = 0, compute_minor = 0;
  int num_sms = 0;
  int64_t memory_bytes = 0;
  int64_t l2_bytes = 0;
  bool maps_memory = false;       // virtual memory management: what windows are made of
  bool shares_by_fd = false;      // between processes of one host
  bool shares_by_fabric = false;  // between hosts of one NVLink domain
};

struct CudaPairFacts {
  bool reaches = false;  // kernels on the first GPU can use memory of the second
  bool native_atomics = false;
  int performance_rank = 0;  // as the driver orders links, 0 is the fastest
  double gbps = 0;           // of a copy from the first to the second; 0: not tried, or it failed
  std::string problem;       // "": the copy arrived unchanged, or was not tried
};

struct CudaReport {
  std::string problem;          // why there are no GPUs; "": there are
  int driver = 0, runtime = 0;  // the CUDA versions that they speak, 13000 is 13.0
  std::vector<CudaDeviceFacts> devices;
  std::vector<CudaPairFacts> pairs;  // [num_devices, num_devices], the diagonal is empty

  const CudaPairFacts& pair(size_t from, size_t to) const { return pairs[from * devices.size() + to]; }
};

// Whether this build of the command knows CUDA.
bool built_with_cuda();

// Never throws: what cannot be asked is left at its default, and said in `problem` if nothing can be.
CudaReport read_cuda();

// One copy in each direction between every pair, one after the other, timed and compared.
void test_cuda_pairs(CudaReport& report);

// "13.0"
std::string cuda_version_text(int version);

}  // namespace tern::tools
