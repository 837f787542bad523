// SPDX-License-Identifier: Apache-2.0
#include "base/log.h"

#include <algorithm>
#include <cstdio>

#include "base/knobs.h"

namespace tern {

Log::Log(tern_log_fn hook, void* context, tern_log_level level) : hook_(hook), context_(context), level_(level) {
  if (level_ != TERN_LOG_OFF) return;
  level_ = static_cast<tern_log_level>(std::min<int64_t>(knobs().log_level, TERN_LOG_DEBUG));
}

void Log::emit(tern_log_level level, const std::string& text) const {
  if (hook_ != nullptr) return hook_(context_, level, text.c_str());
  static constexpr const char* kNames[] = {"off", "error", "warning", "info", "debug"};
  // fmt::print throws where standard error takes nothing, and lines come from threads and destructors too.
  const std::string line = fmt::format("tern {}: {}\n", kNames[level], text);
  static_cast<void>(std::fwrite(line.data(), 1, line.size(), stderr));
}

}  // namespace tern
