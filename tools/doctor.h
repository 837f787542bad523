// SPDX-License-Identifier: Apache-2.0
// `tern doctor`: what the library finds on this machine, which ways it would take, and what keeps it from the others.
#pragma once

#include <string>

namespace CLI {
class App;
}

namespace tern::tools {

struct DoctorOptions {
  std::string json;  // a file; "-": standard output instead of the text
};

void add_doctor_flags(CLI::App& app, DoctorOptions& options);

// 0 if tokens can be exchanged on this machine in some way.
int run_doctor(const DoctorOptions& options);

}  // namespace tern::tools
