// SPDX-License-Identifier: Apache-2.0
// Network namespaces of this host as nodes: each has a network device, or several, and bridges in a namespace of their own join them, one for
// the first devices of all nodes, one for the second ones ...
//
//   Namespaces nodes(3);                  // each has veth0
//   if (!nodes.problem().empty()) GTEST_SKIP() << nodes.problem();
//   nodes.enter(1);                       // the calling thread; a process of one thread is then on that node
//   nodes.disturb("delay 2ms loss 1%");   // netem, on every device
//   nodes.cut(1);                         // its cables
//   nodes.mend(1);
//   nodes.sent_bytes(0, 1);               // by veth1 of node 0
//
// Needs root, ip and for disturbances tc with netem. Nothing is left behind when this is destroyed.
#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace tern::conformance {

class Namespaces {
 public:
  explicit Namespaces(int num_nodes, int num_links = 1)
      : num_nodes_(num_nodes), num_links_(num_links), prefix_(fmt::format("tern{}", getpid())) {
    if (geteuid() != 0) {
      problem_ = "network namespaces need root";
      return;
    }
    bool done = run("ip netns add " + hub());
    for (int node = 0; node < num_nodes && done; ++node) done = run("ip netns add " + name(node));
    for (int link = 0; link < num_links && done; ++link) done = make_link(link);
    if (!done) problem_ = "network namespaces cannot be made here (ip netns, veth, bridge)";
  }
  ~Namespaces() {
    if (geteuid() != 0) return;
    for (int node = 0; node < num_nodes_; ++node) run("ip netns del " + name(node));
    run("ip netns del " + hub());
  }
  Namespaces(const Namespaces&) = delete;
  Namespaces& operator=(const Namespaces&) = delete;

  const std::string& problem() const { return problem_; }

  void enter(int node) const {
    const int fd = open(("/run/netns/" + name(node)).c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0 || setns(fd, CLONE_NEWNET) != 0) throw std::runtime_error("cannot enter a network namespace");
    close(fd);
  }

  // False: there is no netem here.
  bool disturb(const std::string& netem) const {
    bool done = true;
    for (int node = 0; node < num_nodes_; ++node)
      for (int link = 0; link < num_links_; ++link)
        done = done && run(fmt::format("tc -n {} qdisc replace dev veth{} root netem {}", name(node), link, netem));
    return done;
  }
  void cut(int node) const { set_links(node, "down"); }
  void mend(int node) const { set_links(node, "up"); }

  int64_t sent_bytes(int node, int link) const {
    const std::string command = fmt::format("ip netns exec {} cat /sys/class/net/veth{}/statistics/tx_bytes", name(node), link);
    FILE* output = popen(command.c_str(), "r");
    long long num_bytes = 0;
    const bool found = output != nullptr && fscanf(output, "%lld", &num_bytes) == 1;
    if (output != nullptr) pclose(output);
    if (!found) throw std::runtime_error("cannot read what a device has sent");
    return num_bytes;
  }

 private:
  bool make_link(int link) const {
    bool done = run(fmt::format("ip -n {0} link add bridge{1} type bridge && ip -n {0} link set bridge{1} up", hub(), link));
    for (int node = 0; node < num_nodes_ && done; ++node)
      done =
          run(fmt::format("ip -n {0} link add veth{4} type veth peer name to{1}-{4} netns {2} && "
                          "ip -n {2} link set to{1}-{4} master bridge{4} up && ip -n {0} addr add 10.123.{5}.{3}/24 dev veth{4} && "
                          "ip -n {0} link set veth{4} up",
                          name(node), node, hub(), node + 1, link, 45 + link));
    return done;
  }
  void set_links(int node, const char* state) const {
    for (int link = 0; link < num_links_; ++link)
      if (!run(fmt::format("ip -n {} link set to{}-{} {}", hub(), node, link, state))) throw std::runtime_error("cannot change a link");
  }
  std::string name(int node) const { return fmt::format("{}-{}", prefix_, node); }
  std::string hub() const { return prefix_ + "-hub"; }
  static bool run(const std::string& command) { return std::system(("(" + command + ") >/dev/null 2>&1").c_str()) == 0; }

  int num_nodes_, num_links_;
  std::string prefix_;
  std::string problem_;
};

}  // namespace tern::conformance
