// SPDX-License-Identifier: Apache-2.0
// Which provider, devices and traffic class: libfabric's offers, by our rule.
//
// A provider fits if it has reliable datagram endpoints (FI_EP_RDM) with remote writes that carry at least 4 bytes of completion data to the
// peer, without receives posted for them. Those that need help for that are listed by libfabric as "verbs;ofi_rxm". What it can do with memory of
// GPUs (FI_HMEM) does not count in the choice.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "transport/endpoint.h"
#include "transport/fabric_library.h"

namespace tern {

// What fits, as libfabric orders it.
class FabricChoices {
 public:
  // TERN_INVALID_ARGUMENT for a traffic class that does not exist. The options must outlive this.
  explicit FabricChoices(const EndpointOptions& options);

  // By our rule, without duplicates; one, if it was asked for. Empty: problem() says why, and what to do.
  const std::vector<std::string>& providers() const { return providers_; }
  const std::string& problem() const { return problem_; }

  // The devices that were asked for, or as many as were asked for, by our rule (choose_devices.h). `provider` is one of providers().
  std::vector<FabricInfo> devices_of(const std::string& provider) const;

 private:
  void list();
  const fi_info* as_asked_for(const fi_info* device) const;
  void rank_providers();
  // All that the provider has, each once.
  std::vector<const fi_info*> listed(std::string_view provider) const;
  bool fits(std::string_view provider) const;
  std::vector<const fi_info*> closest(const std::string& provider) const;

  const EndpointOptions& options_;
  uint32_t traffic_class_;
  FabricInfo infos_;
  FabricInfo gpu_infos_;  // the same, as far as they take memory of GPUs, if that is wanted
  std::vector<std::string> providers_;
  std::string problem_;
};

}  // namespace tern
