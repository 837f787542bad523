// SPDX-License-Identifier: Apache-2.0
#include "topology/socket.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "base/error.h"

namespace tern {
namespace {

constexpr int kSocketFlags = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

void set_option(int fd, int level, int option, int value) { ::setsockopt(fd, level, option, &value, sizeof(value)); }

using Addresses = std::unique_ptr<addrinfo, decltype(&::freeaddrinfo)>;

Addresses resolve(const char* host, uint16_t port, int flags, std::string& why_not) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int error = ::getaddrinfo(host, std::to_string(port).c_str(), &hints, &found);
  if (error != 0) why_not = fmt::format("getaddrinfo: {}", ::gai_strerror(error));
  return Addresses(error == 0 ? found : nullptr, &::freeaddrinfo);
}

bool is_loopback_name(const std::string& host) { return host == "localhost" || host == "::1" || host.starts_with("127."); }

Opened listen_on(const addrinfo& address) {
  Fd fd(::socket(address.ai_family, kSocketFlags, 0));
  if (!fd) return {Fd(), errno_text("socket")};
  set_option(fd.get(), SOL_SOCKET, SO_REUSEADDR, 1);                                      // connections of an earlier group may linger
  if (address.ai_family == AF_INET6) set_option(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, 0);  // "every address" includes IPv4
  if (::bind(fd.get(), address.ai_addr, address.ai_addrlen) != 0) return {Fd(), errno_text("bind")};
  if (::listen(fd.get(), SOMAXCONN) != 0) return {Fd(), errno_text("listen")};
  return {std::move(fd), ""};
}

Opened connect_on(const addrinfo& address, Deadline deadline) {
  Fd fd(::socket(address.ai_family, kSocketFlags, 0));
  if (!fd) return {Fd(), errno_text("socket")};
  if (::connect(fd.get(), address.ai_addr, address.ai_addrlen) != 0) {
    if (errno != EINPROGRESS && errno != EINTR) return {Fd(), errno_text("connect")};
    pollfd event = {fd.get(), POLLOUT, 0};
    if (!poll_until({&event, 1}, deadline)) return {Fd(), "connect: no answer"};
    int error = 0;
    socklen_t length = sizeof(error);
    ::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &length);
    if (error != 0) return {Fd(), errno_text("connect", error)};
  }
  set_option(fd.get(), IPPROTO_TCP, TCP_NODELAY, 1);
  return {std::move(fd), ""};
}

// A connection to a port of this host at which nobody listens can, by chance, be given that very port as its own and then
// connects to itself.
bool connected_to_itself(int fd) {
  sockaddr_storage self = {}, peer = {};
  socklen_t self_bytes = sizeof(self), peer_bytes = sizeof(peer);
  ::getsockname(fd, reinterpret_cast<sockaddr*>(&self), &self_bytes);
  ::getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &peer_bytes);
  const auto* a = reinterpret_cast<const std::byte*>(&self);
  const auto* b = reinterpret_cast<const std::byte*>(&peer);
  return std::equal(a, a + self_bytes, b, b + peer_bytes);
}

// Takes what is there now. Marks the peer closed at its end or at an error.
void receive_some(Inbound& in) {
  while (!in.complete()) {
    const ssize_t got = ::recv(in.fd, static_cast<std::byte*>(in.data) + in.received_bytes, in.bytes - in.received_bytes, 0);
    if (got < 0 && would_block()) return;
    if (got <= 0) {
      in.closed = true;
      return;
    }
    in.received_bytes += static_cast<size_t>(got);
  }
}

}  // namespace

bool poll_until(std::span<pollfd> fds, Deadline deadline) {
  constexpr int64_t kLongestPollMs = 60'000;
  while (true) {
    const auto left_ms = std::chrono::ceil<std::chrono::milliseconds>(deadline.remaining()).count();
    const int num_ready = ::poll(fds.data(), fds.size(), static_cast<int>(std::min<int64_t>(left_ms, kLongestPollMs)));
    if (num_ready > 0) return true;
    if (num_ready < 0 && errno != EINTR) fail_errno("poll", "waiting for a peer");
    if (deadline.passed()) return false;
  }
}

Io send_all(int fd, const void* data, size_t bytes, Deadline deadline) {
  const auto* next = static_cast<const std::byte*>(data);
  while (bytes > 0) {
    const ssize_t sent = ::send(fd, next, bytes, MSG_NOSIGNAL);
    if (sent < 0 && !would_block()) return Io::kClosed;
    if (sent > 0) {
      next += sent;
      bytes -= static_cast<size_t>(sent);
      continue;
    }
    pollfd event = {fd, POLLOUT, 0};
    if (!poll_until({&event, 1}, deadline)) return Io::kTimedOut;
  }
  return Io::kDone;
}

Io receive_all(std::span<Inbound> inbound, Deadline deadline) {
  std::vector<pollfd> events(inbound.size());
  while (true) {
    size_t num_open = 0;
    for (size_t i = 0; i < inbound.size(); ++i) {
      if (!inbound[i].complete()) receive_some(inbound[i]);
      if (inbound[i].closed) return Io::kClosed;
      const bool open = !inbound[i].complete();
      num_open += open;
      events[i] = {open ? inbound[i].fd : -1, POLLIN, 0};
    }
    if (num_open == 0) return Io::kDone;
    if (!poll_until(events, deadline)) return Io::kTimedOut;
  }
}

Io receive_all(int fd, void* data, size_t bytes, Deadline deadline) {
  Inbound in = {.fd = fd, .data = data, .bytes = bytes};
  return receive_all({&in, 1}, deadline);
}

Opened listen_at(const std::string& host, uint16_t port) {
  Opened result;
  const Addresses addresses = resolve(is_loopback_name(host) ? host.c_str() : nullptr, port, AI_PASSIVE, result.why_not);
  // IPv6 first: such a socket takes IPv4 too, but not the other way round.
  for (const int family : {AF_INET6, AF_INET}) {
    for (const addrinfo* a = addresses.get(); a != nullptr; a = a->ai_next) {
      if (a->ai_family != family) continue;
      result = listen_on(*a);
      if (result.fd) return result;
    }
  }
  return result;
}

Opened connect_to(const std::string& host, uint16_t port, Deadline deadline) {
  Opened result;
  const Addresses addresses = resolve(host.c_str(), port, 0, result.why_not);
  for (const addrinfo* a = addresses.get(); a != nullptr; a = a->ai_next) {
    result = connect_on(*a, deadline);
    if (result.fd && connected_to_itself(result.fd.get())) result = {Fd(), "nobody listens there"};
    if (result.fd) return result;
  }
  return result;
}

Fd accept_from(int listener) {
  Fd fd(::accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
  if (fd) set_option(fd.get(), IPPROTO_TCP, TCP_NODELAY, 1);
  return fd;
}

}  // namespace tern
