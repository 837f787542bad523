// SPDX-License-Identifier: Apache-2.0
// How a generation is agreed on, over a council in one process: ranks that die in the middle of it leave their last word behind.
#include "domain/agreement.h"

#include <gtest/gtest.h>

#include <future>
#include <map>
#include <mutex>
#include <thread>

#include "base/error.h"
#include "domain/admission.h"

namespace tern {
namespace {

constexpr int kNumRanks = 4;
constexpr int64_t kTimeoutMs = 1000;

// What each rank has said last.
struct Words {
  std::mutex mutex;
  std::map<int, Proposal> proposals, decisions;
  std::map<int, uint64_t> roll_calls, answers;
};

class Seat final : public Council {
 public:
  Seat(Words& words, int rank) : words_(words) {
    topology_.rank = rank;
    topology_.num_ranks = kNumRanks;
    topology_.ranks.resize(kNumRanks);
  }

  void begin(const NextGeneration& next) { generation_ = next.generation, masked_ = next.masked; }

  const Topology& topology() const override { return topology_; }
  uint32_t generation() const override { return generation_; }
  bool is_masked(int r) const override { return masked_[static_cast<size_t>(r)] != 0; }

  void propose(const Proposal& proposal) override { say(words_.proposals, proposal); }
  std::optional<Proposal> proposal_of(int r) override { return word_of(words_.proposals, r); }
  void call_roll(uint64_t generation) override { say(words_.roll_calls, generation); }
  uint64_t roll_call_of(int r) override { return word_of(words_.roll_calls, r).value_or(0); }
  void answer(uint64_t generation) override { say(words_.answers, generation); }
  uint64_t answer_of(int r) override { return word_of(words_.answers, r).value_or(0); }
  void decide(const Proposal& decision) override { say(words_.decisions, decision); }
  std::optional<Proposal> decision_of(int r) override { return word_of(words_.decisions, r); }
  void pause() override { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }

 private:
  template <typename Word>
  void say(std::map<int, Word>& words, const Word& word) {
    const std::lock_guard lock(words_.mutex);
    words[rank()] = word;
  }
  template <typename Word>
  std::optional<Word> word_of(std::map<int, Word>& words, int r) {
    const std::lock_guard lock(words_.mutex);
    const auto found = words.find(r);
    return found == words.end() ? std::nullopt : std::optional(found->second);
  }

  Words& words_;
  Topology topology_;
  uint32_t generation_ = 0;
  std::vector<uint8_t> masked_ = std::vector<uint8_t>(kNumRanks);
};

class Recovery : public testing::Test {
 protected:
  Seat& seat(int rank) { return *seats_[static_cast<size_t>(rank)]; }

  std::future<NextGeneration> recover(int rank, const tern_recover_options& options) {
    return std::async(std::launch::async, [this, rank, options] { return next_generation(seat(rank), options, kTimeoutMs); });
  }
  static tern_recover_options masking() {
    tern_recover_options options;
    options.allow_mask = 1;
    return options;
  }
  // All of them at once; each comes to the same.
  NextGeneration recover_all(const std::vector<int>& ranks, const tern_recover_options& options) {
    std::vector<std::future<NextGeneration>> results;
    for (const int rank : ranks) results.push_back(recover(rank, options));
    const NextGeneration first = results.front().get();
    for (size_t i = 1; i < results.size(); ++i) {
      const NextGeneration next = results[i].get();
      EXPECT_EQ(next.generation, first.generation);
      EXPECT_EQ(next.masked, first.masked);
    }
    return first;
  }
  static tern_status status_of(std::future<NextGeneration> result) {
    try {
      result.get();
      return TERN_OK;
    } catch (const Failure& failure) {
      return failure.status();
    }
  }

