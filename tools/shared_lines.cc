// SPDX-License-Identifier: Apache-2.0
#include "tools/shared_lines.h"

#include "base/error.h"

namespace tern::tools {

SharedLines::SharedLines() : file_(std::tmpfile()) {
  if (file_ == nullptr) fail_errno("tmpfile", "a place for results");
}

void SharedLines::add(const std::string& line) {
  std::fputs((line + "\n").c_str(), file_.get());
  if (std::fflush(file_.get()) != 0) fail_errno("fflush", "results cannot be kept");
}

std::vector<std::string> SharedLines::read() {
  std::string text;
  char part[4096];
  std::rewind(file_.get());
  while (const size_t count = std::fread(part, 1, sizeof part, file_.get())) text.append(part, count);
  std::vector<std::string> lines;
  for (size_t at = 0; at < text.size();) {
    const size_t end = text.find('\n', at);
    lines.push_back(text.substr(at, end - at));
    at = end + 1;
  }
  return lines;
}

}  // namespace tern::tools
