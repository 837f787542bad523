// SPDX-License-Identifier: Apache-2.0
#include "transport/noticeboard.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <span>
#include <vector>

#include "test_ranks.h"

// libfabric 1.17's provider "net" loses a few hundred bytes with each endpoint, also when it is closed.
extern "C" __attribute__((visibility("default"))) const char* __lsan_default_suppressions() { return "leak:libfabric.so.1"; }

namespace tern {
namespace {

using namespace test;

using Note = std::array<uint64_t, 40>;

// What a note says is a function of one number.
Note note_of(uint64_t number) {
  Note note;
  for (size_t i = 0; i < note.size(); ++i) note[i] = number * 1000 + i;
  return note;
}

TEST(Noticeboard, TheLastNoteIsSeenByAll) {
  const std::string found = outcome([] { make_endpoint(*make_local_bootstraps(1)[0], {}, ample()); });
  if (found != "ok") GTEST_SKIP() << "no network between ranks here: " << found;
  constexpr int kNumRanks = 4;
  constexpr uint64_t kNumNotes = 200;
  auto bootstraps = make_local_bootstraps(kNumRanks);
  std::atomic<int> num_finished = 0;
  const auto body = [&](int r) {
    std::vector<int> others;
    for (int peer = 0; peer < kNumRanks; ++peer)
      if (peer != r) others.push_back(peer);
    Noticeboard board(*bootstraps[static_cast<size_t>(r)], sizeof(Note), others, {}, ample());
    Note seen;
    const auto bytes = std::as_writable_bytes(std::span(seen));
    for (const int peer : others) require(!board.read(peer, bytes), "nothing was written yet");
    std::vector<uint64_t> newest(kNumRanks);
    const Deadline deadline = ample();
    for (uint64_t number = 1; number <= kNumNotes || *std::ranges::min_element(newest) < kNumNotes;) {
      if (number <= kNumNotes) {
        const Note own = note_of(number++);
        board.write(std::as_bytes(std::span(own)));
      }
      newest[static_cast<size_t>(r)] = number - 1;
      for (const int peer : others) {
        if (!board.read(peer, bytes)) continue;
        uint64_t& before = newest[static_cast<size_t>(peer)];
        require(seen == note_of(seen[0] / 1000) && seen[0] / 1000 >= before, "notes are whole, and follow each other");
        before = seen[0] / 1000;
      }
      board.progress();
      require(!deadline.passed(), "the last note of everybody comes");
    }
    ++num_finished;
    while (num_finished < kNumRanks && !deadline.passed()) board.progress();
  };
  for (const std::string& text : run_threads(kNumRanks, body)) EXPECT_EQ(text, "ok");
}

}  // namespace
}  // namespace tern
