// SPDX-License-Identifier: Apache-2.0
// Errors inside the library: one exception with the status that crosses the C boundary and a text that says what was
// asked, what was found and what to do.
//
//   if (hidden <= 0) fail(TERN_INVALID_ARGUMENT, "dispatch: hidden is {}, must be positive", hidden);
#pragma once

#include <fmt/core.h>
#include <tern/tern.h>

#include <cerrno>
#include <stdexcept>
#include <string>
#include <utility>

namespace tern {

class Failure : public std::runtime_error {
 public:
  Failure(tern_status status, const std::string& text) : std::runtime_error(text), status_(status) {}
  tern_status status() const { return status_; }

 private:
  tern_status status_;
};

template <typename... Values>
[[noreturn]] void fail(tern_status status, fmt::format_string<Values...> format, Values&&... values) {
  throw Failure(status, fmt::format(format, std::forward<Values>(values)...));
}

// Of a Failure its own; of anything else that may be thrown what comes nearest.
tern_status status_of(const std::exception& error);

// "shm_open: No such file or directory (2)": for a system call that has just set errno.
std::string errno_text(const char* call, int error = errno);

// Throws TERN_SYSTEM_ERROR with `what` and the text of errno.
[[noreturn]] void fail_errno(const char* call, const std::string& what);

const char* status_name(tern_status status);

}  // namespace tern
