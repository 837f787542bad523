// SPDX-License-Identifier: Apache-2.0
#include "tools/launch_processes.h"

#include <fmt/ranges.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <vector>

#include "base/deadline.h"
#include "base/error.h"

namespace tern::tools {
namespace {

constexpr int64_t kGraceMs = 2000;

struct Signals {
  sigset_t waited, before;
};

bool is_ignored(int signal) {
  struct sigaction action;
  sigaction(signal, nullptr, &action);
  return action.sa_handler == SIG_IGN;
}

// Blocked, to be taken by sigtimedwait, which takes ignored ones too: a caller's nohup is left as it is. Children get the mask from before.
Signals block_signals() {
  std::signal(SIGCHLD, SIG_DFL);  // ignored ones would leave no child to wait for
  Signals signals;
  sigemptyset(&signals.waited);
  sigaddset(&signals.waited, SIGCHLD);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
    if (!is_ignored(signal)) sigaddset(&signals.waited, signal);
  }
  sigprocmask(SIG_BLOCK, &signals.waited, &signals.before);
  return signals;
}

struct GatherContext {
  Board& board;
  int rank;
  int64_t timeout_ms;
};

int gather_over_board(void* context, const void* send, void* recv, size_t num_bytes) {
  const auto& gather = *static_cast<GatherContext*>(context);
  try {
    gather.board.allgather(gather.rank, {static_cast<const std::byte*>(send), num_bytes}, static_cast<std::byte*>(recv), gather.timeout_ms);
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

int run_child(const LaunchOptions& options, const RankFunction& run_rank, Board& board, int rank) {
  return run_and_report(board, rank, [&] {
    GatherContext gather{board, rank, options.timeout_ms};
    const Group group = Group::from_allgather(rank, options.num_ranks, gather_over_board, &gather, {.timeout_ms = options.timeout_ms});
    RankContext context{rank, options.num_ranks, group, board, options.timeout_ms, options.num_ranks};
    return run_rank(context);
  });
}

// Waits for children; ends the others some time after the first that fails, and all of them on a signal, which it remembers.
class Nursery {
 public:
  Nursery(Board& board, const sigset_t& signals, int64_t grace_ms) : board_(board), signals_(signals), grace_ms_(grace_ms) {}
  ~Nursery() { end_all(); }

  void add(pid_t pid) { children_.push_back({pid, true}); }

  int wait_for_all() {
    while (num_running() > 0) {
      const timespec time{0, 200'000'000};
      const int signal = sigtimedwait(&signals_, nullptr, &time);
      if (signal > 0 && signal != SIGCHLD) {
        end_all();
        ended_by_ = signal;
        return 128 + signal;
      }
      for (size_t rank = 0; rank < children_.size(); ++rank) reap(static_cast<int>(rank), WNOHANG);
      if (code_ != 0 && grace_.passed()) end_all();
    }
    return code_;
  }

  int ended_by() const { return ended_by_; }  // 0: no signal

 private:
  struct Child {
    pid_t pid;
    bool running;
  };

  size_t num_running() const {
    size_t result = 0;
    for (const Child& child : children_) result += child.running;
    return result;
  }

  void reap(int rank, int flags) {
    Child& child = children_[static_cast<size_t>(rank)];
    int status = 0;
    if (!child.running || waitpid(child.pid, &status, flags) != child.pid) return;
    child.running = false;
    if (WIFSIGNALED(status)) {
      const int signal = WTERMSIG(status);
      if (!ending_) board_.post_failure(rank, fmt::format("process {} was ended by signal {} ({})", child.pid, signal, strsignal(signal)));
      note(128 + signal);
    } else {
      note(WEXITSTATUS(status));
    }
  }

  void note(int code) {
    if (code == 0 || code_ != 0) return;
    code_ = code;
    // The others notice by themselves, at the latest when their waits for the failed rank time out.
    grace_ = Deadline::in_ms(grace_ms_);
  }

  void end_all() {
    ending_ = true;
    for (const Child& child : children_) {
      if (child.running) kill(child.pid, SIGKILL);
    }
    for (size_t rank = 0; rank < children_.size(); ++rank) reap(static_cast<int>(rank), 0);
  }

  Board& board_;
  const sigset_t& signals_;
  int64_t grace_ms_;
  std::vector<Child> children_;
  int code_ = 0;                         // of the first child that failed
  Deadline grace_ = Deadline::in_ms(0);  // for the others, from then on
  bool ending_ = false;
  int ended_by_ = 0;
};

// What follows in this command, such as further launches, is not wanted either.
void end_as_asked(int signal) {
  fmt::print(stderr, "\ntern: interrupted, all ranks are ended\n");
  std::fflush(nullptr);
  std::signal(signal, SIG_DFL);
  raise(signal);
}

}  // namespace

int run_and_report(Board& board, int rank, const std::function<int()>& run) noexcept {
  try {
    return run();
  } catch (const std::exception& error) {
    board.post_failure(rank, error.what());
    return 1;
  }
}

void print_failures(const Board& board) {
  static const std::string kFollowed = "another rank failed";
  std::map<std::string, std::vector<int>> ranks_by_text;
  for (int rank = 0; rank < board.num_ranks(); ++rank) {
    if (const std::string text = board.failure_of(rank); !text.empty()) ranks_by_text[text].push_back(rank);
  }
  if (ranks_by_text.size() > 1) ranks_by_text.erase(kFollowed);
  for (const auto& [text, ranks] : ranks_by_text)
    fmt::print(stderr, "tern: rank{} {}: {}\n", ranks.size() > 1 ? "s" : "", fmt::join(ranks, ", "), text);
}

int launch_processes(const LaunchOptions& options, const RankFunction& run_rank) {
  Board board = Board::create({options.num_ranks, options.shared_bytes});
  const Signals signals = block_signals();
  const pid_t parent = getpid();
  std::fflush(nullptr);  // what is buffered must not be written once by each child
  int code = 0, ended_by = 0;
  {
    Nursery nursery(board, signals.waited, options.timeout_ms + kGraceMs);
    for (int rank = 0; rank < options.num_ranks; ++rank) {
      const pid_t pid = fork();
      if (pid < 0) fail_errno("fork", fmt::format("process for rank {}", rank));
      if (pid == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != parent) _exit(1);  // the parent died before prctl
        sigprocmask(SIG_SETMASK, &signals.before, nullptr);
        const int child_code = run_child(options, run_rank, board, rank);
        std::fflush(nullptr);
        _exit(child_code);
      }
      nursery.add(pid);
    }
    code = nursery.wait_for_all();
    ended_by = nursery.ended_by();
  }
  sigprocmask(SIG_SETMASK, &signals.before, nullptr);
  if (ended_by != 0) end_as_asked(ended_by);
  print_failures(board);
  return code;
}

}  // namespace tern::tools
