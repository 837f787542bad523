// SPDX-License-Identifier: Apache-2.0
#include "cuda/profiling.h"

#include <nvtx3/nvToolsExt.h>

namespace tern::cuda {
namespace {

nvtxDomainHandle_t domain() {
  static const nvtxDomainHandle_t handle = nvtxDomainCreateA("tern");
  return handle;
}

}  // namespace

ProfiledRange::ProfiledRange(const char* name) noexcept {
  nvtxEventAttributes_t attributes = {};
  attributes.version = NVTX_VERSION;
  attributes.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  attributes.messageType = NVTX_MESSAGE_TYPE_ASCII;
  attributes.message.ascii = name;
  nvtxDomainRangePushEx(domain(), &attributes);
}

ProfiledRange::~ProfiledRange() { nvtxDomainRangePop(domain()); }

}  // namespace tern::cuda
