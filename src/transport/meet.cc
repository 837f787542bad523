// SPDX-License-Identifier: Apache-2.0
#include "transport/meet.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "base/names.h"

namespace tern {
namespace {

// What a rank tells the others. Names are separated by commas: libfabric's own contain semicolons.
struct OfferMessage {
  int32_t num_channels = 0;
  int32_t num_devices = 0;
  char providers[192] = {};
  char problem[512] = {};
};

template <size_t kBytes>
void copy_text(char (&to)[kBytes], const std::string& text) {
  std::memcpy(to, text.data(), std::min(text.size(), kBytes - 1));
}

bool has(const OfferMessage& offer, const std::string& provider) { return std::ranges::count(split_names(offer.providers), provider) != 0; }

}  // namespace

std::string agree_on_provider(Bootstrap& bootstrap, const Offer& offer, const std::vector<uint8_t>& absent, Deadline deadline) {
  OfferMessage mine;
  mine.num_channels = offer.num_channels;
  mine.num_devices = offer.num_devices;
  copy_text(mine.providers, fmt::format("{}", fmt::join(offer.providers, ",")));
  copy_text(mine.problem, offer.problem);
  std::vector<OfferMessage> all(bootstrap.num_ranks());
  bootstrap.allgather(&mine, all.data(), sizeof(mine), deadline);
  std::vector<size_t> present;
  for (size_t r = 0; r < all.size(); ++r)
    if (absent.empty() || absent[r] == 0) present.push_back(r);

  const size_t first = present[0];
  for (const size_t r : present) {
    if (all[r].providers[0] == '\0') fail(TERN_UNSUPPORTED, "transport: rank {}: {}", r, all[r].problem);
    if (all[r].num_channels != all[first].num_channels)
      fail(TERN_MISMATCH, "transport: rank {} has {} channels, rank {} has {}; all ranks must agree", r, all[r].num_channels, first,
           all[first].num_channels);
    if (all[r].num_devices != all[first].num_devices)
      fail(TERN_MISMATCH,
           "transport: rank {} has {} network devices, rank {} has {}; all ranks must have as many (TERN_FABRIC_DOMAIN names them, "
           "TERN_FABRIC_RAILS says how many)",
           r, all[r].num_devices, first, all[first].num_devices);
  }
  const std::vector<std::string> firsts = split_names(all[first].providers);
  for (const std::string& provider : firsts)
    if (std::ranges::all_of(present, [&](size_t r) { return has(all[r], provider); })) return provider;
  const auto without = *std::ranges::find_if(present, [&](size_t r) { return !has(all[r], firsts[0]); });
  fail(TERN_UNSUPPORTED, "transport: no provider is on all {} ranks: rank {} has {}, rank {} has {}; TERN_FABRIC_PROVIDER chooses one",
       present.size(), first, all[first].providers, without, all[without].providers);
}

}  // namespace tern
