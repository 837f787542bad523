// SPDX-License-Identifier: Apache-2.0
// Sharing between processes. For one call every member listens at an abstract Unix socket named from the key, the tag and
// its rank, connects to every other member and gives away its descriptor in one message. It is done when it has given to all
// and got from all: what was given waits in the receiver's queue, even if the giver closes first.
// Abstract names leave nothing behind in any file system. They can be seen and taken by other users of the host, so both ends ask
// the kernel whose process the other one is.
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <thread>

#include "base/error.h"
#include "memory/sharers.h"

namespace tern {
namespace {

constexpr uint64_t kParcelMagic = 0x4c4352415054524e;

struct Parcel {
  uint64_t magic = kParcelMagic;
  int64_t rank = 0;
};

// Messages stay whole, so that a parcel and its descriptor come together or not at all.
Fd open_socket() {
  Fd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd) fail_errno("socket", "sharing of segments");
  return fd;
}

struct Address {
  sockaddr_un name = {};
  socklen_t bytes = 0;
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&name); }
};

Address make_address(const SocketKey& key, const std::string& tag, int rank) {
  const std::string text = fmt::format("tern-{:016x}{:016x}-{}-{}", key[0], key[1], tag, rank);
  Address address;
  address.name.sun_family = AF_UNIX;
  // The zero byte in front makes it abstract.
  text.copy(address.name.sun_path + 1, sizeof(address.name.sun_path) - 1);
  address.bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + text.size());
  return address;
}

uid_t user_behind(int fd) {
  ucred credentials = {};
  socklen_t bytes = sizeof(credentials);
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &bytes) != 0) fail_errno("getsockopt(SO_PEERCRED)", "sharing of segments");
  return credentials.uid;
}

