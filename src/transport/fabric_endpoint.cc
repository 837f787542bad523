// SPDX-License-Identifier: Apache-2.0
// The endpoint over libfabric. Built where libfabric's headers are.
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#include <algorithm>
#include <array>
#include <deque>
#include <functional>

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
  FabricEndpoint(Bootstrap& bootstrap, const EndpointOptions& options, FabricInfo info);

  ~FabricEndpoint() override {
    if (num_outstanding() != 0) abandon(connection_);
  }

  void meet(Bootstrap& bootstrap, const std::vector<uint8_t>& absent, Deadline deadline) { connection_->meet(bootstrap, absent, deadline); }

  const EndpointFacts& facts() const override { return facts_; }
  Region register_memory(void* address, size_t num_bytes) override { return connection_->register_memory(connection_, address, num_bytes); }
  bool try_put(Put& put) override;
  bool progress() override;
  void flush(Deadline deadline) override;
  int num_outstanding() const override { return static_cast<int>(connection_->departing().size() - idle_.size()); }
  int num_outstanding_to(int peer) const override { return num_outstanding_to_[peer]; }
  bool lost(int peer) const override { return !lost_[peer].empty(); }
  void try_again(int peer) override { lost_[peer].clear(); }
  bool complete(int peer, int channel, int64_t epoch) const override { return arrivals_.complete(peer, channel, epoch); }
  void retire(int peer, int channel, int64_t epoch) override { arrivals_.retire(peer, channel, epoch); }

 private:
  static constexpr size_t kBatch = 64;
  using Completions = std::array<fi_cq_data_entry, kBatch>;

  void check(const Put& put) const;
  bool send_message(const Put& put, size_t num_bytes, bool last);
  void take(const Completions& completions, size_t num_completions);
  void take_error();
  // The message of a completion; nullptr if it is not of one of ours.
  Departing* departed(void* context);
  // The text is thrown at the end of the batch, so that nothing else in it gets lost.
  void lose(int peer, const std::string& why);
  void count(uint64_t data);
  void throw_problem();

  int rank_;
  NoticeCode code_;
  Departures departures_;
  Arrivals arrivals_;
  std::shared_ptr<FabricConnection> connection_;
  std::vector<Departing*> idle_;
  std::vector<int> num_outstanding_to_;
  std::vector<std::string> lost_;  // for each peer, "" or why it cannot be reached
  std::deque<Failure> problems_;   // to be thrown, one by each call that finds it here
  EndpointFacts facts_;
};

FabricEndpoint::FabricEndpoint(Bootstrap& bootstrap, const EndpointOptions& options, FabricInfo info)
    : rank_(bootstrap.rank()),
      code_(bootstrap.num_ranks(), options.num_channels, info->domain_attr->cq_data_size),
      departures_(bootstrap.num_ranks(), options.num_channels),
      arrivals_(bootstrap.num_ranks(), options.num_channels),
      num_outstanding_to_(bootstrap.num_ranks()),
      lost_(bootstrap.num_ranks()) {
  const size_t provider_messages = info->tx_attr->size == 0 ? size_t(options.most_outstanding) : info->tx_attr->size;
  facts_.most_outstanding = static_cast<int>(std::min<size_t>(options.most_outstanding, provider_messages));
  facts_.provider = info->fabric_attr->prov_name;
  facts_.domain = info->domain_attr->name;
  facts_.traffic_class = info->tx_attr->tclass != FI_TC_UNSPEC;
  facts_.most_message_bytes =
      std::min(options.most_message_bytes == 0 ? SIZE_MAX : options.most_message_bytes, info->ep_attr->max_msg_size);
  connection_ = std::make_shared<FabricConnection>(std::move(info), facts_.most_outstanding, bootstrap.num_ranks());
  for (Departing& message : connection_->departing()) idle_.push_back(&message);
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
    const size_t num_bytes = std::min(put.num_bytes, facts_.most_message_bytes);
    const bool whole = num_bytes == put.num_bytes;
    if (!send_message(put, num_bytes, whole && put.last)) return false;
    put.from_offset += num_bytes;
    put.to_offset += num_bytes;
    put.num_bytes -= num_bytes;
    if (whole) return true;
  }
}

