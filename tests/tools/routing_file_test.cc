// SPDX-License-Identifier: Apache-2.0
#include "routing/routing_file.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "base/error.h"

namespace tern::tools {
namespace {

class RoutingFile : public testing::Test {
 protected:
  RoutingFile() : path_(std::filesystem::temp_directory_path() / fmt::format("tern_routing_test_{}", getpid())) {}
  ~RoutingFile() override { std::filesystem::remove(path_); }

  std::string path() const { return path_.string(); }

  std::string contents() const {
    std::ifstream file(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  }

  void replace(const std::string& bytes) const { std::ofstream(path_, std::ios::binary | std::ios::trunc) << bytes; }

  std::string refusal() const {
    try {
      read_routing(path());
    } catch (const Failure& failure) {
      return failure.what();
    }
    return "";
  }

 private:
  std::filesystem::path path_;
};

// Ranks may have different numbers of tokens, none among them.
const Routing kSmall{2, 6, {{0, 5, -1, 3}, {}, {2, 2}}};

TEST_F(RoutingFile, ReadsWhatItWrote) {
  const Routing generated =
      generate_routing({.num_ranks = 4, .num_tokens = 33, .num_topk = 8, .num_experts = 64}, {.kind = RoutingKind::kZipf, .seed = 1});
  for (const Routing& routing : {generated, kSmall}) {
    write_routing(routing, path());
    const Routing found = read_routing(path());
    EXPECT_EQ(found.num_topk, routing.num_topk);
    EXPECT_EQ(found.num_experts, routing.num_experts);
    EXPECT_EQ(found.topk_idx, routing.topk_idx);
  }
}

TEST_F(RoutingFile, BytesAreAsDocumented) {
  write_routing({1, 258, {{257}, {-1}}}, path());
  const unsigned char expected[] = {'T', 'E', 'R', 'N', 'R', 'O', 'U', 'T', 1, 0, 0, 0, 2, 0, 0, 0,
                                    2,   1,   0,   0,   1,   0,   0,   0,                            // version, ranks, experts, top-k
                                    1,   0,   0,   0,   0,   0,   0,   0,                            // most tokens
                                    1,   0,   0,   0,   0,   0,   0,   0,   1, 0, 0, 0, 0, 0, 0, 0,  // tokens of each rank
                                    1,   1,   0,   0,   255, 255, 255, 255};                         // entries
  EXPECT_EQ(contents(), std::string(std::begin(expected), std::end(expected)));
}

TEST_F(RoutingFile, EveryCutIsNoticed) {
  write_routing(kSmall, path());
  const std::string whole = contents();
  for (size_t length = 0; length < whole.size(); ++length) {
    replace(whole.substr(0, length));
    EXPECT_NE(refusal(), "") << "cut to " << length << " bytes";
  }
}

TEST_F(RoutingFile, DamageIsNamed) {
  write_routing(kSmall, path());
  const std::string whole = contents();
  const auto refusal_with = [&](size_t at, char byte) {
    std::string damaged = whole;
    damaged[at] = byte;
    replace(damaged);
    return refusal();
  };
  EXPECT_NE(refusal_with(0, 'X').find("does not begin with TERNROUT"), std::string::npos);
  EXPECT_NE(refusal_with(8, 2).find("version 2"), std::string::npos);
  EXPECT_NE(refusal_with(12, 4).find("rank 3"), std::string::npos);                // there are no four; what follows is no count
  EXPECT_NE(refusal_with(15, 127).find("ranks"), std::string::npos);               // absurdly many
  EXPECT_NE(refusal_with(39, 127).find("rank 0"), std::string::npos);              // absurdly many tokens
  EXPECT_NE(refusal_with(whole.size() - 1, 1).find("rank 2"), std::string::npos);  // no such expert
  replace(whole + "x");
  EXPECT_NE(refusal().find("1 bytes too many"), std::string::npos);
}

TEST_F(RoutingFile, AbsentFileIsASystemError) {
  try {
    read_routing(path());
    FAIL() << "read a file that is not there";
  } catch (const Failure& failure) {
    EXPECT_EQ(failure.status(), TERN_SYSTEM_ERROR);
    EXPECT_NE(std::string(failure.what()).find(path()), std::string::npos);
  }
}

}  // namespace
}  // namespace tern::tools
