// SPDX-License-Identifier: Apache-2.0
// A rank on one network device: libfabric's objects, opened in order and closed in the reverse one, and the messages that are under way. Shared
// by the endpoint and its regions.
#pragma once

#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>

#include <memory>
#include <optional>
#include <vector>

#include "topology/bootstrap.h"
#include "transport/endpoint.h"
#include "transport/fabric_library.h"

namespace tern {

struct CloseFid {
  template <typename Fid>
  void operator()(Fid* object) const noexcept {
    fi_close(&object->fid);
  }
};
template <typename Fid>
using Owned = std::unique_ptr<Fid, CloseFid>;

// A message that has not left. The provider keeps its own state in `context` until it has, and hands it back, so it comes first.
struct Departing {
  fi_context2 context;
  int peer;
  size_t num_bytes;
};

class FabricConnection {
 public:
  struct Options {
    int device = 0;  // of the rank's, for which regions have as many registrations
    int num_ranks = 1;
    int most_outstanding = 1;  // messages; fewer if the provider has fewer
    int64_t gpu_memory = kNoGpuMemory;
  };
  FabricConnection(FabricInfo info, const Options& options);

  // Collective: exchanges addresses. `absent` as in EndpointOptions.
  void meet(Bootstrap& bootstrap, const std::vector<uint8_t>& absent, Deadline deadline);

  // Of this rank's GPU: as EndpointFacts.
  bool takes_gpu_memory() const { return takes_gpu_memory_; }
  Region::Registration register_memory(const std::shared_ptr<FabricConnection>& self, void* address, size_t num_bytes, int gpu);

  // The first bytes of a put as one message, with completion data if it is counted. 0: it is on its way; -FI_EAGAIN: not now; else libfabric's
  // error.
  ssize_t write(const Put& put, size_t num_bytes, uint64_t data);
  // By the context of a completion: the peer of a message that is on its way no more; none if it is not of one of ours.
  std::optional<int> settle(void* context);

  const fi_info& info() const { return *info_; }
  const char* device_name() const { return info_->domain_attr->name; }
  fid_cq* queue() const { return queue_.get(); }
  int most_outstanding() const { return static_cast<int>(departing_.size()); }
  int num_outstanding() const { return static_cast<int>(departing_.size() - idle_.size()); }
  size_t outstanding_bytes() const { return outstanding_bytes_; }

 private:
  bool has_mode(int mr_mode_bit) const { return (info_->domain_attr->mr_mode & mr_mode_bit) != 0; }
  void open_queue(size_t num_entries);
  int open_endpoint(int64_t gpu_memory);
  bool allow_gpu_memory(int64_t gpu_memory) const;

  // Closed from the last to the first: the provider writes to `departing_` until the endpoint is closed.
  FabricInfo info_;
  int device_;
  std::vector<Departing> departing_;
  Owned<fid_fabric> fabric_;
  Owned<fid_domain> domain_;
  Owned<fid_av> peers_;
  Owned<fid_cq> queue_;
  Owned<fid_ep> endpoint_;

  std::vector<Departing*> idle_;
  size_t outstanding_bytes_ = 0;
  std::vector<fi_addr_t> addresses_;
  uint64_t next_key_;
  bool takes_gpu_memory_ = false;
};

// For an endpoint that ends with messages under way. ofi_rxm (libfabric 1.17) crashes when it closes then, so what is layered over it stays
// open, and unused, until the process ends; its regions are closed all the same. Others close as always.
void abandon(std::shared_ptr<FabricConnection> connection);

}  // namespace tern
