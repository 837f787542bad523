// SPDX-License-Identifier: Apache-2.0
// Built where libfabric's headers are missing.
#include "base/dynamic_library.h"
#include "base/error.h"
#include "transport/endpoint.h"
#include "transport/fabric_report.h"
#include "transport/meet.h"

namespace tern {

FabricReport read_fabric() {
  FabricReport report;
  const DynamicLibrary library("libfabric.so.1");
  const auto version = library.find<uint32_t()>("fi_version");
  if (version != nullptr) report.libfabric = fmt::format("{}.{}", version() >> 16, version() & 0xFFFF);
  report.problem = "not listed: built without libfabric's headers (libfabric-dev)";
  return report;
}

std::unique_ptr<Endpoint> make_endpoint(Bootstrap& bootstrap, const EndpointOptions& options, Deadline deadline) {
  const std::string problem = "this library was built without libfabric's headers: install libfabric-dev and build it again";
  agree_on_provider(bootstrap, {.providers = {}, .problem = problem}, options.absent, deadline);
  fail(TERN_UNSUPPORTED, "transport: {}", problem);
}

}  // namespace tern
