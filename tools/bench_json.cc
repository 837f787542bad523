// SPDX-License-Identifier: Apache-2.0
#include "tools/bench_json.h"

#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "tools/cuda_facts.h"
#include "tools/machine.h"

namespace tern::tools {
namespace {

using Json = nlohmann::ordered_json;

Json links_json(const LinkRates& rates) {
  return {{"num_sms", rates.num_sms},
          {"push_gbps", rates.push_gbps},
          {"pull_gbps", rates.pull_gbps},
          {"push_with_own_share_gbps", rates.push_all_gbps},
          {"pull_with_own_share_gbps", rates.pull_all_gbps}};
}

Json gpus_json(const std::vector<LinkRates>& links) {
  const CudaReport report = read_cuda();
  Json gpus = Json::array(), rates = Json::array();
  for (const CudaDeviceFacts& gpu : report.devices)
    gpus.push_back({{"name", gpu.name}, {"sms", gpu.num_sms}, {"memory_bytes", gpu.memory_bytes}});
  for (const LinkRates& of_sms : links) rates.push_back(links_json(of_sms));
  return {{"list", gpus},
          {"cuda_driver", cuda_version_text(report.driver)},
          {"cuda_runtime", cuda_version_text(report.runtime)},
          {"links", rates}};
}

Json record_json(const BenchSetting& setting, const BenchRecord& record) {
  const Routing& routing = setting.shape.routing;
  Json json{{"op", record.op},
            {"device", setting.device.cuda() ? "cuda" : "cpu"},
            {"mode", record.mode},
            {"on_timeout", setting.options.on_timeout},
            {"layout", layout_name(setting.shape.layout)},
            {"dtype", setting.shape.format.name},
            {"wire", setting.options.wire},
            {"ranks", routing.num_ranks()},
            {"ranks_per_node", record.ranks_per_node},
            {"tokens", routing.max_tokens()},
            {"hidden", setting.shape.hidden},
            {"topk", routing.num_topk},
            {"experts", routing.num_experts},
            {"median_us", record.times.median_us()},
            {"p99_us", record.times.p99_us()},
            {"logical_bytes", record.bytes.logical},
            {"wire_bytes", record.bytes.wire},
            {"link_bytes", record.bytes.link},
            {"network_bytes", record.bytes.network},
            {"network_gbps", record.gbps(record.bytes.network)},
            {"network_ceiling_gbps", record.network_ceiling_gbps},
            {"logical_gbps", record.gbps(record.bytes.logical)},
            {"wire_gbps", record.gbps(record.bytes.wire)},
            {"ceiling_gbps", record.ceiling_gbps()},
            {"share_of_ceiling", record.share_of_ceiling()},
            {"verified", record.wrong.empty()},
            {"buffers", record.buffers},
            {"combine_mode", setting.options.combine},
            {"extent", record.extent},
            {"routing", setting.traffic.description},
            {"seed", setting.options.traffic.seed},
            {"iters", setting.options.iters},
            {"ceiling_us", record.ceiling_us},
            {"ceiling_logical_gbps", record.ceiling_us > 0 ? static_cast<double>(record.bytes.logical) / record.ceiling_us * 1e-3 : 0},
            {"wrong", record.wrong}};
  if (setting.device.cuda()) {
    json["clock"] = record.clock;
    json["cold"] = setting.options.cold;
    json["chain"] = record.num_chained;
    json["num_sms"] = record.num_sms;
    json["expert_alignment"] = setting.shape.expert_alignment;
    json["links"] = links_json(record.links);
  }
  return json;
}

}  // namespace

void BenchJson::add_machine(const BenchSetting& setting, const std::vector<LinkRates>& links) {
  const CpuFacts cpu = read_cpu_facts();
  Json machine{{"cpu", cpu.model},
               {"cores", cpu.num_usable},
               {"numa_nodes", cpu.numa_node_cpus.size()},
               {"memory_bytes", read_memory_facts().total_bytes},
               {"kernel", kernel_release()},
               {"tern_version", version_text(tern_version())},
               {"launch", launch_name(setting.launch.kind)}};
  if (setting.device.cuda()) machine["gpus"] = gpus_json(links);
  lines_.add(Json{{"machine", machine}}.dump());
}

void BenchJson::add(const BenchSetting& setting, const std::vector<BenchRecord>& records) {
  for (const BenchRecord& record : records) lines_.add(record_json(setting, record).dump());
}

void BenchJson::write(const std::string& path) {
  const std::vector<std::string> lines = lines_.read();
  if (lines.empty()) return;
  Json document{{"machine", Json()}, {"records", Json::array()}};
  for (const std::string& text : lines) {
    const Json line = Json::parse(text);
    if (line.contains("machine"))
      document["machine"] = line["machine"];
    else
      document["records"].push_back(line);
  }
  std::ofstream file(path);
  file << document.dump(2) << '\n';
  file.close();
  if (!file) fail_errno("write", fmt::format("results cannot be written to {}", path));
}

}  // namespace tern::tools
