// SPDX-License-Identifier: Apache-2.0
// One way to make one exchange: what is timed, and what proves that it did it.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace tern::bench {

// What a contender's output holds after a run; see Workload::check.
enum class Result {
  kDispatched,      // the rows of the tokens that came to this rank
  kReturned,        // the experts' rows that came back to this rank, not summed
  kCombined,        // the sums of those rows
  kCombinedByNode,  // the same, but each node's sum is rounded before nodes are summed
  kCrossed,         // between nodes: the tokens of this rank's rails that go to its node
  kLeaving          // and this rank's own that go to other nodes
};

enum class Kind {
  kCeiling,  // moves the bytes and does nothing else
  kTern,
  kOther
};

struct Contender {
  std::string operation;
  std::string name;
  Kind kind;
  Result result;
  std::span<std::byte> output;  // in this rank's memory, or in the window that others write
  std::function<void()> run;    // one exchange on this rank; what it uses outlives it
};
using Contenders = std::vector<Contender>;

}  // namespace tern::bench
