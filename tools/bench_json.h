// SPDX-License-Identifier: Apache-2.0
// The results of `tern bench` for programs. Rank 0, which may be another process, leaves them where the command finds them at the end.
//
//   BenchJson json;                       // before ranks are started
//   json.add(setting, records);           // by rank 0
//   json.write("result.json");
#pragma once

#include <string>
#include <vector>

#include "tools/bench.h"
#include "tools/shared_lines.h"

namespace tern::tools {

class BenchJson {
 public:
  void add_machine(const BenchSetting& setting, const std::vector<LinkRates>& links);
  void add(const BenchSetting& setting, const std::vector<BenchRecord>& records);

  // Does nothing if nothing was added: another process has it.
  void write(const std::string& path);

 private:
  SharedLines lines_;  // one document each
};

}  // namespace tern::tools