// False: the receiver cannot take it now.
bool send_descriptor(int socket, const Parcel& parcel, int descriptor) {
  iovec content = {const_cast<Parcel*>(&parcel), sizeof(parcel)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &content;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  cmsghdr* header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  std::memcpy(CMSG_DATA(header), &descriptor, sizeof(int));
  return ::sendmsg(socket, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof(parcel));
}

// The descriptor, if a whole parcel with one came.
Fd receive_descriptor(int socket, Parcel& parcel) {
  iovec content = {&parcel, sizeof(parcel)};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message = {};
  message.msg_iov = &content;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  const ssize_t got = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
  const cmsghdr* header = got < 0 ? nullptr : CMSG_FIRSTHDR(&message);
  if (header == nullptr || header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS || header->cmsg_len != CMSG_LEN(sizeof(int)))
    return Fd();
  int descriptor = -1;
  std::memcpy(&descriptor, CMSG_DATA(header), sizeof(int));
  Fd fd(descriptor);
  const bool whole = got == static_cast<ssize_t>(sizeof(parcel)) && parcel.magic == kParcelMagic;
  return whole ? std::move(fd) : Fd();
}

// One call of share().
class Swap {
 public:
  Swap(const Topology& topology, const SocketKey& key, const std::string& tag, std::shared_ptr<Segment> mine)
      : topology_(topology), key_(key), tag_(tag), mine_(std::move(mine)), theirs_(topology.num_ranks) {
    theirs_[topology.rank] = mine_;
  }

  std::vector<std::shared_ptr<Segment>> run(std::span<const uint8_t> is_member, Deadline deadline);

 private:
  void listen(size_t num_members);
  bool give_to(int rank);
  void accept_all();
  void receive_all();
  void take(const Fd& connection);
  [[noreturn]] void fail_missing(const std::vector<int>& ungiven, const std::vector<int>& members) const;

  const Topology& topology_;
  const SocketKey& key_;
  const std::string& tag_;
  std::shared_ptr<Segment> mine_;
  std::vector<std::shared_ptr<Segment>> theirs_;
  Fd listener_;
  std::vector<Fd> silent_;  // accepted, nothing received yet
  std::string refused_;     // who was turned away, for the text of a timeout
};

std::vector<std::shared_ptr<Segment>> Swap::run(std::span<const uint8_t> is_member, Deadline deadline) {
  std::vector<int> members;
  for (int r = 0; r < topology_.num_ranks; ++r)
    if (is_member[r] != 0 && r != topology_.rank) members.push_back(r);
  listen(members.size());

  std::vector<int> ungiven = members;
  const auto all_came = [&] { return std::all_of(members.begin(), members.end(), [&](int r) { return theirs_[r] != nullptr; }); };
  // Nothing tells a connecting socket that a name has come to be, so this tries again, with growing pauses.
  std::chrono::microseconds pause(200);
  constexpr std::chrono::microseconds kLongestPause(20'000);
  while (true) {
    std::erase_if(ungiven, [&](int r) { return give_to(r); });
    accept_all();
    receive_all();
    if (ungiven.empty() && all_came()) break;
    if (deadline.passed()) fail_missing(ungiven, members);
    std::this_thread::sleep_for(std::min<std::chrono::nanoseconds>(pause, deadline.remaining()));
    pause = std::min(2 * pause, kLongestPause);
  }
  for (int r = 0; r < topology_.num_ranks; ++r)
    if (is_member[r] == 0) theirs_[r] = nullptr;
  return std::move(theirs_);
}

void Swap::listen(size_t num_members) {
  listener_ = open_socket();
  const Address address = make_address(key_, tag_, topology_.rank);
  if (::bind(listener_.get(), address.get(), address.bytes) != 0)
    fail_errno("bind", fmt::format("sharing of segments \"{}\": the socket of rank {} (was the tag used before?)", tag_, topology_.rank));
  if (::listen(listener_.get(), static_cast<int>(num_members) + 1) != 0) fail_errno("listen", "sharing of segments");
}

bool Swap::give_to(int rank) {
  const Fd socket = open_socket();
  const Address address = make_address(key_, tag_, rank);
  if (::connect(socket.get(), address.get(), address.bytes) != 0) {
    if (errno == ECONNREFUSED || errno == EAGAIN || errno == EINTR) return false;
    fail_errno("connect", fmt::format("sharing of segments \"{}\": the socket of rank {}", tag_, rank));
  }
  const uid_t user = user_behind(socket.get());
  if (user != ::geteuid())
    fail(TERN_SYSTEM_ERROR, "sharing of segments: rank {} belongs to user {}, rank {} to user {}; run all ranks as the same user", rank,
         user, topology_.rank, ::geteuid());
  if (send_descriptor(socket.get(), {.rank = topology_.rank}, mine_->fd())) return true;
  // The receiver has gone meanwhile, or too many descriptors of this user are on their way.
  if (errno == EAGAIN || errno == ETOOMANYREFS || errno == EPIPE || errno == ECONNRESET || errno == EINTR) return false;
  fail_errno("sendmsg", fmt::format("sharing of segments \"{}\": to rank {}", tag_, rank));
}

void Swap::accept_all() {
  while (true) {
    Fd connection(::accept4(listener_.get(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
    if (!connection) {
      if (errno == EINTR || errno == ECONNABORTED) continue;
      if (errno == EAGAIN || errno == EWOULDBLOCK) return;
      fail_errno("accept", fmt::format("sharing of segments \"{}\"", tag_));
    }
    const uid_t user = user_behind(connection.get());
    if (user == ::geteuid())
      silent_.push_back(std::move(connection));
    else
      refused_ = fmt::format("; a process of user {} was refused, this rank belongs to user {}", user, ::geteuid());
  }
}

void Swap::receive_all() {
  std::erase_if(silent_, [&](const Fd& connection) {
    char byte;
    const ssize_t waiting = ::recv(connection.get(), &byte, 1, MSG_PEEK);
    if (waiting < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR)) return false;
    if (waiting > 0) take(connection);
    return true;
  });
}

void Swap::take(const Fd& connection) {
  Parcel parcel;
  Fd fd = receive_descriptor(connection.get(), parcel);
  const bool expected = fd && parcel.rank >= 0 && parcel.rank < topology_.num_ranks && theirs_[parcel.rank] == nullptr;
  if (expected)
    theirs_[parcel.rank] = mine_->map_peer(std::move(fd));
  else
    refused_ = "; something came that is no segment of a member (out of file descriptors? see ulimit -n)";
}

void Swap::fail_missing(const std::vector<int>& ungiven, const std::vector<int>& members) const {
  std::vector<int> missing;
  std::string details;
  for (const int r : members) {
    const bool came = theirs_[r] != nullptr && std::find(ungiven.begin(), ungiven.end(), r) == ungiven.end();
    if (came) continue;
    missing.push_back(r);
    const std::string process = describe_process(topology_.ranks[r]);
    if (!process.empty()) details += fmt::format("; rank {}: {}", r, process);
  }
  fail(TERN_TIMEOUT, "sharing of segments \"{}\": rank {} waited for {} until the deadline{}{}", tag_, topology_.rank, name_ranks(missing),
       details, refused_);
}

class SocketSharer final : public SegmentSharer {
 public:
  SocketSharer(const Topology& topology, const SocketKey& key) : topology_(topology), key_(key) {}

  std::vector<std::shared_ptr<Segment>> share(std::shared_ptr<Segment> mine, const std::string& tag, std::span<const uint8_t> is_member,
                                              Deadline deadline) override {
    check_share(topology_.rank, topology_.ranks.size(), mine, tag, is_member);
    return Swap(topology_, key_, tag, std::move(mine)).run(is_member, deadline);
  }

  bool shares_address_space() const override { return false; }

 private:
  const Topology topology_;
  const SocketKey key_;
};

}  // namespace

std::unique_ptr<SegmentSharer> make_socket_sharer(const Topology& topology, const SocketKey& key) {
  return std::make_unique<SocketSharer>(topology, key);
}

}  // namespace tern
