// SPDX-License-Identifier: Apache-2.0
// Lists of names in one text: "eth0,eth1".
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

namespace tern {

// What stands between the commas; nothing of an empty text.
inline std::vector<std::string> split_names(std::string_view text) {
  std::vector<std::string> names;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    names.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return names;
}

}  // namespace tern
