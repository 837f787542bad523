// SPDX-License-Identifier: Apache-2.0
// Where lines of log go: the caller's hook, or standard error. Owned by a group and shared by what is made from it.
#pragma once

#include <fmt/core.h>
#include <tern/tern.h>

#include <string>
#include <utility>

namespace tern {

class Log {
 public:
  Log() = default;
  // `level` TERN_LOG_OFF means the default: TERN_LOG_LEVEL, else warnings.
  Log(tern_log_fn hook, void* context, tern_log_level level);

  bool enabled(tern_log_level level) const { return level <= level_; }

  template <typename... Values>
  void write(tern_log_level level, fmt::format_string<Values...> format, Values&&... values) const {
    if (enabled(level)) emit(level, fmt::format(format, std::forward<Values>(values)...));
  }

 private:
  void emit(tern_log_level level, const std::string& text) const;

  tern_log_fn hook_ = nullptr;
  void* context_ = nullptr;
  tern_log_level level_ = TERN_LOG_WARNING;
};

}  // namespace tern
