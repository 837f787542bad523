// SPDX-License-Identifier: Apache-2.0
// libfabric, opened at run time. Its other functions are inline in its headers and go through what these return.
//
//   if (const FabricLibrary& library = fabric_library()) library.getinfo(...);
//
// Opened once and never closed: its providers keep threads and exit handlers. Only what libfabric 1.9 had is used, so that a library
// older than the headers will do.
#pragma once

#include <rdma/fabric.h>

#include <memory>
#include <string>

#include "base/dynamic_library.h"

namespace tern {

constexpr uint32_t kFabricVersion = FI_VERSION(1, 9);

class FabricLibrary {
 public:
  FabricLibrary();

  explicit operator bool() const { return fabric != nullptr; }
  std::string error_text(int code) const;  // of a negative or positive code

 private:
  DynamicLibrary library_;

 public:
  decltype(fi_version)* version;
  decltype(fi_getinfo)* getinfo;
  decltype(fi_freeinfo)* freeinfo;
  decltype(fi_dupinfo)* dupinfo;
  decltype(fi_strerror)* strerror;
  decltype(fi_fabric)* fabric;
};

const FabricLibrary& fabric_library();

struct FreeFabricInfo {
  void operator()(fi_info* info) const noexcept { fabric_library().freeinfo(info); }
};
using FabricInfo = std::unique_ptr<fi_info, FreeFabricInfo>;

}  // namespace tern
