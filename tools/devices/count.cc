// SPDX-License-Identifier: Apache-2.0
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <thread>

#include "base/deadline.h"
#include "base/error.h"
#include "devices/rank_device.h"

namespace tern::tools {

int32_t count_cuda_devices_in_child() {
  constexpr int64_t kTimeoutMs = 60'000;  // a driver that starts takes seconds
  const pid_t child = fork();
  if (child < 0) fail_errno("fork", "counting GPUs");
  if (child == 0) _exit(num_cuda_devices());
  const Deadline deadline = Deadline::in_ms(kTimeoutMs);
  int status = 0;
  for (;;) {
    const pid_t ended = waitpid(child, &status, WNOHANG);
    if (ended == child) return WIFEXITED(status) ? WEXITSTATUS(status) : 0;
    if (ended < 0 && errno != EINTR) fail_errno("waitpid", "counting GPUs");
    if (deadline.passed()) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  kill(child, SIGKILL);
  waitpid(child, &status, 0);
  fail(TERN_TIMEOUT, "counting GPUs: the CUDA driver did not answer for {} ms; nvidia-smi may say why", kTimeoutMs);
}

}  // namespace tern::tools
