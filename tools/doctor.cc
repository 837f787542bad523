// SPDX-License-Identifier: Apache-2.0
#include "tools/doctor.h"

#include <fmt/ranges.h>
#include <CLI/CLI.hpp>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/error.h"
#include "base/knobs.h"
#include "tools/cuda_facts.h"
#include "tools/doctor_network.h"
#include "tools/gpus.h"
#include "tools/kernel_features.h"
#include "tools/launch.h"
#include "tools/machine.h"
#include "tools/network.h"
#include "tools/probe.h"

namespace tern::tools {
namespace {

// One way for tokens to travel.
struct Path {
  std::string name;
  bool taken = false;
  std::string why;     // it is not taken
  std::string remedy;  // what would enable it
};

struct Findings {
  CpuFacts cpu;
  MemoryFacts memory;
  std::string kernel;
  std::vector<KernelFeature> features;
  GpuReport gpus;
  CudaReport cuda;
  NetworkReport network;
  std::vector<KnobDescription> knobs;
  std::optional<FoundLauncher> launcher;
  std::vector<Path> paths;
};

Path cpu_path(LaunchKind kind, const std::string& remedy) {
  const Probe probe = probe_launch(kind);
  return {probe.name, probe.works, probe.reason, probe.works ? "" : remedy};
}

Path cuda_path(const CudaReport& cuda) {
  if (!cuda.problem.empty())
    return {
        "CUDA engine", false, cuda.problem,
        built_with_cuda() ? "an NVIDIA GPU with a driver for CUDA 13 (nvidia-smi)" : "a build of Tern with the CUDA engine, by nvcc 13"};
  const Probe probe = probe_engine(TERN_DEVICE_CUDA);
  return {probe.name, probe.works, probe.reason, probe.works ? "" : "what the reason says"};
}

// Two ranks on nodes that are declared here, over the network's loopback.
Path network_path() {
  const Probe probe = probe_network();
  return {probe.name, probe.works, probe.reason,
          probe.works ? "" : "libfabric (libfabric1) with one of the providers verbs, efa, cxi or tcp"};
}

Findings examine() {
  Findings findings;
  // Processes first: they are forked, and libraries (this one, NVML, libfabric) may keep threads of their own.
  findings.paths.push_back(cpu_path(LaunchKind::kProcesses, "memfd and futex as listed above, and sockets between processes of one user"));
  findings.paths.push_back(cpu_path(LaunchKind::kThreads, "memfd and futex as listed above"));
  findings.cpu = read_cpu_facts();
  findings.memory = read_memory_facts();
  findings.kernel = kernel_release();
  findings.features = probe_kernel_features();
  findings.gpus = read_gpus();
  findings.network = read_network();
  findings.knobs = describe_knobs();
  findings.launcher = find_launcher();
  findings.cuda = read_cuda();
  test_cuda_pairs(findings.cuda);
  findings.paths.push_back(cuda_path(findings.cuda));
  findings.paths.push_back(network_path());
  return findings;
}

void print_heading(const char* name) { fmt::print("\n{}\n", name); }

void print_fact(const std::string& name, const std::string& value) { fmt::print("  {:<24}{}\n", name, value); }

std::string limit_text(uint64_t limit, bool bytes) {
  if (limit == UINT64_MAX) return "unlimited";
  return bytes ? human_bytes(static_cast<double>(limit)) : std::to_string(limit);
}

void print_machine(const Findings& findings) {
  const CpuFacts& cpu = findings.cpu;
  const MemoryFacts& memory = findings.memory;
  print_heading("Processor");
  print_fact("model", cpu.model);
  print_fact("cores", fmt::format("{}, usable by this process: {}", cpu.num_cores, cpu.num_usable));
  print_fact("control group limit", cpu.cgroup_limit ? fmt::format("{:.1f} cores", *cpu.cgroup_limit) : "none");
  print_fact("NUMA nodes", cpu.numa_node_cpus.empty()
                               ? "not told"
                               : fmt::format("{} (cores {})", cpu.numa_node_cpus.size(), fmt::join(cpu.numa_node_cpus, " | ")));
  print_heading("Memory");
  print_fact("total, available", fmt::format("{}, {}", human_bytes(static_cast<double>(memory.total_bytes)),
                                             human_bytes(static_cast<double>(memory.available_bytes))));
  print_fact("/dev/shm free", memory.shm_free_bytes
                                  ? human_bytes(static_cast<double>(*memory.shm_free_bytes)) + " (not used by Tern, which takes memfd)"
                                  : "absent");
  print_fact("huge pages", fmt::format("{} of {}", memory.huge_pages, human_bytes(static_cast<double>(memory.huge_page_bytes))));
  print_fact("transparent huge pages", fmt::format("{}; shared memory: {}", memory.transparent_huge_pages, memory.shared_huge_pages));
  print_fact("locked memory limit", limit_text(memory.locked_limit_bytes, true));
  print_fact("open files limit", limit_text(memory.open_files_limit, false));
  print_heading("Kernel");
  print_fact("Linux", findings.kernel);
  for (const KernelFeature& feature : findings.features)
    print_fact(feature.name, fmt::format("{:<4}{}", feature.works ? "yes" : "NO", feature.note));
}

const char* yes_or_no(bool value) { return value ? "yes" : "no"; }

void print_cuda(const CudaReport& cuda) {
  print_heading("CUDA");
  if (cuda.runtime > 0)
    print_fact("driver, runtime",
               fmt::format("{}, {}", cuda.driver > 0 ? cuda_version_text(cuda.driver) : "none", cuda_version_text(cuda.runtime)));
  if (!cuda.problem.empty()) print_fact("none", cuda.problem);
  for (size_t from = 0; from < cuda.devices.size(); ++from) {
    const CudaDeviceFacts& device = cuda.devices[from];
    print_fact(fmt::format("device {}", from),
               fmt::format("{} at {}, compute {}.{}, {} SMs, {}, L2 {}", device.name, device.pci_bus_id, device.compute_major,
                           device.compute_minor, device.num_sms, human_bytes(static_cast<double>(device.memory_bytes)),
                           human_bytes(static_cast<double>(device.l2_bytes))));
    print_fact("", fmt::format("windows: {}, shared by file descriptor: {}, by fabric handle: {}", yes_or_no(device.maps_memory),
                               yes_or_no(device.shares_by_fd), yes_or_no(device.shares_by_fabric)));
  }
  for (size_t from = 0; from < cuda.devices.size(); ++from) {
    for (size_t to = 0; to < cuda.devices.size(); ++to) {
      if (from == to) continue;
      const CudaPairFacts& pair = cuda.pair(from, to);
      print_fact(fmt::format("{} to {}", from, to),
                 fmt::format("{}, performance rank {}, atomics: {}; a copy: {}", pair.reaches ? "direct" : "NOT DIRECT",
                             pair.performance_rank, yes_or_no(pair.native_atomics),
                             pair.problem.empty() ? fmt::format("{:.0f} GB/s, unchanged", pair.gbps) : "FAILED: " + pair.problem));
    }
  }
}

void print_providers(const NetworkReport& network) {
  if (network.providers.empty()) print_fact("providers", network.problem);
  for (const FabricProvider& provider : network.providers)
    print_fact(&provider == network.providers.data() ? "providers" : "",
               fmt::format("{:<16}{}{}", provider.name, fmt::join(provider.devices, ", "), provider.gpu_memory ? "; memory of GPUs" : ""));
}

void print_devices(const Findings& findings) {
  print_heading("GPUs");
  const GpuReport& report = findings.gpus;
  if (!report.driver.empty()) print_fact("NVIDIA driver", report.driver);
  if (!report.problem.empty()) print_fact("none", report.problem);
  for (size_t i = 0; i < report.gpus.size(); ++i) {
    const GpuFacts& gpu = report.gpus[i];
    print_fact(fmt::format("GPU {}", i),
               fmt::format("{}, {}, compute {}.{}, {} NVLinks{}; to the others: {}", gpu.name,
                           human_bytes(static_cast<double>(gpu.memory_bytes)), gpu.compute_major, gpu.compute_minor, gpu.num_nvlinks,
                           gpu.nvlink_version > 0 ? fmt::format(" (version {})", gpu.nvlink_version) : "", fmt::join(gpu.link_to, " ")));
  }
  print_cuda(findings.cuda);
  print_heading("Network");
  print_fact("libfabric", findings.network.libfabric.empty() ? findings.network.problem : findings.network.libfabric);
  if (!findings.network.libfabric.empty()) print_providers(findings.network);
  print_fact("RDMA devices",
             findings.network.rdma_devices.empty() ? "none" : fmt::format("{}", fmt::join(findings.network.rdma_devices, ", ")));
}

void print_findings(const Findings& findings) {
  fmt::print("Tern {}\n", version_text(tern_version()));
  print_machine(findings);
  print_devices(findings);
  print_heading("Environment");
  print_fact("launcher", findings.launcher ? fmt::format("{}: rank {} of {}", findings.launcher->name, findings.launcher->rank,
                                                         findings.launcher->num_ranks)
                                           : "none");
  for (const KnobDescription& knob : findings.knobs)
    print_fact(knob.name, fmt::format("{:<8}{}", knob.value.empty() ? "unset" : knob.value, knob.meaning));
  print_heading("Ways for tokens to travel");
  for (const Path& path : findings.paths) {
    print_fact(path.name, path.taken ? "yes" : "no: " + path.why);
    if (!path.taken) print_fact("", "would need: " + path.remedy);
  }
}

using Json = nlohmann::ordered_json;

Json machine_json(const Findings& findings) {
  const CpuFacts& cpu = findings.cpu;
  const MemoryFacts& memory = findings.memory;
  Json features = Json::array();
  for (const KernelFeature& feature : findings.features)
    features.push_back({{"name", feature.name}, {"works", feature.works}, {"note", feature.note}});
  return {{"cpu",
           {{"model", cpu.model},
            {"cores", cpu.num_cores},
            {"usable_cores", cpu.num_usable},
            {"cgroup_limit_cores", cpu.cgroup_limit ? Json(*cpu.cgroup_limit) : Json()},
            {"numa_nodes", cpu.numa_node_cpus}}},
          {"memory",
           {{"total_bytes", memory.total_bytes},
            {"available_bytes", memory.available_bytes},
            {"shm_free_bytes", memory.shm_free_bytes ? Json(*memory.shm_free_bytes) : Json()},
            {"huge_pages", memory.huge_pages},
            {"huge_page_bytes", memory.huge_page_bytes},
            {"transparent_huge_pages", memory.transparent_huge_pages},
            {"shared_huge_pages", memory.shared_huge_pages},
            {"locked_limit_bytes", memory.locked_limit_bytes},
            {"open_files_limit", memory.open_files_limit}}},
          {"kernel", {{"release", findings.kernel}, {"features", features}}}};
}

Json cuda_json(const CudaReport& cuda) {
  Json devices = Json::array(), pairs = Json::array();
  for (const CudaDeviceFacts& device : cuda.devices) {
    devices.push_back({{"name", device.name},
                       {"pci_bus_id", device.pci_bus_id},
                       {"compute_capability", fmt::format("{}.{}", device.compute_major, device.compute_minor)},
                       {"sms", device.num_sms},
                       {"memory_bytes", device.memory_bytes},
                       {"l2_bytes", device.l2_bytes},
                       {"windows", device.maps_memory},
                       {"shares_by_fd", device.shares_by_fd},
                       {"shares_by_fabric", device.shares_by_fabric}});
  }
  for (size_t from = 0; from < cuda.devices.size(); ++from) {
    for (size_t to = 0; to < cuda.devices.size(); ++to) {
      if (from == to) continue;
      const CudaPairFacts& pair = cuda.pair(from, to);
      pairs.push_back({{"from", from},
                       {"to", to},
                       {"direct", pair.reaches},
                       {"native_atomics", pair.native_atomics},
                       {"performance_rank", pair.performance_rank},
                       {"copy_gbps", pair.gbps},
                       {"problem", pair.problem}});
    }
  }
  return {{"driver", cuda.driver}, {"runtime", cuda.runtime}, {"problem", cuda.problem}, {"devices", devices}, {"pairs", pairs}};
}

Json devices_json(const Findings& findings) {
  Json gpus = Json::array();
  for (const GpuFacts& gpu : findings.gpus.gpus) {
    gpus.push_back({{"name", gpu.name},
                    {"memory_bytes", gpu.memory_bytes},
                    {"compute_capability", fmt::format("{}.{}", gpu.compute_major, gpu.compute_minor)},
                    {"nvlinks", gpu.num_nvlinks},
                    {"nvlink_version", gpu.nvlink_version},
                    {"link_to", gpu.link_to}});
  }
  const NetworkReport& network = findings.network;
  Json providers = Json::array();
  for (const FabricProvider& provider : network.providers)
    providers.push_back({{"name", provider.name}, {"devices", provider.devices}, {"gpu_memory", provider.gpu_memory}});
  return {
      {"gpus", {{"driver", findings.gpus.driver}, {"problem", findings.gpus.problem}, {"list", gpus}}},
      {"cuda", cuda_json(findings.cuda)},
      {"network",
       {{"libfabric", network.libfabric}, {"providers", providers}, {"problem", network.problem}, {"rdma_devices", network.rdma_devices}}}};
}

Json findings_json(const Findings& findings) {
  Json knobs = Json::array(), paths = Json::array();
  for (const KnobDescription& knob : findings.knobs)
    knobs.push_back({{"name", knob.name}, {"value", knob.value}, {"meaning", knob.meaning}});
  for (const Path& path : findings.paths)
    paths.push_back({{"name", path.name}, {"taken", path.taken}, {"why", path.why}, {"would_need", path.remedy}});
  Json document{{"version", version_text(tern_version())}};
  document.update(machine_json(findings));
  document.update(devices_json(findings));
  document["launcher"] =
      findings.launcher
          ? Json{{"name", findings.launcher->name}, {"rank", findings.launcher->rank}, {"ranks", findings.launcher->num_ranks}}
          : Json();
  document["knobs"] = knobs;
  document["paths"] = paths;
  return document;
}

}  // namespace

void add_doctor_flags(CLI::App& app, DoctorOptions& options) {
  app.add_option("--json", options.json, "Write the findings to this file, or instead of the text to standard output with \"-\"");
  CLI::Option* network =
      app.add_flag("--network", options.network,
                   "Test the paths between nodes instead: latency and bandwidth of every pair of ranks, over what the library would take; "
                   "with the ranks of a launcher (torchrun, mpirun, srun), else with ranks started here");
  app.add_option("--ranks", options.num_ranks, "Ranks; default: as many as the launcher started, else 2")
      ->check(CLI::Range(2, 1024))
      ->needs(network);
  app.add_option("--ranks-per-node", options.ranks_per_node,
                 "Declares nodes of so many ranks; default: TERN_RANKS_PER_NODE, else a host is a node, and so is each rank started here")
      ->check(CLI::Range(1, 1024))
      ->needs(network);
  app.add_flag("--rails", options.rails, "Only pairs of ranks at the same place in their nodes, which are those that tokens take")
      ->needs(network);
  app.add_option("--timeout", options.timeout_ms, "Deadline of each pair's test, milliseconds")
      ->check(CLI::Range(int64_t{1}, int64_t{86400000}))
      ->capture_default_str()
      ->needs(network);
}

int run_doctor(const DoctorOptions& options) {
  if (options.network) return run_network_doctor(options);
  const Findings findings = examine();
  if (options.json != "-") print_findings(findings);
  if (!options.json.empty()) write_findings(options.json, findings_json(findings).dump(2));
  return std::ranges::any_of(findings.paths, &Path::taken) ? 0 : 2;
}

}  // namespace tern::tools
