// SPDX-License-Identifier: Apache-2.0
// One line on the terminal that says what is going on and how far it is. Silent where standard error is no terminal.
#pragma once

#include <fmt/format.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <string>

namespace tern::tools {

class Progress {
 public:
  explicit Progress(bool enabled) : enabled_(enabled && isatty(STDERR_FILENO) != 0) {}
  ~Progress() { clear(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void show(const std::string& what, int64_t done, int64_t total) {
    if (!enabled_) return;
    constexpr int64_t kWidth = 24;
    const auto filled = static_cast<size_t>(total > 0 ? kWidth * done / total : kWidth);
    fmt::print(stderr, "\r\x1b[K[{:<{}}] {}/{} {}", std::string(filled, '='), kWidth, done, total, what);
    std::fflush(stderr);
    shown_ = true;
  }

  void clear() {
    if (!shown_) return;
    fmt::print(stderr, "\r\x1b[K");
    std::fflush(stderr);
    shown_ = false;
  }

 private:
  bool enabled_;
  bool shown_ = false;
};

}  // namespace tern::tools
