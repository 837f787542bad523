// SPDX-License-Identifier: Apache-2.0
// What an endpoint does without a network: the counting of epochs, and the agreement on a provider.
#include "transport/notices.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>

#include "test_ranks.h"
#include "transport/meet.h"

namespace tern {
namespace {

using namespace test;

TEST(NoticeCode, KeepsWhatItIsGiven) {
  for (const size_t data_bytes : {4, 8})
    for (const int num_ranks : {1, 2, 5, 2048})
      for (const int num_channels : {1, 2, 8}) {
        const NoticeCode code(num_ranks, num_channels, data_bytes);
        EXPECT_GE(code.most_messages(), 65535u);
        for (const uint64_t number : {uint64_t(0), uint64_t(1), code.most_messages()})
          for (int64_t epoch = 0; epoch < 6; ++epoch) {
            const uint64_t data = code.encode({num_ranks - 1, num_channels - 1, epoch, number});
            if (data_bytes == 4) {
              EXPECT_EQ(data >> 32, 0u);
            }
            const Notice notice = code.decode(data);
            EXPECT_EQ(notice.sender, num_ranks - 1);
            EXPECT_EQ(notice.channel, num_channels - 1);
            EXPECT_EQ(notice.epoch, epoch % 4);
            EXPECT_EQ(notice.num_messages, number);
          }
      }
  expect_parts(outcome([] { NoticeCode(1 << 20, 16, 4); }), {"TERN_UNSUPPORTED", "1048576 ranks", "16 channels"});
}

TEST(Arrivals, CompleteInWhateverOrder) {
  Arrivals arrivals(3, 2);
  std::mt19937 random(1);
  for (int64_t epoch = 1; epoch < 40; epoch += 2) {
    // Two epochs of 1 to 5 messages, of which the last says how many; mixed.
    std::vector<Notice> notices;
    uint64_t left[2];
    for (const int64_t e : {epoch, epoch + 1}) {
      const uint64_t number = left[e - epoch] = 1 + random() % 5;
      for (uint64_t i = 1; i <= number; ++i) notices.push_back({2, 1, e % 4, i == number ? number : 0});
    }
    std::ranges::shuffle(notices, random);
    for (const Notice& notice : notices) {
      for (const int64_t e : {epoch, epoch + 1}) EXPECT_EQ(arrivals.complete(2, 1, e), left[e - epoch] == 0);
      --left[(notice.epoch - epoch) & 3];
      arrivals.count(notice);
    }
    EXPECT_FALSE(arrivals.complete(2, 0, 1));
    EXPECT_FALSE(arrivals.complete(1, 1, 1));
    for (const int64_t e : {epoch, epoch + 1}) {
      EXPECT_TRUE(arrivals.complete(2, 1, e));
      arrivals.retire(2, 1, e);
      EXPECT_TRUE(arrivals.complete(2, 1, e)) << "also later";
      EXPECT_FALSE(arrivals.complete(2, 1, e + 2));
    }
  }
}

TEST(Arrivals, RefuseWhatCannotBe) {
  Arrivals arrivals(2, 1);
  const auto count = [&](Notice notice) { return outcome([&] { arrivals.count(notice); }); };
  const auto retire = [&](int64_t epoch) { return outcome([&] { arrivals.retire(1, 0, epoch); }); };
  expect_parts(count({1, 0, 3, 1}), {"TERN_MISMATCH", "rank 1", "3 modulo 4", "credit"});
  expect_parts(count({3, 0, 1, 1}), {"TERN_INVALID_ARGUMENT", "rank 3"});
  expect_parts(retire(1), {"TERN_INVALID_STATE", "not complete"});
  EXPECT_EQ(count({1, 0, 2, 1}), "ok");
  expect_parts(retire(2), {"TERN_INVALID_STATE", "the one before it was not"});
  EXPECT_EQ(count({1, 0, 1, 2}), "ok");
  expect_parts(count({1, 0, 1, 2}), {"TERN_MISMATCH", "rank 1", "epoch 1", "2 messages"});
  EXPECT_EQ(retire(1), "ok");
  EXPECT_EQ(retire(2), "ok");
  expect_parts(retire(2), {"TERN_INVALID_STATE", "not under way"});
  EXPECT_EQ(count({1, 0, 3, 1}), "ok");
  expect_parts(count({1, 0, 3, 0}), {"TERN_MISMATCH", "epoch 3", "1 messages"});
}

TEST(Departures, EpochsFollowEachOther) {
  Departures departures(2, 1);
  const auto check = [&](int64_t epoch) { return outcome([&] { departures.check(1, 0, epoch); }); };
  EXPECT_EQ(check(1), "ok");
  EXPECT_EQ(check(2), "ok");
  expect_parts(check(3), {"TERN_INVALID_STATE", "rank 1", "epoch 3"});
  expect_parts(check(0), {"TERN_INVALID_STATE", "epoch 0"});
  departures.count(1, 0, 1, false);
  expect_parts(check(3), {"TERN_INVALID_STATE", "epoch 1 is not over"});
  departures.count(1, 0, 1, true);
  EXPECT_EQ(departures.num_sent(1, 0, 1), 2u);
  expect_parts(check(1), {"TERN_INVALID_STATE", "whose last message was sent"});
  EXPECT_EQ(check(3), "ok");
  EXPECT_EQ(departures.num_sent(1, 0, 3), 0u);
}

TEST(AgreeOnProvider, TheFirstThatAllHave) {
  const auto meet = [](const std::vector<Offer>& offers, std::vector<std::string>& chosen) {
    auto bootstraps = make_local_bootstraps(static_cast<int>(offers.size()));
    chosen.resize(offers.size());
    return run_threads(static_cast<int>(offers.size()),
                       [&](int r) { chosen[r] = agree_on_provider(*bootstraps[r], offers[r], {}, ample()); });
  };
  std::vector<std::string> chosen;
  for (const auto& text : meet({{{"verbs;ofi_rxm", "efa", "tcp"}, "", 1}, {{"tcp", "efa"}, "", 1}}, chosen)) EXPECT_EQ(text, "ok");
  EXPECT_EQ(chosen, (std::vector<std::string>{"efa", "efa"}));
  for (const auto& text : meet({{{"verbs;ofi_rxm"}, "", 1}, {{"verbs;ofi_rxm", "tcp"}, "", 1}, {{"tcp"}, "", 1}}, chosen))
    expect_parts(text, {"TERN_UNSUPPORTED", "rank 0 has verbs;ofi_rxm", "rank 2 has tcp"});
  for (const auto& text : meet({{{"tcp"}, "", 1}, {{}, "libfabric.so.1 is not on this machine; install libfabric", 1}}, chosen))
    expect_parts(text, {"TERN_UNSUPPORTED", "rank 1: libfabric.so.1", "install"});
  for (const auto& text : meet({{{"tcp"}, "", 1}, {{"tcp"}, "", 2}}, chosen))
    expect_parts(text, {"TERN_MISMATCH", "rank 1 has 2 channels", "rank 0 has 1"});
  for (const auto& text : meet({{{"tcp"}, "", 1, 4}, {{"tcp"}, "", 1, 4}, {{"tcp"}, "", 1, 2}}, chosen))
    expect_parts(text, {"TERN_MISMATCH", "rank 2 has 2 network devices, rank 0 has 4", "TERN_FABRIC_DOMAIN"});
}

}  // namespace
}  // namespace tern
