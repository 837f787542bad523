// SPDX-License-Identifier: Apache-2.0
// Ranks as real processes, for tests: forks, runs a body in each child, collects what became of it within a bounded time.
//
//   const auto results = run_forked(4, [](int rank) { ...; require(seen == 3, "seen 3"); });
//   expect_all_ok(results);
//
// Fork while the test has a single thread; children may have more. A child ends by _exit, so nothing of the parent's state is
// torn down twice.
#pragma once

#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <string>
#include <vector>

#include "base/deadline.h"
#include "base/error.h"
#include "base/fd.h"

namespace tern::testing {

struct ChildResult {
  std::string text;        // "ok", or what the body threw: "TERN_TIMEOUT: ..."; "" if the child was killed
  int killed_by = 0;       // a signal, 0: the child ended by itself
  bool ok() const { return text == "ok" && killed_by == 0; }
};

inline void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("required: " + what);
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
  void leave() {
    const Fd closed = std::move(holder_);
  }
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
    EXPECT_TRUE(results[i].ok()) << "child " << i << ": " << results[i].text << " (signal " << results[i].killed_by << ")";
}

inline void expect_text(const ChildResult& result, std::initializer_list<const char*> parts) {
  for (const char* part : parts) EXPECT_NE(result.text.find(part), std::string::npos) << "no \"" << part << "\" in: " << result.text;
}

}  // namespace tern::testing
