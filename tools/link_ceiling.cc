// SPDX-License-Identifier: Apache-2.0
#include "tools/link_ceiling.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <span>
#include <vector>

#include "base/error.h"
#include "tools/cuda_call.h"
#include "tools/link_copy.h"
#include "tools/meter.h"

namespace tern::tools {
namespace {

constexpr int64_t kPartBytes = 64 << 20;  // to each rank
constexpr int64_t kMostBytes = 1 << 30;   // to all ranks
constexpr int kNumRuns = 9, kNumWarmUps = 2;
constexpr int kCopiesPerRun = 2;  // so that ranks that start some microseconds apart still overlap

// Memory that every rank makes and all ranks map. Between processes by handles of CUDA, between threads by its address.
class SharedMemory {
 public:
  SharedMemory(const RankContext& context, const RankDevice& device, int64_t num_bytes) {
    own_ = make_cuda_memory(num_bytes);
    Address mine{.pid = getpid(), .device = device.index(), .memory = own_.get(), .handle = {}};
    check_cuda(cudaIpcGetMemHandle(&mine.handle, own_.get()), "a handle of memory for plain copies");
    std::vector<Address> all(static_cast<size_t>(context.num_ranks));
    context.board.allgather(context.rank, std::as_bytes(std::span(&mine, 1)), reinterpret_cast<std::byte*>(all.data()),
                            context.timeout_ms + RankContext::kPatienceMs);
    for (const Address& address : all) mapped_.push_back(address.pid == mine.pid ? map_here(mine, address) : map_handle(address));
  }

  ~SharedMemory() { unmap(); }

  std::byte* of(int rank) const { return mapped_[static_cast<size_t>(rank)]; }

  void unmap() noexcept {
    for (std::byte* memory : from_handles_) cudaIpcCloseMemHandle(memory);
    from_handles_.clear();
  }

 private:
  struct Address {
    pid_t pid;
    int32_t device;
    std::byte* memory;
    cudaIpcMemHandle_t handle;
  };

  static std::byte* map_here(const Address& mine, const Address& other) {
    if (other.device == mine.device) return other.memory;
    const cudaError_t error = cudaDeviceEnablePeerAccess(other.device, 0);
    if (error == cudaErrorPeerAccessAlreadyEnabled)
      cudaGetLastError();  // clears it
    else
      check_cuda(error, "access to the memory of another GPU");
    return other.memory;
  }

  std::byte* map_handle(const Address& other) {
    void* memory = nullptr;
    check_cuda(cudaIpcOpenMemHandle(&memory, other.handle, cudaIpcMemLazyEnablePeerAccess), "the memory of another rank's GPU");
    from_handles_.push_back(static_cast<std::byte*>(memory));
    return from_handles_.back();
  }

  CudaMemory own_;
  std::vector<std::byte*> mapped_, from_handles_;
};

enum class Way { kPush, kPull };

class CudaLinkCeiling : public LinkCeiling {
 public:
  CudaLinkCeiling(RankContext& context, RankDevice& device)
      : context_(context),
        device_(device),
        stream_(static_cast<cudaStream_t>(device.stream())),
        shape_(shape_on(device)),
        part_bytes_(std::min(kPartBytes, kMostBytes / context.num_ranks / shape_.chunk_bytes * shape_.chunk_bytes)),
        memory_(context, device, 2 * context.num_ranks * part_bytes_),
        start_(make_cuda_event()),
        end_(make_cuda_event()) {
    if (context.num_ranks > LinkCopy::kMostParts)
      fail(TERN_UNSUPPORTED, "plain copies between {} ranks: at most {} are copied at once", context.num_ranks, LinkCopy::kMostParts);
    check_cuda(cudaDeviceGetAttribute(&most_sms_, cudaDevAttrMultiProcessorCount, device.index()), "the number of SMs");
    for (int i = 0; i < context.num_ranks; ++i) {
      streams_.push_back(make_cuda_stream());
      joined_.push_back(make_cuda_event(cudaEventDisableTiming));
    }
    for (int peer = 0; peer < context.num_ranks; ++peer) device_.fill(sent(context.rank, peer), pattern(context.rank, peer), part_bytes_);
    device_.synchronise();
  }

  ~CudaLinkCeiling() override { cudaSetDevice(device_.index()); }

  LinkRates at(int num_sms) override {
    num_sms = std::clamp(num_sms, 1, most_sms_);
    if (const auto known = rates_.find(num_sms); known != rates_.end()) return known->second;
    LinkRates rates{.num_sms = num_sms};
    const auto by_kernel = [&](Way way, bool with_own) {
      const LinkCopy copy = copy_of(way, with_own);
      return measure(way, with_own, [&] { launch_link_copy(copy, shape_, num_sms, stream_); });
    };
    if (context_.num_ranks > 1) {
      rates.push_gbps = by_kernel(Way::kPush, false);
      rates.pull_gbps = by_kernel(Way::kPull, false);
    }
    rates.push_all_gbps = by_kernel(Way::kPush, true);
    rates.pull_all_gbps = by_kernel(Way::kPull, true);
    return rates_[num_sms] = rates;
  }

  LinkRates copy_engines() override {
    if (context_.num_ranks == 1 || rates_.contains(0)) return rates_[0];
    LinkRates rates;
    rates.push_gbps = measure(Way::kPush, false, [&] { put_engine_copies(Way::kPush); });
    rates.pull_gbps = measure(Way::kPull, false, [&] { put_engine_copies(Way::kPull); });
    return rates_[0] = rates;
  }

  void close() override {
    context_.align();
    memory_.unmap();
    context_.align();  // nobody frees memory that another rank still maps
  }

