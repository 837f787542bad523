// SPDX-License-Identifier: Apache-2.0
// Lets what needs a bootstrap of the library meet over the board of a launch.
#pragma once

#include "tools/launch.h"
#include "topology/bootstrap.h"

namespace tern::tools {

class BoardBootstrap final : public Bootstrap {
 public:
  explicit BoardBootstrap(const RankContext& context) : context_(context) {}

  int rank() const override { return context_.rank; }
  int num_ranks() const override { return context_.num_ranks; }
  void allgather(const void* send, void* recv, size_t bytes, Deadline deadline) override {
    context_.board.allgather(context_.rank, {static_cast<const std::byte*>(send), bytes}, static_cast<std::byte*>(recv),
                             deadline.remaining_ms());
  }

 private:
  const RankContext& context_;
};

}  // namespace tern::tools
