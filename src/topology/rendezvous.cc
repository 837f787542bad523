// SPDX-License-Identifier: Apache-2.0
#include "topology/rendezvous.h"

#include <sys/socket.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "base/error.h"
#include "base/random.h"
#include "topology/socket.h"
#include "topology/star_bootstrap.h"

namespace tern {
namespace {

constexpr char kMagic[8] = {'T', 'E', 'R', 'N', 'M', 'E', 'E', 'T'};
constexpr uint32_t kVersion = 1;
using std::chrono::milliseconds;

// The beginning of every hello and every answer, in every version.
struct Preamble {
  char magic[8];
  uint32_t version;
  uint32_t reserved;
  bool is_tern() const { return std::memcmp(magic, kMagic, sizeof(magic)) == 0; }
};

struct Hello {
  Preamble preamble;
  uint64_t job_hash;
  uint64_t nonce;
  int32_t num_ranks;
  int32_t rank;
  char group[64];
};

enum class Verdict : uint32_t { kWelcome = 0, kLater = 1, kNever = 2 };

// The same in every version, so that a refusal can be read.
struct Answer {
  Preamble preamble;
  Verdict verdict;
  uint32_t reserved;
  char text[256];
};

Preamble preamble() {
  Preamble result = {};
  std::memcpy(result.magic, kMagic, sizeof(kMagic));
  result.version = kVersion;
  return result;
}

template <size_t kBytes>
void copy_text(char (&to)[kBytes], const std::string& from) {
  from.copy(to, kBytes - 1);
}

std::string address(const Launch& launch) { return fmt::format("{}:{}", launch.host, launch.port); }

// Tries again and again, with growing pauses, until `attempt` returns true. False: the deadline passed.
template <typename Attempt>
bool retry_until(Deadline deadline, Attempt attempt) {
  constexpr milliseconds kLongestPause(100);
  milliseconds pause(2);
  while (!attempt()) {
    if (deadline.passed()) return false;
    std::this_thread::sleep_for(std::min<std::chrono::nanoseconds>(pause, deadline.remaining()));
    pause = std::min(2 * pause, kLongestPause);
  }
  return true;
}

// ------------------------------------------------------------------------------------------------------------ rank 0

class Host {
 public:
  Host(const Launch& launch, const std::string& group)
      : launch_(launch), group_(group), links_(launch.num_ranks), nonces_(launch.num_ranks) {}

  std::vector<Fd> gather_ranks(Deadline deadline);

 private:
  Fd listen(Deadline deadline) const;
  void admit(Fd connection, Deadline deadline);
  Answer judge(const Hello& hello) const;
  std::vector<int> missing() const;

