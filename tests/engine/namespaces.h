// SPDX-License-Identifier: Apache-2.0
// Network namespaces of this host as nodes: each has one network device, and a bridge in a namespace of its own joins them.
//
//   Namespaces nodes(3);
//   if (!nodes.problem().empty()) GTEST_SKIP() << nodes.problem();
//   nodes.enter(1);                       // the calling thread; a process of one thread is then on that node
//   nodes.disturb("delay 2ms loss 1%");   // netem, on every device
//   nodes.cut(1);                         // its cable
//   nodes.mend(1);
//
// Needs root, ip and for disturbances tc with netem. Nothing is left behind when this is destroyed.
#pragma once

#include <fcntl.h>
#include <fmt/format.h>
#include <sched.h>
#include <unistd.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace tern::conformance {

class Namespaces {
 public:
  explicit Namespaces(int num_nodes) : num_nodes_(num_nodes), prefix_(fmt::format("tern{}", getpid())) {
    if (geteuid() != 0) {
      problem_ = "network namespaces need root";
      return;
    }
    bool done = run(fmt::format("ip netns add {0} && ip -n {0} link add bridge type bridge && ip -n {0} link set bridge up", hub()));
    for (int node = 0; node < num_nodes && done; ++node)
      done =
          run(fmt::format("ip netns add {0} && ip -n {0} link add veth type veth peer name to{1} netns {2} && "
                          "ip -n {2} link set to{1} master bridge up && ip -n {0} addr add 10.123.45.{3}/24 dev veth && "
                          "ip -n {0} link set veth up",
                          name(node), node, hub(), node + 1));
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
      done = done && run(fmt::format("tc -n {} qdisc replace dev veth root netem {}", name(node), netem));
    return done;
  }
  void cut(int node) const {
    if (!run(fmt::format("ip -n {} link set to{} down", hub(), node))) throw std::runtime_error("cannot cut a link");
  }
  void mend(int node) const {
    if (!run(fmt::format("ip -n {} link set to{} up", hub(), node))) throw std::runtime_error("cannot mend a link");
  }

 private:
  std::string name(int node) const { return fmt::format("{}-{}", prefix_, node); }
  std::string hub() const { return prefix_ + "-hub"; }
  static bool run(const std::string& command) { return std::system(("(" + command + ") >/dev/null 2>&1").c_str()) == 0; }

  int num_nodes_;
  std::string prefix_;
  std::string problem_;
};

}  // namespace tern::conformance
