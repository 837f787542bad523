// SPDX-License-Identifier: Apache-2.0
// Built where libfabric's headers are missing.
#include "tools/network.h"

namespace tern::tools {

void list_fabric_providers(NetworkReport& report) {
  report.problem = "not listed: this command was built without libfabric's headers (libfabric-dev)";
}

}  // namespace tern::tools