  Words words_;
  std::vector<std::unique_ptr<Seat>> seats_ = [this] {
    std::vector<std::unique_ptr<Seat>> seats;
    for (int r = 0; r < kNumRanks; ++r) seats.push_back(std::make_unique<Seat>(words_, r));
    return seats;
  }();
};

TEST_F(Recovery, OfAllRanksIsTheNextGeneration) {
  const NextGeneration next = recover_all({0, 1, 2, 3}, {});
  EXPECT_EQ(next.generation, 1u);
  EXPECT_EQ(next.masked, std::vector<uint8_t>({0, 0, 0, 0}));
}

TEST_F(Recovery, GoesOnWithoutARankThatDiesBehindItsProposal) {
  seat(2).propose({1, false, {0, 0, 0, 0}});  // and waits for rank 3, when it is killed
  EXPECT_EQ(recover_all({0, 1}, masking()).masked, std::vector<uint8_t>({0, 0, 1, 1}));
}

TEST_F(Recovery, GoesOnWithoutARankThatDiesBeforeItCommits) {
  seat(3).propose({1, false, {0, 0, 0, 0}});
  EXPECT_EQ(recover_all({0, 1, 2}, masking()).masked, std::vector<uint8_t>({0, 0, 0, 1}));
}

// It was there when all agreed, and no window of it ever came.
TEST_F(Recovery, GoesOnInASecondAttemptWithoutARankThatDiedBehindTheFirst) {
  EXPECT_EQ(recover_all({0, 1, 2, 3}, masking()).generation, 1u);
  const NextGeneration next = recover_all({0, 1, 2}, masking());
  EXPECT_EQ(next.generation, 2u);
  EXPECT_EQ(next.masked, std::vector<uint8_t>({0, 0, 0, 1}));
}

TEST_F(Recovery, JoinsTheAttemptOfThoseWhoTryAgain) {
  EXPECT_EQ(status_of(recover(0, {})), TERN_TIMEOUT);  // alone
  EXPECT_EQ(recover_all({0, 1, 2, 3}, {}).generation, 2u);
}

TEST_F(Recovery, OfARankThatWentOnAlreadyTakesInOneThatCouldNot) {
  const NextGeneration first = recover_all({0, 1, 2, 3}, {});
  for (const int r : {0, 1, 2}) seat(r).begin(first);  // rank 3 had no memory
  const NextGeneration next = recover_all({0, 1, 2, 3}, masking());
  EXPECT_EQ(next.generation, 2u);
  EXPECT_EQ(next.masked, std::vector<uint8_t>({0, 0, 0, 0}));
}

TEST_F(Recovery, TellsALateRankThatTheOthersWentOn) {
  seat(0).begin(recover_all({0, 1, 2}, masking()));
  EXPECT_EQ(status_of(recover(3, masking())), TERN_MASKED_OUT);
  EXPECT_EQ(status_of(recover(3, masking())), TERN_MASKED_OUT);  // however often it asks
  EXPECT_THROW(refuse_if_left_out(seat(3)), Failure);
  EXPECT_NO_THROW(refuse_if_left_out(seat(0)));
}

TEST_F(Recovery, LetsInWhoWasRefusedBefore) {
  const NextGeneration without = recover_all({0, 1, 2}, masking());
  for (const int r : {0, 1, 2}) seat(r).begin(without);
  EXPECT_EQ(status_of(recover(3, masking())), TERN_MASKED_OUT);
  tern_recover_options readmitting;
  readmitting.readmit = 1;
  const NextGeneration next = recover_all({0, 1, 2, 3}, readmitting);
  EXPECT_EQ(next.generation, 2u);
  EXPECT_EQ(next.masked, std::vector<uint8_t>({0, 0, 0, 0}));
  for (int r = 0; r < kNumRanks; ++r) seat(r).begin(next);
  EXPECT_EQ(recover_all({0, 1, 2, 3}, {}).generation, 3u);  // and nothing of what it said then counts
}

// A leader that fails behind its decision leaves an answer of a rank that is gone by then.
TEST_F(Recovery, WaitsAnewForAnswersInASecondAttempt) {
  const NextGeneration without = recover_all({0, 1, 2}, masking());
  for (const int r : {0, 1, 2}) seat(r).begin(without);
  tern_recover_options readmitting;
  readmitting.readmit = 1;
  EXPECT_EQ(recover_all({0, 1, 2, 3}, readmitting).masked, std::vector<uint8_t>({0, 0, 0, 0}));
  EXPECT_EQ(recover_all({0, 1, 2}, readmitting).masked, std::vector<uint8_t>({0, 0, 0, 1}));
}

}  // namespace
}  // namespace tern
