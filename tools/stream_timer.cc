// SPDX-License-Identifier: Apache-2.0
#include "tools/stream_timer.h"

#include "base/error.h"
#include "tools/cuda_call.h"
#include "tools/pause.h"

namespace tern::tools {
namespace {

constexpr int kNumUncounted = 3;

class CudaStreamTimer : public StreamTimer {
 public:
  CudaStreamTimer(RankDevice& device, const StreamTimerOptions& options)
      : device_(device), num_runs_(static_cast<size_t>(options.num_runs)) {
    check_cuda(cudaSetDevice(device.index()), "choosing the GPU");
    prepare_pause();
    if (!options.cold) return;
    int l2_bytes = 0;
    check_cuda(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, device.index()), "the size of the L2 cache");
    flushed_ = DeviceMemory(device, int64_t{4} * l2_bytes);
  }

  std::vector<std::vector<double>> time_parts_us(const std::vector<PutWork>& parts, double pause_us) override {
    check_cuda(cudaSetDevice(device_.index()), "choosing the GPU");
    while (events_.size() < 2 * num_runs_ * parts.size()) events_.push_back(make_cuda_event());
    for (int i = 0; i < kNumUncounted; ++i)
      for (const PutWork& put_part : parts) put_part();
    for (size_t i = 0; i < num_runs_; ++i)
      for (size_t part = 0; part < parts.size(); ++part) put_timed(parts[part], i * parts.size() + part, pause_us);
    device_.synchronise();
    std::vector<std::vector<double>> us(parts.size());
    for (size_t i = 0; i < num_runs_ * parts.size(); ++i) {
      float ms = 0;
      check_cuda(cudaEventElapsedTime(&ms, events_[2 * i].get(), events_[2 * i + 1].get()), "the time of a run");
      us[i % parts.size()].push_back(static_cast<double>(ms) * 1e3);
    }
    return us;
  }

 private:
  void put_timed(const PutWork& put_part, size_t nth, double pause_us) {
    const auto stream = static_cast<cudaStream_t>(device_.stream());
    if (flushed_.data() != nullptr) device_.fill(flushed_.data(), static_cast<uint8_t>(nth), flushed_.num_bytes());
    if (pause_us > 0) launch_pause(pause_us, stream);
    check_cuda(cudaEventRecord(events_[2 * nth].get(), stream), "the start of a run");
    put_part();
    check_cuda(cudaEventRecord(events_[2 * nth + 1].get(), stream), "the end of a run");
  }

  RankDevice& device_;
  size_t num_runs_;
  std::vector<CudaEvent> events_;
  DeviceMemory flushed_;
};

}  // namespace

std::unique_ptr<StreamTimer> make_stream_timer(RankDevice& device, const StreamTimerOptions& options) {
  if (device.type() != TERN_DEVICE_CUDA) fail(TERN_UNSUPPORTED, "a CPU rank has no stream to time");
  return std::make_unique<CudaStreamTimer>(device, options);
}

}  // namespace tern::tools
