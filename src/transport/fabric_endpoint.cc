// SPDX-License-Identifier: Apache-2.0
// The endpoint over libfabric. Built where libfabric's headers are.
#include <rdma/fi_errno.h>

#include <algorithm>
#include <array>
#include <deque>
#include <numeric>
#include <utility>

#include "base/error.h"
#include "transport/endpoint.h"
#include "transport/fabric_connection.h"
#include "transport/fabric_info.h"
#include "transport/meet.h"
#include "transport/notices.h"

namespace tern {
namespace {

class FabricEndpoint final : public Endpoint {
 public:
  FabricEndpoint(Bootstrap& bootstrap, const EndpointOptions& options, std::vector<FabricInfo> infos);

  ~FabricEndpoint() override {
    for (const auto& connection : connections_)
      if (connection->num_outstanding() != 0) abandon(connection);
  }

  void meet(Bootstrap& bootstrap, const std::vector<uint8_t>& absent, Deadline deadline) {
    for (const auto& connection : connections_) connection->meet(bootstrap, absent, deadline);
  }

  const EndpointFacts& facts() const override { return facts_; }
  Region register_memory(void* address, size_t num_bytes, int gpu) override;
  bool try_put(Put& put) override;
  bool progress() override;
  void flush(Deadline deadline) override;
  int num_outstanding() const override {
    return std::accumulate(ways_.begin(), ways_.end(), 0, [](int sum, const Way& way) { return sum + way.connection->num_outstanding(); });
  }
  int num_outstanding_to(int peer) const override { return num_outstanding_to_[peer]; }
  bool lost(int peer) const override { return !lost_[peer].empty(); }
  void try_again(int peer) override { lost_[peer].clear(); }
  bool complete(int peer, int channel, int64_t epoch) const override { return arrivals_.complete(peer, channel, epoch); }
  void retire(int peer, int channel, int64_t epoch) override { arrivals_.retire(peer, channel, epoch); }

 private:
  static constexpr size_t kBatch = 64;
  using Completions = std::array<fi_cq_data_entry, kBatch>;

  void check(const Put& put) const;
  size_t stripe_bytes(size_t num_bytes) const;
  bool send_message(const Put& put, size_t num_bytes, bool last);
  bool read(FabricConnection& connection);
  void take(FabricConnection& connection, const Completions& completions, size_t num_completions);
  void take_error(FabricConnection& connection);
  // The text is thrown at the end of the batch, so that nothing else in it gets lost.
  void lose(int peer, const FabricConnection& connection, const std::string& why);
  void count(uint64_t data);
  void throw_problem();

  // A device as puts choose among them.
  struct Way {
    FabricConnection* connection;
    uint64_t last_taken = 0;
  };