bool FabricEndpoint::send_message(const Put& put, size_t num_bytes, bool last) {
  if (idle_.empty()) return false;
  const uint64_t num_messages = put.counted ? departures_.num_sent(put.peer, put.channel, put.epoch) + 1 : 0;
  if (num_messages > code_.most_messages())
    fail(TERN_CAPACITY_EXCEEDED,
         "transport: more than {} messages to rank {} in epoch {} of channel {}; put more bytes at once or use more epochs",
         code_.most_messages(), put.peer, put.epoch, put.channel);
  Departing* message = idle_.back();
  iovec from = {put.from->address() + put.from_offset, num_bytes};
  fi_rma_iov to = {put.to.base + put.to_offset, num_bytes, put.to.key};
  void* descriptor = put.from->descriptor();
  fi_msg_rma rma = {};
  rma.msg_iov = &from;
  rma.desc = &descriptor;
  rma.iov_count = 1;
  rma.addr = connection_->address_of(put.peer);
  rma.rma_iov = &to;
  rma.rma_iov_count = 1;
  rma.context = &message->context;
  if (put.counted) rma.data = code_.encode({rank_, put.channel, put.epoch, last ? num_messages : 0});
  const uint64_t inject = num_bytes <= connection_->info().tx_attr->inject_size ? FI_INJECT : 0;
  const uint64_t confirmed = put.confirmed ? FI_DELIVERY_COMPLETE : 0;
  const uint64_t counted = put.counted ? FI_REMOTE_CQ_DATA : 0;
  const ssize_t code = fi_writemsg(connection_->endpoint(), &rma, counted | FI_COMPLETION | confirmed | inject);
  if (code == -FI_EAGAIN) return false;
  if (code != 0) {
    lose(put.peer, fabric_library().error_text(static_cast<int>(code)));
    throw_problem();
  }
  idle_.pop_back();
  message->peer = put.peer;
  ++num_outstanding_to_[put.peer];
  if (put.counted) departures_.count(put.peer, put.channel, put.epoch, last);
  return true;
}

bool FabricEndpoint::progress() {
  Completions completions;
  bool any = false;
  while (true) {
    const ssize_t got = fi_cq_read(connection_->queue(), completions.data(), kBatch);
    if (got == -FI_EAVAIL) {
      take_error();
    } else if (got == -FI_EAGAIN || got == -FI_EINTR || got == 0) {
      break;
    } else if (got < 0) {
      fail(TERN_SYSTEM_ERROR, "transport: fi_cq_read: {}", fabric_library().error_text(static_cast<int>(got)));
    } else {
      take(completions, static_cast<size_t>(got));
    }
    any = true;
    if (got != static_cast<ssize_t>(kBatch) && got > 0) break;
  }
  throw_problem();
  return any;
}

void FabricEndpoint::take(const Completions& completions, size_t num_completions) {
  for (size_t i = 0; i < num_completions; ++i) {
    const fi_cq_data_entry& completion = completions[i];
    if ((completion.flags & FI_REMOTE_CQ_DATA) != 0) {
      count(completion.data);
    } else if (Departing* message = departed(completion.op_context)) {
      --num_outstanding_to_[message->peer];
      idle_.push_back(message);
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

Departing* FabricEndpoint::departed(void* context) {
  std::vector<Departing>& all = connection_->departing();
  const std::less<const void*> before;
  if (before(context, all.data()) || !before(context, all.data() + all.size())) return nullptr;
  return static_cast<Departing*>(context);
}

void FabricEndpoint::take_error() {
  fi_cq_err_entry error = {};
  const ssize_t got = fi_cq_readerr(connection_->queue(), &error, 0);
  if (got == -FI_EAGAIN) return;
  if (got < 0) fail(TERN_SYSTEM_ERROR, "transport: fi_cq_readerr: {}", fabric_library().error_text(static_cast<int>(got)));
  char buffer[256] = {};
  const char* detail = fi_cq_strerror(connection_->queue(), error.prov_errno, error.err_data, buffer, sizeof(buffer));
  const std::string why = fmt::format("{}; {}", fabric_library().error_text(error.err), detail == nullptr ? "" : detail);
  Departing* message = departed(error.op_context);
  if (message == nullptr) {  // of what a peer sends; that peer finds out by itself
    problems_.emplace_back(TERN_SYSTEM_ERROR, fmt::format("transport: something that was put to rank {} failed: {}", rank_, why));
    return;
  }
  --num_outstanding_to_[message->peer];
  idle_.push_back(message);
  lose(message->peer, why);
}

void FabricEndpoint::lose(int peer, const std::string& why) {
  if (!lost_[peer].empty()) return;
  lost_[peer] = fmt::format("transport: rank {} cannot be reached over {}: {}", peer, facts_.provider, why);
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
  const std::string provider =
      agree_on_provider(bootstrap, {choices.providers(), choices.problem(), options.num_channels}, options.absent, deadline);
  auto endpoint = std::make_unique<FabricEndpoint>(bootstrap, options, choices.first_of(provider));
  endpoint->meet(bootstrap, options.absent, deadline);
  return endpoint;
}

}  // namespace tern