 private:
  // Memory of `owner`: what it gives to each rank, and what it gets from each.
  std::byte* sent(int owner, int to) const { return memory_.of(owner) + to * part_bytes_; }
  std::byte* received(int owner, int from) const { return memory_.of(owner) + (context_.num_ranks + from) * part_bytes_; }
  static uint8_t pattern(int from, int to) { return static_cast<uint8_t>(17 + 31 * from + 7 * to); }

  static LinkCopyShape shape_on(const RankDevice& device) {
    check_cuda(cudaSetDevice(device.index()), "choosing the GPU");
    return link_copy_shape(device.index());
  }

  LinkCopy::Part part_of(Way way, int peer) const {
    const int rank = context_.rank;
    if (way == Way::kPush) return {sent(rank, peer), received(peer, rank)};
    return {sent(peer, rank), received(rank, peer)};
  }

  // Ranks begin with different peers.
  LinkCopy copy_of(Way way, bool with_own) const {
    LinkCopy copy{.parts = {},
                  .num_parts = 0,
                  .chunk_bytes = shape_.chunk_bytes,
                  .chunks_per_part = static_cast<uint32_t>(part_bytes_ / shape_.chunk_bytes)};
    for (int i = with_own ? 0 : 1; i < context_.num_ranks; ++i)
      copy.parts[copy.num_parts++] = part_of(way, (context_.rank + i) % context_.num_ranks);
    return copy;
  }

  void put_engine_copies(Way way) {
    const CudaEvent fork = make_cuda_event(cudaEventDisableTiming);
    check_cuda(cudaEventRecord(fork.get(), stream_), "an event");
    for (int i = 1; i < context_.num_ranks; ++i) {
      const auto peer = static_cast<size_t>((context_.rank + i) % context_.num_ranks);
      const LinkCopy::Part part = part_of(way, static_cast<int>(peer));
      check_cuda(cudaStreamWaitEvent(streams_[peer].get(), fork.get()), "waiting for an event");
      check_cuda(cudaMemcpyAsync(part.to, part.from, static_cast<size_t>(part_bytes_), cudaMemcpyDefault, streams_[peer].get()),
                 "a copy between GPUs");
      check_cuda(cudaEventRecord(joined_[peer].get(), streams_[peer].get()), "an event");
      check_cuda(cudaStreamWaitEvent(stream_, joined_[peer].get()), "waiting for an event");
    }
  }

  double measure(Way way, bool with_own, const std::function<void()>& put_copy) {
    check_cuda(cudaSetDevice(device_.index()), "choosing the GPU");
    device_.fill(received(context_.rank, 0), 0, context_.num_ranks * part_bytes_);
    device_.synchronise();
    Times times;
    for (int run = -kNumWarmUps; run < kNumRuns; ++run) {
      context_.align();
      put_copy();  // not counted: meanwhile the host puts the others behind it
      check_cuda(cudaEventRecord(start_.get(), stream_), "an event");
      for (int i = 0; i < kCopiesPerRun; ++i) put_copy();
      check_cuda(cudaEventRecord(end_.get(), stream_), "an event");
      device_.synchronise();
      float ms = 0;
      check_cuda(cudaEventElapsedTime(&ms, start_.get(), end_.get()), "the time of a copy");
      if (run >= 0) times.us.push_back(static_cast<double>(ms) * 1e3);
    }
    context_.align();
    verify(way, with_own);
    const std::vector<double> slowest_us = slowest_of_ranks(context_, times.us);
    const int num_parts = context_.num_ranks - (with_own ? 0 : 1);
    return static_cast<double>(kCopiesPerRun * num_parts * part_bytes_) / Times{slowest_us}.median_us() * 1e-3;
  }

  // The first and the last bytes of every part; all of them once, with the first measurement of each way.
  void verify(Way way, bool with_own) {
    bool& seen = verified_[way == Way::kPush ? 0 : 1];
    const int64_t checked_bytes = seen ? 4096 : part_bytes_;
    seen = true;
    std::vector<std::byte> found(static_cast<size_t>(checked_bytes));
    for (int i = with_own ? 0 : 1; i < context_.num_ranks; ++i) {
      const int peer = (context_.rank + i) % context_.num_ranks;
      const std::byte expected{pattern(peer, context_.rank)};
      for (const int64_t offset : {int64_t{0}, part_bytes_ - checked_bytes}) {
        device_.copy_out(found.data(), received(context_.rank, peer) + offset, checked_bytes);
        if (std::ranges::any_of(found, [&](std::byte byte) { return byte != expected; }))
          fail(TERN_INTERNAL_ERROR, "plain copy: what came from rank {} at rank {} is damaged", peer, context_.rank);
      }
    }
  }

  RankContext& context_;
  RankDevice& device_;
  cudaStream_t stream_;
  LinkCopyShape shape_;
  int64_t part_bytes_;
  SharedMemory memory_;
  CudaEvent start_, end_;
  std::vector<CudaStream> streams_;
  std::vector<CudaEvent> joined_;
  int most_sms_ = 0;
  bool verified_[2] = {false, false};
  std::map<int, LinkRates> rates_;  // by number of SMs; 0: copy engines
};

}  // namespace

std::unique_ptr<LinkCeiling> make_link_ceiling(RankContext& context, RankDevice& device) {
  if (device.type() != TERN_DEVICE_CUDA) fail(TERN_UNSUPPORTED, "links between GPUs: this rank is on the CPU");
  return std::make_unique<CudaLinkCeiling>(context, device);
}

}  // namespace tern::tools
