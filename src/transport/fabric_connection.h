// SPDX-License-Identifier: Apache-2.0
// libfabric's objects of one endpoint, opened in order and closed in the reverse one. Shared by the endpoint and its regions.
#pragma once

#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>

#include <memory>
#include <string>
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
};

class FabricConnection {
 public:
  FabricConnection(FabricInfo info, int most_outstanding, int num_ranks);

  // Collective: exchanges addresses. `absent` as in EndpointOptions.
  void meet(Bootstrap& bootstrap, const std::vector<uint8_t>& absent, Deadline deadline);

  Region register_memory(const std::shared_ptr<FabricConnection>& self, void* address, size_t num_bytes);

  const fi_info& info() const { return *info_; }
  fid_cq* queue() const { return queue_.get(); }
  fid_ep* endpoint() const { return endpoint_.get(); }
  fi_addr_t address_of(int peer) const { return addresses_[peer]; }
  std::vector<Departing>& departing() { return departing_; }

 private:
  bool has_mode(int mr_mode_bit) const { return (info_->domain_attr->mr_mode & mr_mode_bit) != 0; }
  void open_queue(size_t num_entries);

  // Closed from the last to the first: the provider writes to `departing_` until the endpoint is closed.
  FabricInfo info_;
  std::vector<Departing> departing_;
  Owned<fid_fabric> fabric_;
  Owned<fid_domain> domain_;
  Owned<fid_av> peers_;
  Owned<fid_cq> queue_;
  Owned<fid_ep> endpoint_;

  std::vector<fi_addr_t> addresses_;
  uint64_t next_key_ = 1;
};

// For an endpoint that ends with messages under way. ofi_rxm (libfabric 1.17) crashes when it closes then, so what is layered over it stays
// open, and unused, until the process ends; its regions are closed all the same. Others close as always.
void abandon(std::shared_ptr<FabricConnection> connection);

}  // namespace tern
