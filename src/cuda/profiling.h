// SPDX-License-Identifier: Apache-2.0
// Ranges of the host's time in the domain "tern" of NVTX, for profilers that look (Nsight Systems); otherwise they cost next to nothing.
//
//   const ProfiledRange range("dispatch");
#pragma once

namespace tern::cuda {

// From here to the end of the scope, on this thread. `name` is a literal.
class ProfiledRange {
 public:
  explicit ProfiledRange(const char* name) noexcept;
  ~ProfiledRange();
  ProfiledRange(const ProfiledRange&) = delete;
  ProfiledRange& operator=(const ProfiledRange&) = delete;
};

}  // namespace tern::cuda