  int rank_;
  NoticeCode code_;
  Departures departures_;
  Arrivals arrivals_;
  std::vector<std::shared_ptr<FabricConnection>> connections_;  // one for each device
  std::vector<Way> ways_;                                       // the same
  uint64_t num_taken_ = 0;
  std::vector<int> num_outstanding_to_;
  std::vector<std::string> lost_;  // for each peer, "" or why it cannot be reached
  std::deque<Failure> problems_;   // to be thrown, one by each call that finds it here
  EndpointFacts facts_;
};

// All devices are of one provider, and alike in what the first is asked for.
FabricEndpoint::FabricEndpoint(Bootstrap& bootstrap, const EndpointOptions& options, std::vector<FabricInfo> infos)
    : rank_(bootstrap.rank()),
      code_(bootstrap.num_ranks(), options.num_channels, infos[0]->domain_attr->cq_data_size),
      departures_(bootstrap.num_ranks(), options.num_channels),
      arrivals_(bootstrap.num_ranks(), options.num_channels),
      num_outstanding_to_(bootstrap.num_ranks()),
      lost_(bootstrap.num_ranks()) {
  facts_.provider = infos[0]->fabric_attr->prov_name;
  facts_.traffic_class = infos[0]->tx_attr->tclass != FI_TC_UNSPEC;
  facts_.most_message_bytes = options.most_message_bytes == 0 ? SIZE_MAX : options.most_message_bytes;
  facts_.most_outstanding = options.most_outstanding;
  facts_.gpu_memory = true;
  for (FabricInfo& info : infos) {
    facts_.domains.emplace_back(info->domain_attr->name);
    facts_.most_message_bytes = std::min(facts_.most_message_bytes, info->ep_attr->max_msg_size);
    const FabricConnection::Options of_device{static_cast<int>(connections_.size()), bootstrap.num_ranks(), options.most_outstanding,
                                              options.gpu_memory};
    connections_.push_back(std::make_shared<FabricConnection>(std::move(info), of_device));
    ways_.push_back({connections_.back().get()});
    facts_.most_outstanding = std::min(facts_.most_outstanding, connections_.back()->most_outstanding());
    facts_.gpu_memory = facts_.gpu_memory && connections_.back()->takes_gpu_memory();
  }
}

Region FabricEndpoint::register_memory(void* address, size_t num_bytes, int gpu) {
  if (address == nullptr || num_bytes == 0)
    fail(TERN_INVALID_ARGUMENT, "transport: {} bytes at {:#x} are registered, there must be some", num_bytes,
         reinterpret_cast<uintptr_t>(address));
  if (gpu != kHostMemory && !facts_.gpu_memory)
    fail(TERN_UNSUPPORTED, "transport: provider {} does not take memory of GPU {} (TERN_FABRIC_GPU_MEMORY)", facts_.provider, gpu);
  std::vector<Region::Registration> registrations;
  for (const auto& connection : connections_) registrations.push_back(connection->register_memory(connection, address, num_bytes, gpu));
  return Region(static_cast<std::byte*>(address), num_bytes, std::move(registrations), gpu);
}

void FabricEndpoint::check(const Put& put) const {
  if (put.counted) departures_.check(put.peer, put.channel, put.epoch);
  if (put.peer == rank_) fail(TERN_INVALID_ARGUMENT, "transport: rank {} puts to itself; it can copy", rank_);
  if (put.from == nullptr) fail(TERN_INVALID_ARGUMENT, "transport: put to rank {} without a region to put from", put.peer);
  const auto outside = [&](uint64_t offset, uint64_t region_bytes) {
    return offset > region_bytes || put.num_bytes > region_bytes - offset;
  };
  const uint64_t from_bytes = put.from->remote().num_bytes;
  if (outside(put.from_offset, from_bytes) || outside(put.to_offset, put.to.num_bytes))
    fail(TERN_INVALID_ARGUMENT,
         "transport: put of {} bytes from offset {} of {} bytes to offset {} of {} bytes at rank {} is out of bounds", put.num_bytes,
         put.from_offset, from_bytes, put.to_offset, put.to.num_bytes, put.peer);
  if (!lost_[put.peer].empty()) throw Failure(TERN_SYSTEM_ERROR, lost_[put.peer]);
}

bool FabricEndpoint::try_put(Put& put) {
  check(put);
  while (true) {
    const size_t num_bytes = std::min(stripe_bytes(put.num_bytes), facts_.most_message_bytes);
    const bool whole = num_bytes == put.num_bytes;
    if (!send_message(put, num_bytes, whole && put.last)) return false;
    put.from_offset += num_bytes;
    put.to_offset += num_bytes;
    put.num_bytes -= num_bytes;
    if (whole) return true;
  }
}

// Each stripe is a device's share of what is left: large ones first, and small ones at the end that make the devices even, since each goes where
// the least is under way. So it does not matter how much of the put was sent before.
size_t FabricEndpoint::stripe_bytes(size_t num_bytes) const {
  if (ways_.size() == 1 || num_bytes < 2 * kLeastStripeBytes) return num_bytes;
  constexpr size_t kAlignment = 4096;
  const size_t share = (num_bytes / ways_.size() + kAlignment - 1) / kAlignment * kAlignment;
  return std::max(share, kLeastStripeBytes);
}

bool FabricEndpoint::send_message(const Put& put, size_t num_bytes, bool last) {
  const uint64_t num_messages = put.counted ? departures_.num_sent(put.peer, put.channel, put.epoch) + 1 : 0;
  if (num_messages > code_.most_messages())
    fail(TERN_CAPACITY_EXCEEDED,
         "transport: more than {} messages to rank {} in epoch {} of channel {}; put more bytes at once or use more epochs",
         code_.most_messages(), put.peer, put.epoch, put.channel);
  const uint64_t data = put.counted ? code_.encode({rank_, put.channel, put.epoch, last ? num_messages : 0}) : 0;
  // A device that is slow, or busy with other ranks, has more under way than others. Where all have as much, they take turns.
  std::ranges::sort(ways_, {}, [](const Way& way) { return std::pair(way.connection->outstanding_bytes(), way.last_taken); });
  for (Way& way : ways_) {
    const ssize_t code = way.connection->write(put, num_bytes, data);
    if (code == -FI_EAGAIN) continue;
    if (code != 0) {
      lose(put.peer, *way.connection, fabric_library().error_text(static_cast<int>(code)));
      throw_problem();
    }
    way.last_taken = ++num_taken_;
    ++num_outstanding_to_[put.peer];
    if (put.counted) departures_.count(put.peer, put.channel, put.epoch, last);
    return true;
  }
  return false;
}

bool FabricEndpoint::progress() {
  bool any = false;
  for (const auto& connection : connections_) any |= read(*connection);
  throw_problem();
  return any;
}

bool FabricEndpoint::read(FabricConnection& connection) {
  Completions completions;
  bool any = false;
  while (true) {
    const ssize_t got = fi_cq_read(connection.queue(), completions.data(), kBatch);
    if (got == -FI_EAVAIL) {
      take_error(connection);
    } else if (got == -FI_EAGAIN || got == -FI_EINTR || got == 0) {
      break;
    } else if (got < 0) {
      fail(TERN_SYSTEM_ERROR, "transport: fi_cq_read: {}", fabric_library().error_text(static_cast<int>(got)));
    } else {
      take(connection, completions, static_cast<size_t>(got));
    }
    any = true;
    if (got != static_cast<ssize_t>(kBatch) && got > 0) break;
  }
  return any;
}

void FabricEndpoint::take(FabricConnection& connection, const Completions& completions, size_t num_completions) {
  for (size_t i = 0; i < num_completions; ++i) {
    const fi_cq_data_entry& completion = completions[i];
    if ((completion.flags & FI_REMOTE_CQ_DATA) != 0) {
      count(completion.data);
    } else if (const auto peer = connection.settle(completion.op_context)) {
      --num_outstanding_to_[*peer];
    }
  }
}

void FabricEndpoint::count(uint64_t data) {
  try {
    arrivals_.count(code_.decode(data));
  } catch (const Failure& failure) {
    problems_.push_back(failure);
  }
}

void FabricEndpoint::take_error(FabricConnection& connection) {
  fi_cq_err_entry error = {};
  const ssize_t got = fi_cq_readerr(connection.queue(), &error, 0);
  if (got == -FI_EAGAIN) return;
  if (got < 0) fail(TERN_SYSTEM_ERROR, "transport: fi_cq_readerr: {}", fabric_library().error_text(static_cast<int>(got)));
  char buffer[256] = {};
  const char* detail = fi_cq_strerror(connection.queue(), error.prov_errno, error.err_data, buffer, sizeof(buffer));
  const std::string why = fmt::format("{}; {}", fabric_library().error_text(error.err), detail == nullptr ? "" : detail);
  const auto peer = connection.settle(error.op_context);
  if (!peer) {  // of what a peer sends; that peer finds out by itself
    problems_.emplace_back(TERN_SYSTEM_ERROR, fmt::format("transport: something that was put to rank {} failed: {}", rank_, why));
    return;
  }
  --num_outstanding_to_[*peer];
  lose(*peer, connection, why);
}

// By whichever device: what was on its way over it is missing.
void FabricEndpoint::lose(int peer, const FabricConnection& connection, const std::string& why) {
  if (!lost_[peer].empty()) return;
  lost_[peer] = fmt::format("transport: rank {} cannot be reached over {} on {}: {}", peer, facts_.provider, connection.device_name(), why);
  problems_.emplace_back(TERN_SYSTEM_ERROR, lost_[peer]);
}

void FabricEndpoint::throw_problem() {
  if (problems_.empty()) return;
  const Failure problem = problems_.front();
  problems_.pop_front();
  throw problem;
}

void FabricEndpoint::flush(Deadline deadline) {
  while (num_outstanding() != 0) {
    if (wait(deadline) || !deadline.passed()) continue;
    std::vector<int> peers;
    for (size_t r = 0; r < num_outstanding_to_.size(); ++r)
      if (num_outstanding_to_[r] != 0) peers.push_back(static_cast<int>(r));
    if (!peers.empty())
      fail(TERN_TIMEOUT, "transport: {} messages to {} have not left until the deadline", num_outstanding(), name_ranks(peers));
  }
}

void check(const EndpointOptions& options) {
  if (options.num_channels < 1 || options.most_outstanding < 1)
    fail(TERN_INVALID_ARGUMENT, "transport: {} channels and {} outstanding messages are asked for, at least 1 of each is needed",
         options.num_channels, options.most_outstanding);
}

}  // namespace

std::unique_ptr<Endpoint> make_endpoint(Bootstrap& bootstrap, const EndpointOptions& options, Deadline deadline) {
  check(options);
  const FabricChoices choices(options);
  const Offer offer{choices.providers(), choices.problem(), options.num_channels, static_cast<int>(options.num_devices())};
  const std::string provider = agree_on_provider(bootstrap, offer, options.absent, deadline);
  auto endpoint = std::make_unique<FabricEndpoint>(bootstrap, options, choices.devices_of(provider));
  endpoint->meet(bootstrap, options.absent, deadline);
  return endpoint;
}

}  // namespace tern
