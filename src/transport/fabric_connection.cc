// SPDX-License-Identifier: Apache-2.0
#include "transport/fabric_connection.h"

#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#include <algorithm>
#include <functional>
#include <mutex>
#include <string_view>
#include <utility>

#include "base/error.h"
#include "base/random.h"

namespace tern {
namespace {

constexpr int kMostTries = 16;  // for an address that nobody else has taken

// Opens one object: `open` is libfabric's call, which fills the pointer.
template <typename Fid, typename Open>
Owned<Fid> open_fid(const char* call, const fi_info& info, Open open) {
  Fid* object = nullptr;
  const int code = open(&object);
  if (code != 0)
    fail(TERN_SYSTEM_ERROR, "transport: {} of provider {}, device {}: {}", call, info.fabric_attr->prov_name, info.domain_attr->name,
         fabric_library().error_text(code));
  return Owned<Fid>(object);
}

void check(const char* call, int code) {
  if (code != 0) fail(TERN_SYSTEM_ERROR, "transport: {}: {}", call, fabric_library().error_text(code));
}

// Large enough for the addresses of all providers (sockaddr_ib has 48 bytes).
struct AddressMessage {
  uint64_t num_bytes = 0;
  std::byte bytes[120] = {};
};

struct Registered {
  std::shared_ptr<FabricConnection> connection;  // outlives `memory`
  Owned<fid_mr> memory;
};

// The first of the keys that say where a peer may write. Nobody else has them: an address may soon be another process's, and who still writes to
// the one that had it (over TCP the connection is made anew) must not hit that one's memory. All keys are shorter by a bit, to count on from here.
uint64_t first_key(const fi_info& info) {
  const int num_bits = 8 * static_cast<int>(std::clamp<size_t>(info.domain_attr->mr_key_size, 1, sizeof(uint64_t))) - 1;
  return random_value<uint64_t>("transport") >> (64 - num_bits);
}

size_t num_departing(const fi_info& info, int most_outstanding) {
  const auto most = static_cast<size_t>(most_outstanding);
  return info.tx_attr->size == 0 ? most : std::min(most, info.tx_attr->size);
}

}  // namespace

FabricConnection::FabricConnection(FabricInfo info, const Options& options)
    : info_(std::move(info)),
      device_(options.device),
      departing_(num_departing(*info_, options.most_outstanding)),
      next_key_(first_key(*info_)) {
  for (Departing& message : departing_) idle_.push_back(&message);
  const auto& i = *info_;
  fabric_ = open_fid<fid_fabric>("fi_fabric", i, [&](fid_fabric** out) { return fabric_library().fabric(i.fabric_attr, out, nullptr); });
  domain_ = open_fid<fid_domain>("fi_domain", i, [&](fid_domain** out) { return fi_domain(fabric_.get(), info_.get(), out, nullptr); });
  fi_av_attr peers = {};
  peers.count = static_cast<size_t>(options.num_ranks);
  peers_ = open_fid<fid_av>("fi_av_open", i, [&](fid_av** out) { return fi_av_open(domain_.get(), &peers, out, nullptr); });
  // Room for what leaves, and for some messages of each peer: more wait in the provider until the queue is read.
  open_queue(departing_.size() + size_t(options.num_ranks) * 16 + 1024);
  int code = 0;
  for (int num_tries = 0; num_tries < kMostTries; ++num_tries) {
    code = open_endpoint(options.gpu_memory);
    if (code != -FI_EADDRINUSE) break;
  }
  check("fi_enable", code);
}

// Returns what fi_enable does: -FI_EADDRINUSE where another process has come to the same port meanwhile, which is likely where few are allowed
// (FI_TCP_PORT_LOW_RANGE). The next endpoint has another one.
int FabricConnection::open_endpoint(int64_t gpu_memory) {
  endpoint_.reset();
  endpoint_ = open_fid<fid_ep>("fi_endpoint", *info_, [&](fid_ep** out) { return fi_endpoint(domain_.get(), info_.get(), out, nullptr); });
  takes_gpu_memory_ = allow_gpu_memory(gpu_memory);
  check("fi_ep_bind (addresses)", fi_ep_bind(endpoint_.get(), &peers_->fid, 0));
  check("fi_ep_bind (completions)", fi_ep_bind(endpoint_.get(), &queue_->fid, FI_TRANSMIT | FI_RECV));
  return fi_enable(endpoint_.get());
}

// A provider that has to say so refuses where its device cannot get at the GPU's memory by itself. Those that do not know the option are older,
// and do nothing else.
bool FabricConnection::allow_gpu_memory(int64_t gpu_memory) const {
  if (gpu_memory == kNoGpuMemory || (info_->caps & FI_HMEM) == 0) return false;
  if (gpu_memory == kAnyGpuMemory) return true;
  const int required = FI_HMEM_P2P_REQUIRED;
  const int code = fi_setopt(&endpoint_->fid, FI_OPT_ENDPOINT, FI_OPT_FI_HMEM_P2P, &required, sizeof(required));
  return code == 0 || code == -FI_ENOPROTOOPT;
}

// Nobody sleeps at the queue: for that the provider "net" has a thread of its own, which then reads all that comes, and wakes ours for each
// message; or none (FI_WAIT_FD from libfabric 1.17 on), and that was slower than looking, too.
void FabricConnection::open_queue(size_t num_entries) {
  fi_cq_attr attributes = {};
  attributes.format = FI_CQ_FORMAT_DATA;
  attributes.size = num_entries;
  attributes.wait_obj = FI_WAIT_NONE;
  queue_ = open_fid<fid_cq>("fi_cq_open", *info_, [&](fid_cq** out) { return fi_cq_open(domain_.get(), &attributes, out, nullptr); });
}

void FabricConnection::meet(Bootstrap& bootstrap, const std::vector<uint8_t>& absent, Deadline deadline) {
  AddressMessage mine;
  size_t num_bytes = sizeof(mine.bytes);
  check("fi_getname", fi_getname(&endpoint_->fid, mine.bytes, &num_bytes));
  mine.num_bytes = num_bytes;
  std::vector<AddressMessage> all(bootstrap.num_ranks());
  bootstrap.allgather(&mine, all.data(), sizeof(mine), deadline);
  addresses_.assign(all.size(), FI_ADDR_UNSPEC);
  for (size_t r = 0; r < all.size(); ++r) {
    if (!absent.empty() && absent[r] != 0) continue;
    const int inserted = fi_av_insert(peers_.get(), all[r].bytes, 1, &addresses_[r], 0, nullptr);
    if (inserted != 1)
      fail(TERN_SYSTEM_ERROR, "transport: the address of rank {} ({} bytes) is none for provider {}, device {}: fi_av_insert gave {}", r,
           all[r].num_bytes, info_->fabric_attr->prov_name, device_name(), inserted);
  }
}

Region::Registration FabricConnection::register_memory(const std::shared_ptr<FabricConnection>& self, void* address, size_t num_bytes,
                                                       int gpu) {
  const iovec memory = {address, num_bytes};
  fi_mr_attr attributes = {};
  attributes.mr_iov = &memory;
  attributes.iov_count = 1;
  attributes.access = FI_WRITE | FI_REMOTE_WRITE;
  attributes.requested_key = next_key_;
  if (gpu != kHostMemory) {
    attributes.iface = FI_HMEM_CUDA;
    attributes.device.cuda = gpu;
  }
  fid_mr* opened = nullptr;
  const int code = fi_mr_regattr(domain_.get(), &attributes, 0, &opened);
  if (code != 0)
    fail(TERN_SYSTEM_ERROR, "transport: cannot register {} bytes of {} with provider {}, device {}: {}; {}", num_bytes,
         gpu == kHostMemory ? "memory" : fmt::format("GPU {}", gpu), info_->fabric_attr->prov_name, device_name(),
         fabric_library().error_text(code),
         gpu == kHostMemory ? "is the limit of locked memory (ulimit -l) high enough?"
                            : "is nvidia_peermem loaded, or can the kernel pass it on as dmabuf?");
  ++next_key_;  // ours, if the provider has none of its own
  auto owner = std::make_shared<Registered>(Registered{self, Owned<fid_mr>(opened)});
  if (has_mode(FI_MR_ENDPOINT)) {
    check("fi_mr_bind", fi_mr_bind(opened, &endpoint_->fid, 0));
    check("fi_mr_enable", fi_mr_enable(opened));
  }
  const uint64_t key = fi_mr_key(opened);
  if (key == FI_KEY_NOTAVAIL) fail(TERN_UNSUPPORTED, "transport: provider {} has keys of more than 8 bytes", info_->fabric_attr->prov_name);
  const uint64_t base = has_mode(FI_MR_VIRT_ADDR) ? reinterpret_cast<uint64_t>(address) : 0;
  return {{base, key}, fi_mr_desc(opened), std::move(owner)};
}

ssize_t FabricConnection::write(const Put& put, size_t num_bytes, uint64_t data) {
  if (idle_.empty()) return -FI_EAGAIN;
  Departing* message = idle_.back();
  const RemoteRegion::Access& access = put.to.devices[static_cast<size_t>(device_)];
  iovec from = {put.from->address() + put.from_offset, num_bytes};
  fi_rma_iov to = {access.base + put.to_offset, num_bytes, access.key};
  void* descriptor = put.from->descriptor(device_);
  fi_msg_rma rma = {};
  rma.msg_iov = &from;
  rma.desc = &descriptor;
  rma.iov_count = 1;
  rma.addr = addresses_[static_cast<size_t>(put.peer)];
  rma.rma_iov = &to;
  rma.rma_iov_count = 1;
  rma.context = &message->context;
  rma.data = data;
  // Of memory that the host cannot read nothing can be copied before the call returns.
  const uint64_t inject = num_bytes <= info_->tx_attr->inject_size && !put.from->is_on_gpu() ? FI_INJECT : 0;
  const uint64_t confirmed = put.confirmed ? FI_DELIVERY_COMPLETE : 0;
  const uint64_t counted = put.counted ? FI_REMOTE_CQ_DATA : 0;
  const ssize_t code = fi_writemsg(endpoint_.get(), &rma, counted | FI_COMPLETION | confirmed | inject);
  if (code != 0) return code;
  idle_.pop_back();
  message->peer = put.peer;
  message->num_bytes = num_bytes;
  outstanding_bytes_ += num_bytes;
  return 0;
}

std::optional<int> FabricConnection::settle(void* context) {
  const std::less<const void*> before;
  if (before(context, departing_.data()) || !before(context, departing_.data() + departing_.size())) return std::nullopt;
  auto* message = static_cast<Departing*>(context);
  outstanding_bytes_ -= message->num_bytes;
  idle_.push_back(message);
  return message->peer;
}

void abandon(std::shared_ptr<FabricConnection> connection) {
  if (!std::string_view(connection->info().fabric_attr->prov_name).ends_with(";ofi_rxm")) return;
  static std::mutex mutex;
  static auto* const abandoned = new std::vector<std::shared_ptr<FabricConnection>>();
  const std::lock_guard lock(mutex);
  abandoned->push_back(std::move(connection));
}

}  // namespace tern
