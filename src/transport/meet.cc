// SPDX-License-Identifier: Apache-2.0
#include "transport/meet.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>

#include "base/error.h"

namespace tern {
namespace {

// What a rank tells the others. Names are separated by commas: libfabric's own contain semicolons.
struct OfferMessage {
  int32_t num_channels = 0;
  char providers[192] = {};
  char problem[512] = {};
};

template <size_t kBytes>
void copy_text(char (&to)[kBytes], const std::string& text) {
  std::memcpy(to, text.data(), std::min(text.size(), kBytes - 1));
}

std::vector<std::string> split(const std::string& names) {
  std::vector<std::string> result;
  for (size_t begin = 0; begin < names.size();) {
    const size_t end = std::min(names.find(',', begin), names.size());
    result.push_back(names.substr(begin, end - begin));
    begin = end + 1;
  }
  return result;
}

bool has(const OfferMessage& offer, const std::string& provider) { return std::ranges::count(split(offer.providers), provider) != 0; }

}  // namespace

std::string agree_on_provider(Bootstrap& bootstrap, const Offer& offer, Deadline deadline) {
  OfferMessage mine;
  mine.num_channels = offer.num_channels;
  copy_text(mine.providers, fmt::format("{}", fmt::join(offer.providers, ",")));
  copy_text(mine.problem, offer.problem);
  std::vector<OfferMessage> all(bootstrap.num_ranks());
  bootstrap.allgather(&mine, all.data(), sizeof(mine), deadline);

  for (size_t r = 0; r < all.size(); ++r) {
    if (all[r].providers[0] == '\0') fail(TERN_UNSUPPORTED, "transport: rank {}: {}", r, all[r].problem);
    if (all[r].num_channels != all[0].num_channels)
      fail(TERN_MISMATCH, "transport: rank {} has {} channels, rank 0 has {}; all ranks must agree", r, all[r].num_channels,
           all[0].num_channels);
  }
  for (const std::string& provider : split(all[0].providers))
    if (std::ranges::all_of(all, [&](const OfferMessage& other) { return has(other, provider); })) return provider;
  const auto first_without = std::ranges::find_if(all, [&](const OfferMessage& other) { return !has(other, split(all[0].providers)[0]); });
  fail(TERN_UNSUPPORTED, "transport: no provider is on all {} ranks: rank 0 has {}, rank {} has {}; TERN_FABRIC_PROVIDER chooses one",
       all.size(), all[0].providers, first_without - all.begin(), first_without->providers);
}

}  // namespace tern
