// SPDX-License-Identifier: Apache-2.0
// Lines that ranks leave for the process that started them, which may be another one.
//
//   SharedLines lines;                 // before the ranks are started
//   lines.add("rank 0 says");          // by one rank at a time
//   for (const std::string& line : lines.read()) ...
#pragma once

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

namespace tern::tools {

class SharedLines {
 public:
  SharedLines();

  // `line` has no newline in it.
  void add(const std::string& line);
  std::vector<std::string> read();

 private:
  struct Close {
    void operator()(std::FILE* file) const noexcept { std::fclose(file); }
  };
  std::unique_ptr<std::FILE, Close> file_;  // without a name; forked processes share it
};

}  // namespace tern::tools
