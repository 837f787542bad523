// SPDX-License-Identifier: Apache-2.0
#include "bench/processes.h"

#include <fcntl.h>
#include <mpi.h>
#include <unistd.h>

#include <cstdlib>

#include "base/error.h"

namespace tern::bench {
namespace {

int allgather(void*, const void* send, void* recv, size_t bytes) {
  return MPI_Allgather(send, static_cast<int>(bytes), MPI_BYTE, recv, static_cast<int>(bytes), MPI_BYTE, MPI_COMM_WORLD);
}

}  // namespace

Processes::Processes(int* argc, char*** argv) {
  MPI_Init(argc, argv);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
  MPI_Comm_size(MPI_COMM_WORLD, &num_ranks_);
}

Processes::~Processes() { MPI_Finalize(); }

std::string Processes::mpi_version() const {
  char text[MPI_MAX_LIBRARY_VERSION_STRING];
  int length = 0;
  MPI_Get_library_version(text, &length);
  std::string version(text, static_cast<size_t>(length));
  version.resize(std::min(version.size(), version.find(',')));
  const size_t v = version.find(" v");
  return v == std::string::npos ? version : version.erase(v + 1, 1);
}

std::shared_ptr<Segment> Processes::share_memory(int64_t num_bytes) const {
  std::shared_ptr<Segment> segment;
  if (rank_ == 0) segment = HostSegment::create(static_cast<size_t>(num_bytes), SharedBy::kProcesses);
  const std::string path = broadcast(rank_ == 0 ? fmt::format("/proc/{}/fd/{}", ::getpid(), segment->fd()) : "");
  if (rank_ != 0) {
    Fd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
    if (!fd) fail_errno("open", path);
    segment = HostSegment::map(std::move(fd));
  }
  MPI_Barrier(MPI_COMM_WORLD);
  return segment;
}

std::string Processes::broadcast(std::string text) const {
  auto length = static_cast<int>(text.size());
  MPI_Bcast(&length, 1, MPI_INT, 0, MPI_COMM_WORLD);
  text.resize(static_cast<size_t>(length));
  MPI_Bcast(text.data(), length, MPI_CHAR, 0, MPI_COMM_WORLD);
  return text;
}

std::vector<double> Processes::largest(std::vector<double> values) const {
  MPI_Allreduce(MPI_IN_PLACE, values.data(), static_cast<int>(values.size()), MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD);
  return values;
}

bool Processes::all_true(bool value) const {
  int result = value ? 1 : 0;
  MPI_Allreduce(MPI_IN_PLACE, &result, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD);
  return result == 1;
}

Group Processes::make_group() const { return Group::from_allgather(rank_, num_ranks_, allgather, nullptr); }

std::unique_ptr<Bootstrap> Processes::make_bootstrap() const { return make_callback_bootstrap(rank_, num_ranks_, allgather, nullptr); }

void Processes::abort_all() {
  MPI_Abort(MPI_COMM_WORLD, EXIT_FAILURE);
  std::abort();
}

}  // namespace tern::bench
