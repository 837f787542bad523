// SPDX-License-Identifier: Apache-2.0
// A shared library that may or may not be on the machine.
//
//   const DynamicLibrary library("libnvidia-ml.so.1");
//   if (const auto init = library.find<int()>("nvmlInit_v2")) init();
#pragma once

#include <dlfcn.h>

#include <memory>

namespace tern {

class DynamicLibrary {
 public:
  explicit DynamicLibrary(const char* name) : handle_(dlopen(name, RTLD_NOW | RTLD_LOCAL)) {}

  explicit operator bool() const { return handle_ != nullptr; }

  // nullptr if the library or the function is not there.
  template <typename Function>
  Function* find(const char* name) const {
    return handle_ == nullptr ? nullptr : reinterpret_cast<Function*>(dlsym(handle_.get(), name));
  }

 private:
  struct Close {
    void operator()(void* handle) const noexcept { dlclose(handle); }
  };
  std::unique_ptr<void, Close> handle_;
};

}  // namespace tern
