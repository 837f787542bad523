// SPDX-License-Identifier: Apache-2.0
#include <mpi.h>

#include <vector>

#include "base/error.h"
#include "bench/all_to_all.h"

namespace tern::bench {
namespace {

class MpiAllToAll : public AllToAll {
 public:
  explicit MpiAllToAll(const Processes& processes)
      : name_(processes.mpi_version()), send_(processes.num_ranks()), receive_(processes.num_ranks()) {}

  std::string name() const override { return name_; }

  void exchange_counts(std::span<const int64_t> send, std::span<int64_t> receive) override {
    check(MPI_Alltoall(send.data(), 1, MPI_INT64_T, receive.data(), 1, MPI_INT64_T, MPI_COMM_WORLD));
  }

  void exchange_rows(const RowTraffic& traffic) override {
    send_.set(traffic.num_sent, traffic.row_bytes);
    receive_.set(traffic.num_received, traffic.row_bytes);
    check(MPI_Alltoallv(traffic.send, send_.counts.data(), send_.offsets.data(), MPI_BYTE, traffic.receive, receive_.counts.data(),
                        receive_.offsets.data(), MPI_BYTE, MPI_COMM_WORLD));
  }

 private:
  struct Sizes {
    explicit Sizes(int num_ranks) : counts(static_cast<size_t>(num_ranks)), offsets(static_cast<size_t>(num_ranks)) {}

    void set(std::span<const int64_t> num_rows, int64_t row_bytes) {
      int64_t offset = 0;
      for (size_t rank = 0; rank < counts.size(); ++rank) {
        counts[rank] = static_cast<int>(num_rows[rank] * row_bytes);
        offsets[rank] = static_cast<int>(offset);
        offset += counts[rank];
      }
      if (offset > INT32_MAX) fail(TERN_INVALID_ARGUMENT, "{} bytes are more than MPI_Alltoallv counts; take fewer tokens", offset);
    }

    std::vector<int> counts;
    std::vector<int> offsets;
  };

  static void check(int status) {
    if (status != MPI_SUCCESS) fail(TERN_SYSTEM_ERROR, "MPI returned error {}", status);
  }

  std::string name_;
  Sizes send_;
  Sizes receive_;
};

}  // namespace

std::unique_ptr<AllToAll> make_mpi_all_to_all(const Processes& processes) { return std::make_unique<MpiAllToAll>(processes); }

}  // namespace tern::bench
