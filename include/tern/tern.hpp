// SPDX-License-Identifier: Apache-2.0
//
// tern.hpp: the C++20 face of tern.h, header only. Objects own their handle and free it when they go out of scope (never
// a collective call); functions throw tern::Error with the library's text. Arguments are the C structs,
// given by named initialisers:
//
//   tern::Exchange exchange(group, {.device = TERN_DEVICE_CPU, .max_tokens = 128});
//   tern::Plan plan(exchange, {.max_tokens = 128, .num_experts = 256, .num_topk = 8});
//   const tern_plan_info info = plan.route({.topk_idx = idx, .num_tokens = 128});
//   plan.dispatch({.tokens = x, .hidden = 7168, .out_tokens = rows});
//
// What each call does, waits for, and may be called with is documented in tern.h. Threads and lifetimes: likewise. Objects
// may go in any order, but for WindowBuffers, which an Exchange must outlive.
#pragma once

#include <tern/tern.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace tern {

class Error : public std::runtime_error {
 public:
  Error(tern_status status, const std::string& text) : std::runtime_error(text), status_(status) {}
  tern_status status() const noexcept { return status_; }

 private:
  tern_status status_;
};

namespace detail {

inline void check(tern_status status) {
  if (status != TERN_OK) throw Error(status, tern_last_error());
}

// Owns a C handle: one template for all of them.
template <typename Handle, void (*destroy)(Handle*)>
struct Deleter {
  void operator()(Handle* handle) const noexcept { destroy(handle); }
};
template <typename Handle, void (*destroy)(Handle*)>
using Owned = std::unique_ptr<Handle, Deleter<Handle, destroy>>;

}  // namespace detail

class Group {
 public:
  static Group from_env(tern_group_options options = {}) {
    tern_group* handle = nullptr;
    detail::check(tern_group_create_from_env(&options, &handle));
    return Group(handle);
  }

  static Group from_allgather(int32_t rank, int32_t num_ranks, tern_allgather_fn allgather, void* context,
                              tern_group_options options = {}) {
    tern_group* handle = nullptr;
    detail::check(tern_group_create_from_allgather(&options, rank, num_ranks, allgather, context, &handle));
    return Group(handle);
  }

  // Ranks as threads of this process: element r is for the thread that plays rank r.
  static std::vector<Group> local(int32_t num_ranks, tern_group_options options = {}) {
    std::vector<tern_group*> handles(num_ranks > 0 ? static_cast<size_t>(num_ranks) : 0);
    detail::check(tern_group_create_local(&options, num_ranks, handles.data()));
    std::vector<Group> groups;
    groups.reserve(handles.size());
    for (tern_group* handle : handles) groups.push_back(Group(handle));
    return groups;
  }

  tern_group_info info() const {
    tern_group_info result;
    detail::check(tern_group_get_info(get(), &result));
    return result;
  }
  int32_t rank() const { return info().rank; }
  int32_t num_ranks() const { return info().num_ranks; }
  tern_group* get() const { return handle_.get(); }

 private:
  explicit Group(tern_group* handle) : handle_(handle) {}
  detail::Owned<tern_group, tern_group_destroy> handle_;
};

// What an exchange has recorded: see tern_trace_read.
struct Timeline {
  std::vector<tern_span> spans;
  int64_t num_dropped = 0;
};

class Exchange {
 public:
  Exchange(const Group& group, tern_exchange_options options) {
    tern_exchange* handle = nullptr;
    detail::check(tern_exchange_create(group.get(), &options, &handle));
    handle_.reset(handle);
  }

  static tern_memory_info query_memory(const Group& group, tern_exchange_options options) {
    tern_memory_info result;
    detail::check(tern_exchange_query_memory(group.get(), &options, &result));
    return result;
  }

  tern_exchange_info info() const {
    tern_exchange_info result;
    detail::check(tern_exchange_get_info(get(), &result));
    return result;
  }

  tern_exchange_state state() const {
    tern_exchange_state result;
    detail::check(tern_exchange_get_state(get(), &result));
    return result;
  }

  tern_metrics metrics() const {
    tern_metrics result;
    detail::check(tern_exchange_get_metrics(get(), &result));
    return result;
  }

  void recover(tern_recover_options options = {}) { detail::check(tern_exchange_recover(get(), &options)); }

  void start_trace(int64_t capacity = 0) { detail::check(tern_trace_start(get(), capacity)); }
  void stop_trace() { detail::check(tern_trace_stop(get())); }

  Timeline timeline() const {
    int64_t num_spans = 0;
    detail::check(tern_trace_read(get(), nullptr, 0, &num_spans, nullptr));
    Timeline result{std::vector<tern_span>(static_cast<size_t>(num_spans))};
    detail::check(tern_trace_read(get(), result.spans.data(), num_spans, &num_spans, &result.num_dropped));
    return result;
  }

  tern_exchange* get() const { return handle_.get(); }

 private:
  detail::Owned<tern_exchange, tern_exchange_destroy> handle_;
};

// Memory in this rank's window, for operations without a copy.
class WindowBuffer {
 public:
  WindowBuffer(const Exchange& exchange, int64_t num_bytes) : num_bytes_(num_bytes) {
    void* pointer = nullptr;
    detail::check(tern_window_alloc(exchange.get(), num_bytes, &pointer));
    memory_ = std::unique_ptr<void, Free>(pointer, Free{exchange.get()});
  }

  void* data() const { return memory_.get(); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(memory_.get());
  }
  int64_t num_bytes() const { return num_bytes_; }

 private:
  struct Free {
    tern_exchange* exchange = nullptr;
    void operator()(void* pointer) const noexcept { tern_window_free(exchange, pointer); }
  };
  std::unique_ptr<void, Free> memory_{nullptr, Free{}};
  int64_t num_bytes_;
};

class Plan {
 public:
  Plan(const Exchange& exchange, tern_plan_options options) {
    tern_plan* handle = nullptr;
    detail::check(tern_plan_create(exchange.get(), &options, &handle));
    handle_.reset(handle);
  }

  tern_plan_info route(tern_routing routing, tern_launch launch = {}) {
    tern_plan_info result;
    detail::check(tern_plan_route(get(), &routing, &launch, &result));
    return result;
  }

  tern_plan_info info() const {
    tern_plan_info result;
    detail::check(tern_plan_get_info(get(), &result));
    return result;
  }

  int64_t row_capacity() const {
    int64_t num_rows = 0;
    detail::check(tern_plan_get_row_capacity(get(), &num_rows));
    return num_rows;
  }

  // args.routing stays NULL here: the next function is for that.
  void dispatch(tern_dispatch_args args, tern_launch launch = {}) { detail::check(tern_dispatch(get(), &args, &launch)); }

  // Routes and dispatches in one operation (extent WORST).
  void dispatch(tern_routing routing, tern_dispatch_args args, tern_launch launch = {}) {
    args.routing = &routing;
    dispatch(args, launch);
  }

  void combine(tern_combine_args args, tern_launch launch = {}) { detail::check(tern_combine(get(), &args, &launch)); }

  tern_plan* get() const { return handle_.get(); }

 private:
  detail::Owned<tern_plan, tern_plan_destroy> handle_;
};

}  // namespace tern
