// SPDX-License-Identifier: Apache-2.0
// A plan with a lane of its own, on which a small batch makes the round trip: whatever was refused elsewhere on the exchange
// must not change its result. One rank.
#pragma once

#include <tern/tern.h>

namespace tern::fuzz {

class Witness {
 public:
  // The exchange must outlive it and have more lanes than `lane`.
  Witness(tern_exchange* exchange, int lane);
  ~Witness() { tern_plan_destroy(plan_); }
  Witness(const Witness&) = delete;
  Witness& operator=(const Witness&) = delete;

  // Routes, dispatches and combines; ends the process with the reason if anything is not as it must be.
  void make_round_trip(const char* after);

 private:
  tern_plan* plan_ = nullptr;
  int lane_;
};

// Ends the process with the text and tern_last_error() if the condition does not hold.
void require(bool condition, const char* call, const char* what);

}  // namespace tern::fuzz
