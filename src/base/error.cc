// SPDX-License-Identifier: Apache-2.0
#include "base/error.h"

#include <new>
#include <system_error>

namespace tern {

std::string errno_text(const char* call, int error) {
  return fmt::format("{}: {} ({})", call, std::generic_category().message(error), error);
}

void fail_errno(const char* call, const std::string& what) {
  const std::string cause = errno_text(call);
  throw Failure(TERN_SYSTEM_ERROR, fmt::format("{}: {}", what, cause));
}

const char* status_name(tern_status status) {
  switch (status) {
    case TERN_OK: return "TERN_OK";
    case TERN_INVALID_ARGUMENT: return "TERN_INVALID_ARGUMENT";
    case TERN_INVALID_STATE: return "TERN_INVALID_STATE";
    case TERN_OUT_OF_MEMORY: return "TERN_OUT_OF_MEMORY";
    case TERN_UNSUPPORTED: return "TERN_UNSUPPORTED";
    case TERN_TIMEOUT: return "TERN_TIMEOUT";
    case TERN_ABORTED: return "TERN_ABORTED";
    case TERN_MISMATCH: return "TERN_MISMATCH";
    case TERN_STALE_PLAN: return "TERN_STALE_PLAN";
    case TERN_MASKED_OUT: return "TERN_MASKED_OUT";
    case TERN_CAPACITY_EXCEEDED: return "TERN_CAPACITY_EXCEEDED";
    case TERN_SYSTEM_ERROR: return "TERN_SYSTEM_ERROR";
    case TERN_INTERNAL_ERROR: return "TERN_INTERNAL_ERROR";
  }
  return "TERN_UNKNOWN";
}

tern_status status_of(const std::exception& error) {
  if (const auto* failure = dynamic_cast<const Failure*>(&error)) return failure->status();
  return dynamic_cast<const std::bad_alloc*>(&error) != nullptr ? TERN_OUT_OF_MEMORY : TERN_INTERNAL_ERROR;
}

}  // namespace tern
