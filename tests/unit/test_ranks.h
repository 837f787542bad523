// SPDX-License-Identifier: Apache-2.0
// Ranks for tests, as threads and as real processes: forks, runs a body in each child, collects what became of it within a
// bounded time.
//
//   const auto results = run_forked(4, [](int rank) { ...; require(seen == 3, "seen 3"); });
//   expect_all_ok(results);
//
// Fork while the test has a single thread; children may have more. A child ends by _exit, so nothing of the parent's state is
// torn down twice.
#pragma once

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "base/deadline.h"
#include "base/error.h"
#include "base/fd.h"

namespace tern::test {

struct ChildResult {
  std::string text;   // "ok", or what the body threw: "TERN_TIMEOUT: ..."; "" if the child was killed
  int killed_by = 0;  // a signal, 0: the child ended by itself
  int exit_code = 0;  // not 0 also when a sanitizer had something to say
  bool ok() const { return text == "ok" && killed_by == 0 && exit_code == 0; }
};

inline void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("required: " + what);
}

constexpr int64_t kAmpleMs = 60'000;
inline Deadline ample() { return Deadline::in_ms(kAmpleMs); }

// What `act` throws, as "STATUS: text"; "ok" if nothing.
template <typename Act>
std::string outcome(Act act) {
  try {
    act();
    return "ok";
  } catch (const Failure& failure) {
    return std::string(status_name(failure.status())) + ": " + failure.what();
  }
}

inline std::vector<std::string> run_threads(int num_ranks, const std::function<void(int)>& body) {
  std::vector<std::string> outcomes(num_ranks);
  std::vector<std::thread> threads;
  for (int r = 0; r < num_ranks; ++r) threads.emplace_back([&, r] { outcomes[r] = outcome([&] { body(r); }); });
  for (std::thread& thread : threads) thread.join();
  return outcomes;
}

// Opens when every process that has it has left or ended. Make it before the children; whoever does not hold it shut leaves.
class Gate {
 public:
  Gate() {
    int ends[2];
    if (::pipe(ends) != 0) fail_errno("pipe", "test");
    inside_ = Fd(ends[0]);
    holder_ = Fd(ends[1]);
  }
  void leave() { const Fd closed = std::move(holder_); }
  void wait() {
    leave();
    pollfd event = {inside_.get(), 0, 0};  // the end of the pipe is reported always
    require(::poll(&event, 1, 60'000) == 1, "the gate opens");
  }

 private:
  Fd inside_, holder_;
};

class Children {
 public:
  Children(int num_children, const std::function<void(int)>& body) {
    for (int i = 0; i < num_children; ++i) start(i, body);
  }
  Children(const Children&) = delete;
  ~Children() { collect(Deadline::in_ms(0)); }

  pid_t pid(int child) const { return children_[child].pid; }

  // Waits until all have ended or the deadline has passed, kills those that have not, and reaps all.
  std::vector<ChildResult> collect(Deadline deadline = Deadline::in_ms(60'000)) {
    std::vector<ChildResult> results;
    for (Child& child : children_) {
      ChildResult result;
      if (!read_to_end(child, result.text, deadline)) ::kill(child.pid, SIGKILL);
      int status = 0;
      ::waitpid(child.pid, &status, 0);
      if (WIFSIGNALED(status)) result.killed_by = WTERMSIG(status);
      if (WIFEXITED(status)) result.exit_code = WEXITSTATUS(status);
      results.push_back(result);
    }
    children_.clear();
    return results;
  }

 private:
  struct Child {
    pid_t pid;
    Fd report;
  };

  void start(int index, const std::function<void(int)>& body) {
    int ends[2];
    if (::pipe(ends) != 0) fail_errno("pipe", "test");
    std::fflush(nullptr);  // or the child would write it too
    const pid_t pid = ::fork();
    if (pid < 0) fail_errno("fork", "test");
    if (pid != 0) {
      ::close(ends[1]);
      children_.push_back({pid, Fd(ends[0])});
      return;
    }
    for (Child& earlier : children_) earlier.report = Fd();
    ::alarm(100);  // ends a child whose parent was killed
    std::string text = "ok";
    try {
      body(index);
    } catch (const Failure& failure) {
      text = std::string(status_name(failure.status())) + ": " + failure.what();
    } catch (const std::exception& error) {
      text = error.what();
    }
    const ssize_t written = ::write(ends[1], text.data(), text.size());
    ::_exit(written == static_cast<ssize_t>(text.size()) ? 0 : 1);
  }

  static bool read_to_end(const Child& child, std::string& text, Deadline deadline) {
    char chunk[1024];
    while (true) {
      pollfd event = {child.report.get(), POLLIN, 0};
      if (::poll(&event, 1, deadline.remaining_ms()) <= 0) return false;
      const ssize_t got = ::read(child.report.get(), chunk, sizeof(chunk));
      if (got <= 0) return true;
      text.append(chunk, static_cast<size_t>(got));
    }
  }

  std::vector<Child> children_;
};

inline std::vector<ChildResult> run_forked(int num_children, const std::function<void(int)>& body) {
  return Children(num_children, body).collect();
}

inline void expect_all_ok(const std::vector<ChildResult>& results) {
  for (size_t i = 0; i < results.size(); ++i)
    EXPECT_TRUE(results[i].ok()) << "child " << i << ": " << results[i].text << " (signal " << results[i].killed_by << ", exit code "
                                 << results[i].exit_code << ")";
}

inline void expect_text(const ChildResult& result, std::initializer_list<const char*> parts) {
  EXPECT_EQ(result.exit_code, 0) << result.text;
  for (const char* part : parts) EXPECT_NE(result.text.find(part), std::string::npos) << "no \"" << part << "\" in: " << result.text;
}

inline void expect_parts(const std::string& text, std::initializer_list<const char*> parts) { expect_text({.text = text}, parts); }

using Variables = std::map<std::string, std::string>;

// For children: a process of its own has an environment of its own.
inline void set_variables(const Variables& variables) {
  for (const auto& [name, value] : variables) ::setenv(name.c_str(), value.c_str(), 1);
}

inline Variables torchrun_variables(int rank, int num_ranks, uint16_t master_port) {
  return {{"RANK", std::to_string(rank)},
          {"WORLD_SIZE", std::to_string(num_ranks)},
          {"MASTER_ADDR", "127.0.0.1"},
          {"MASTER_PORT", std::to_string(master_port)}};
}

// A port of this host that is free, and so is the next one as a rule. Below those that the system gives to outgoing connections, one of which could take it before the
// test does; other test programs that run now begin their search elsewhere.
inline uint16_t free_port() {
  constexpr int kFirst = 16384, kNum = 16384, kStep = 61;
  const Fd fd(::socket(AF_INET, SOCK_STREAM, 0));
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  for (int turn = 0; turn < kNum; ++turn) {
    const auto port = static_cast<uint16_t>(kFirst + (int64_t{::getpid()} * kStep + turn) % kNum);
    address.sin_port = htons(port);
    if (::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0) return port;
  }
  fail(TERN_SYSTEM_ERROR, "no free port");
}

}  // namespace tern::test