  const Launch& launch_;
  const std::string& group_;
  std::vector<Fd> links_;
  std::vector<uint64_t> nonces_;
  std::string last_refusal_;  // for the text of a timeout
};

bool is_open(int link) {
  char byte;
  const ssize_t got = ::recv(link, &byte, 1, MSG_PEEK);
  return got > 0 || (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK));
}

std::vector<int> Host::missing() const {
  std::vector<int> result;
  for (int r = 1; r < launch_.num_ranks; ++r)
    if (!links_[r]) result.push_back(r);
  return result;
}

Fd Host::listen(Deadline deadline) const {
  Opened listener;
  const bool listening = retry_until(deadline, [&] {
    listener = listen_at(launch_.host, launch_.port);
    return static_cast<bool>(listener.fd);
  });
  if (!listening)
    fail(TERN_TIMEOUT,
         "group \"{}\": rank 0 could not listen at {} until the deadline: {}. If another program holds the port, set "
         "TERN_RENDEZVOUS=host:port to a free one on all ranks",
         group_, address(launch_), listener.why_not);
  return std::move(listener.fd);
}

std::vector<Fd> Host::gather_ranks(Deadline deadline) {
  const Fd listener = listen(deadline);
  // Decides a little before the deadline, so that the verdict reaches the ranks that have come before theirs.
  const Deadline gathered_by = Deadline::in_ms(std::chrono::floor<milliseconds>(deadline.remaining()).count() * 9 / 10);
  while (!missing().empty()) {
    pollfd event = {listener.get(), POLLIN, 0};
    if (poll_until({&event, 1}, gathered_by)) {
      if (Fd connection = accept_from(listener.get())) admit(std::move(connection), gathered_by);
      continue;
    }
    const Failure failure(TERN_TIMEOUT, fmt::format("group \"{}\": {} of {} did not come to rank 0 at {} until the deadline{}{}", group_,
                                                    name_ranks(missing()), launch_.num_ranks, address(launch_),
                                                    last_refusal_.empty() ? "" : "; refused: ", last_refusal_));
    for (const Fd& link : links_)
      if (link) send_failure(link.get(), failure.status(), failure.what());
    throw failure;
  }
  return std::move(links_);
}

// One connection at a time: a rank sends its hello at once, and who is silent is not let to hold up the others for long.
void Host::admit(Fd connection, Deadline deadline) {
  const Deadline patience = Deadline::in_ms(std::min<int64_t>(1000, std::chrono::ceil<milliseconds>(deadline.remaining()).count()));
  Hello hello = {};
  const int fd = connection.get();
  if (receive_all(fd, &hello.preamble, sizeof(Preamble), patience) != Io::kDone || !hello.preamble.is_tern()) {
    last_refusal_ = "a connection that did not speak Tern's protocol";
    return;
  }
  if (hello.preamble.version == kVersion) {
    auto* rest = reinterpret_cast<std::byte*>(&hello) + sizeof(Preamble);
    if (receive_all(fd, rest, sizeof(Hello) - sizeof(Preamble), patience) != Io::kDone) return;
    hello.group[sizeof(hello.group) - 1] = '\0';
  }
  const Answer answer = judge(hello);
  if (answer.verdict != Verdict::kWelcome) last_refusal_ = answer.text;
  if (send_all(fd, &answer, sizeof(answer), patience) != Io::kDone || answer.verdict != Verdict::kWelcome) return;
  links_[hello.rank] = std::move(connection);
  nonces_[hello.rank] = hello.nonce;
}

Answer Host::judge(const Hello& hello) const {
  Answer answer = {.preamble = preamble(), .verdict = Verdict::kWelcome, .reserved = 0, .text = {}};
  const auto refuse = [&](Verdict verdict, const std::string& text) {
    answer.verdict = verdict;
    copy_text(answer.text, text);
    return answer;
  };
  if (hello.preamble.version != kVersion)
    return refuse(Verdict::kNever, fmt::format("protocol version {}, rank 0 has {}", hello.preamble.version, kVersion));
  if (hello.job_hash != stable_hash(launch_.job))
    return refuse(Verdict::kLater, fmt::format("a rank of another job; this is \"{}\"", launch_.job));
  if (group_ != hello.group)
    return refuse(Verdict::kLater, fmt::format("group \"{}\", while rank 0 is making group \"{}\"", hello.group, group_));
  if (hello.num_ranks != launch_.num_ranks || hello.rank < 1 || hello.rank >= launch_.num_ranks)
    return refuse(Verdict::kNever,
                  fmt::format("rank {} of {}, but rank 0 was started as one of {}", hello.rank, hello.num_ranks, launch_.num_ranks));
  const Fd& earlier = links_[hello.rank];
  if (earlier && nonces_[hello.rank] != hello.nonce && is_open(earlier.get()))
    return refuse(Verdict::kNever, fmt::format("rank {} is here already: two processes were started as the same rank", hello.rank));
  return answer;
}

// ------------------------------------------------------------------------------------------------------- other ranks

Hello make_hello(const Launch& launch, const std::string& group) {
  Hello hello = {};
  hello.preamble = preamble();
  hello.job_hash = stable_hash(launch.job);
  hello.nonce = random_value<uint64_t>("rendezvous");
  hello.num_ranks = launch.num_ranks;
  hello.rank = launch.rank;
  copy_text(hello.group, group);
  return hello;
}

// One try. Empty, with what was found: try again.
Opened say_hello(const Launch& launch, const Hello& hello, Deadline deadline) {
  Opened link = connect_to(launch.host, launch.port, deadline);
  if (!link.fd) return link;
  const int fd = link.fd.get();
  Answer answer = {};
  Io result = send_all(fd, &hello, sizeof(hello), deadline);
  if (result == Io::kDone) result = receive_all(fd, &answer, sizeof(answer), deadline);
  answer.text[sizeof(answer.text) - 1] = '\0';
  if (result == Io::kTimedOut) return {Fd(), "somebody listens there but does not answer as rank 0 does"};
  if (result == Io::kClosed) return {Fd(), "somebody listens there but closed the connection"};
  if (!answer.preamble.is_tern()) return {Fd(), "another program listens there"};
  if (answer.verdict == Verdict::kNever)
    fail(TERN_MISMATCH, "group \"{}\": rank 0 at {} refused rank {} of {}: {}", hello.group, address(launch), hello.rank, hello.num_ranks,
         answer.text);
  if (answer.verdict == Verdict::kLater) return {Fd(), fmt::format("rank 0 refused: {}", answer.text)};
  return link;
}

std::vector<Fd> find_rank_0(const Launch& launch, const std::string& group, Deadline deadline) {
  constexpr int64_t kPatienceMs = 5000;  // with a listener that does not answer
  const Hello hello = make_hello(launch, group);
  Opened link;
  const bool found = retry_until(deadline, [&] {
    const auto left_ms = std::chrono::ceil<milliseconds>(deadline.remaining()).count();
    link = say_hello(launch, hello, Deadline::in_ms(std::min<int64_t>(left_ms, kPatienceMs)));
    return static_cast<bool>(link.fd);
  });
  if (!found)
    fail(TERN_TIMEOUT, "group \"{}\": rank {} of {} did not find rank 0 at {} until the deadline; the last try: {}", group, launch.rank,
         launch.num_ranks, address(launch), link.why_not);
  std::vector<Fd> links;
  links.push_back(std::move(link.fd));
  return links;
}

}  // namespace

std::unique_ptr<Bootstrap> meet(const Launch& launch, const std::string& group_name, Deadline deadline) {
  if (group_name.size() >= sizeof(Hello::group))
    fail(TERN_INVALID_ARGUMENT, "group: the name \"{}\" has {} bytes, at most {} are allowed", group_name, group_name.size(),
         sizeof(Hello::group) - 1);
  std::vector<Fd> links = launch.rank == 0 ? Host(launch, group_name).gather_ranks(deadline) : find_rank_0(launch, group_name, deadline);
  auto bootstrap = make_star_bootstrap(launch.rank, launch.num_ranks, std::move(links));
  bootstrap->allgather(nullptr, nullptr, 0, deadline);  // nobody has met before all have
  return bootstrap;
}

uint64_t stable_hash(std::string_view text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  return hash;
}

}  // namespace tern
