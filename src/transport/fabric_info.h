// SPDX-License-Identifier: Apache-2.0
// Which provider, device and traffic class: libfabric's offers, by our rule.
//
// A provider fits if it has reliable datagram endpoints (FI_EP_RDM) with remote writes that carry at least 4 bytes of completion data to the
// peer, without receives posted for them. Those that need help for that are listed by libfabric as "verbs;ofi_rxm".
#pragma once

#include <string>
#include <vector>

#include "transport/endpoint.h"
#include "transport/fabric_library.h"

namespace tern {

// What fits, as libfabric orders it.
class FabricChoices {
 public:
  // TERN_INVALID_ARGUMENT for a traffic class that does not exist.
  explicit FabricChoices(const EndpointOptions& options);

  // By our rule, without duplicates; one, if it was asked for. Empty: problem() says why, and what to do.
  const std::vector<std::string>& providers() const { return providers_; }
  const std::string& problem() const { return problem_; }

  // The first device of the provider, or the one that was asked for. `provider` is one of providers().
  FabricInfo first_of(const std::string& provider) const;

 private:
  void list(const EndpointOptions& options);
  void rank_providers(const std::string& asked_for);
  bool fits(const fi_info& info) const;

  std::string domain_;
  uint32_t traffic_class_;
  FabricInfo infos_;
  std::vector<std::string> providers_;
  std::string problem_;
};

}  // namespace tern
