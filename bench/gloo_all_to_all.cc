// SPDX-License-Identifier: Apache-2.0
// gloo over its TCP transport, on the network device that GLOO_SOCKET_IFNAME names, or the loopback device: within a machine it has no other way.
#include <gloo/alltoall.h>
#include <gloo/alltoallv.h>
#include <gloo/config.h>
#include <gloo/rendezvous/context.h>
#include <gloo/rendezvous/file_store.h>
#include <gloo/transport/tcp/device.h>
#include <stdlib.h>
#include <sys/socket.h>

#include <filesystem>
#include <vector>

#include "base/error.h"
#include "bench/all_to_all.h"

namespace tern::bench {
namespace {

// A folder in which the ranks meet; rank 0 makes it, and removes it when all have met.
std::string make_meeting_folder() {
  std::string path = (std::filesystem::temp_directory_path() / "tern_compare_XXXXXX").string();
  if (::mkdtemp(path.data()) == nullptr) fail_errno("mkdtemp", path);
  return path;
}

class GlooAllToAll : public AllToAll {
 public:
  explicit GlooAllToAll(const Processes& processes)
      : context_(std::make_shared<gloo::rendezvous::Context>(processes.rank(), processes.num_ranks())) {
    const std::string folder = processes.broadcast(processes.rank() == 0 ? make_meeting_folder() : "");
    gloo::rendezvous::FileStore store(folder);
    const char* interface = std::getenv("GLOO_SOCKET_IFNAME");
    gloo::transport::tcp::attr address;
    address.iface = interface == nullptr ? "lo" : interface;
    address.ai_family = AF_INET;
    auto device = gloo::transport::tcp::CreateDevice(address);
    context_->connectFullMesh(store, device);
    processes.all_true(true);
    if (processes.rank() == 0) std::filesystem::remove_all(folder);
  }

  std::string name() const override { return fmt::format("gloo {}.{}", GLOO_VERSION_MAJOR, GLOO_VERSION_MINOR); }

  void exchange_counts(std::span<const int64_t> send, std::span<int64_t> receive) override {
    gloo::AlltoallOptions options(context_);
    options.setInput(const_cast<int64_t*>(send.data()), send.size());
    options.setOutput(receive.data(), receive.size());
    gloo::alltoall(options);
  }

  void exchange_rows(const RowTraffic& traffic) override {
    gloo::AlltoallvOptions options(context_);
    options.setInput(const_cast<std::byte*>(traffic.send), bytes_of(traffic.num_sent, traffic.row_bytes));
    options.setOutput(traffic.receive, bytes_of(traffic.num_received, traffic.row_bytes));
    gloo::alltoallv(options);
  }

 private:
  static std::vector<int64_t> bytes_of(std::span<const int64_t> num_rows, int64_t row_bytes) {
    std::vector<int64_t> result(num_rows.begin(), num_rows.end());
    for (int64_t& count : result) count *= row_bytes;
    return result;
  }

  std::shared_ptr<gloo::rendezvous::Context> context_;
};

}  // namespace

std::unique_ptr<AllToAll> make_gloo_all_to_all(const Processes& processes) { return std::make_unique<GlooAllToAll>(processes); }

}  // namespace tern::bench
