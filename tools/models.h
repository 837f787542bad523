// SPDX-License-Identifier: Apache-2.0
// Shapes of models in use, and the ways in which tokens are routed: the choices behind `--model` and `--routing`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "routing/routing.h"

namespace tern::tools {

struct Model {
  const char* name;
  int64_t hidden;  // 0, as all numbers of "custom": must be given
  int experts, topk;
  RoutingKind routing;
};

std::vector<std::string> model_names();

// Throws TERN_INVALID_ARGUMENT for a name that is none of them.
const Model& find_model(const std::string& name);

std::vector<std::string> generator_names();
std::optional<RoutingKind> find_generator(const std::string& name);

// "uniform", "zipf 1.2"; and back: none for what is no generator, as "file layer.routing".
std::string describe_routing(const RoutingOptions& routing);
std::optional<RoutingOptions> parse_routing(const std::string& description);

}  // namespace tern::tools
