// SPDX-License-Identifier: Apache-2.0
// `tern doctor --network`: latency and bandwidth of the paths between nodes, by the ranks of a launcher, of several hosts too, or by ranks
// started here on declared nodes.
#pragma once

#include <string>

#include "tools/doctor.h"

namespace tern::tools {

// 0 if every path carries bytes; the report comes from rank 0.
int run_network_doctor(const DoctorOptions& options);

// Writes the text to a file; to standard output for "-".
void write_findings(const std::string& file, const std::string& text);

}  // namespace tern::tools
