// SPDX-License-Identifier: Apache-2.0
#include "tools/models.h"

#include <fmt/ranges.h>

#include <sstream>

#include "base/error.h"

namespace tern::tools {
namespace {

constexpr Model kModels[] = {
    {"deepseek-v3", 7168, 256, 8, RoutingKind::kGroupLimited},
    {"kimi-k2", 7168, 384, 8, RoutingKind::kUniform},
    {"qwen3-235b", 4096, 128, 8, RoutingKind::kUniform},
    {"qwen3-30b", 2048, 128, 8, RoutingKind::kUniform},
    {"gpt-oss-120b", 2880, 128, 4, RoutingKind::kUniform},
    {"mixtral", 4096, 8, 2, RoutingKind::kUniform},
    {"custom", 0, 0, 0, RoutingKind::kUniform},
};

struct Generator {
  const char* name;
  RoutingKind kind;
};

constexpr Generator kGenerators[] = {{"uniform", RoutingKind::kUniform},
                                     {"zipf", RoutingKind::kZipf},
                                     {"group-limited", RoutingKind::kGroupLimited},
                                     {"one-rank", RoutingKind::kOneRank},
                                     {"one-expert", RoutingKind::kOneExpert}};

}  // namespace

std::vector<std::string> model_names() {
  std::vector<std::string> names;
  for (const Model& model : kModels) names.emplace_back(model.name);
  return names;
}

const Model& find_model(const std::string& name) {
  for (const Model& model : kModels) {
    if (name == model.name) return model;
  }
  fail(TERN_INVALID_ARGUMENT, "model \"{}\" is none of: {}", name, fmt::join(model_names(), ", "));
}

std::vector<std::string> generator_names() {
  std::vector<std::string> names;
  for (const Generator& generator : kGenerators) names.emplace_back(generator.name);
  return names;
}

std::optional<RoutingKind> find_generator(const std::string& name) {
  for (const Generator& generator : kGenerators) {
    if (name == generator.name) return generator.kind;
  }
  return std::nullopt;
}

std::string describe_routing(const RoutingOptions& routing) {
  if (routing.kind == RoutingKind::kZipf) return fmt::format("zipf {}", routing.skew);
  for (const Generator& generator : kGenerators) {
    if (generator.kind == routing.kind) return generator.name;
  }
  return "";
}

std::optional<RoutingOptions> parse_routing(const std::string& description) {
  std::istringstream words(description);
  std::string name;
  words >> name;
  const auto kind = find_generator(name);
  if (!kind) return std::nullopt;
  RoutingOptions routing{.kind = *kind};
  if (*kind == RoutingKind::kZipf) words >> routing.skew;
  return routing;
}

}  // namespace tern::tools
