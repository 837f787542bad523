// SPDX-License-Identifier: Apache-2.0
#include "routing/routing_file.h"

#include <fstream>
#include <iterator>
#include <string_view>
#include <type_traits>
#include <utility>

#include "base/error.h"

namespace tern::tools {
namespace {

constexpr std::string_view kMagic = "TERNROUT";
constexpr uint32_t kVersion = 1;

// Writes a whole number byte by byte, least significant first, whatever the machine's own order is.
template <typename Number>
void append(std::string& bytes, Number number) {
  auto rest = static_cast<uint64_t>(static_cast<std::make_unsigned_t<Number>>(number));
  for (size_t i = 0; i < sizeof(Number); ++i, rest >>= 8) bytes.push_back(static_cast<char>(rest & 0xFF));
}

class Reader {
 public:
  Reader(std::string bytes, std::string path) : bytes_(std::move(bytes)), path_(std::move(path)) {}

  std::string_view take(uint64_t num_bytes) {
    if (num_bytes > bytes_.size() - at_)
      fail(TERN_INVALID_ARGUMENT, "routing file {}: ends after {} bytes, at least {} more are needed", path_, bytes_.size(),
           num_bytes - (bytes_.size() - at_));
    const std::string_view result(bytes_.data() + at_, num_bytes);
    at_ += num_bytes;
    return result;
  }
  template <typename Number>
  Number number() {
    uint64_t value = 0;
    const std::string_view raw = take(sizeof(Number));
    for (size_t i = sizeof(Number); i-- > 0;) value = value << 8 | static_cast<unsigned char>(raw[i]);
    return static_cast<Number>(value);
  }
  uint64_t left() const { return bytes_.size() - at_; }

 private:
  std::string bytes_, path_;
  uint64_t at_ = 0;
};

}  // namespace

void write_routing(const Routing& routing, const std::string& path) {
  validate_routing(routing);
  std::string bytes(kMagic);
  append(bytes, kVersion);
  append(bytes, static_cast<uint32_t>(routing.num_ranks()));
  append(bytes, static_cast<uint32_t>(routing.num_experts));
  append(bytes, static_cast<uint32_t>(routing.num_topk));
  append(bytes, static_cast<uint64_t>(routing.max_tokens()));
  for (int rank = 0; rank < routing.num_ranks(); ++rank) append(bytes, static_cast<uint64_t>(routing.num_tokens(rank)));
  for (const auto& entries : routing.topk_idx) {
    for (const int32_t entry : entries) append(bytes, entry);
  }
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  if (!file) fail_errno("write", fmt::format("routing file {} cannot be written", path));
}

Routing read_routing(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail_errno("open", fmt::format("routing file {} cannot be read", path));
  Reader reader({std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()}, path);

  if (reader.left() < kMagic.size() || reader.take(kMagic.size()) != kMagic)
    fail(TERN_INVALID_ARGUMENT, "routing file {}: does not begin with {}; write one with `tern routing --out FILE`", path, kMagic);
  if (const auto version = reader.number<uint32_t>(); version != kVersion)
    fail(TERN_INVALID_ARGUMENT, "routing file {}: version {}, this program reads version {}", path, version, kVersion);
  const auto num_ranks = reader.number<uint32_t>();
  const auto num_experts = reader.number<uint32_t>();
  const auto num_topk = reader.number<uint32_t>();
  const auto max_tokens = reader.number<uint64_t>();
  constexpr uint32_t kMost = 1u << 20;  // keeps what follows from overflowing on a damaged header
  if (num_ranks < 1 || num_ranks > kMost || num_experts < 1 || num_experts > kMost || num_topk < 1 || num_topk > 64)
    fail(TERN_INVALID_ARGUMENT, "routing file {}: {} ranks, top-{} of {} experts cannot be", path, num_ranks, num_topk, num_experts);

  Routing routing{static_cast<int>(num_topk), static_cast<int>(num_experts), {}};
  std::vector<uint64_t> tokens;
  for (uint32_t rank = 0; rank < num_ranks; ++rank) {
    tokens.push_back(reader.number<uint64_t>());
    if (tokens.back() > max_tokens || tokens.back() > reader.left() / (sizeof(int32_t) * num_topk))
      fail(TERN_INVALID_ARGUMENT, "routing file {}: rank {} has {} tokens, more than the most ({}) or than the file holds", path, rank,
           tokens.back(), max_tokens);
  }
  for (uint32_t rank = 0; rank < num_ranks; ++rank) {
    std::vector<int32_t> entries(tokens[rank] * num_topk);
    for (int32_t& entry : entries) entry = reader.number<int32_t>();
    routing.topk_idx.push_back(std::move(entries));
  }
  if (reader.left() != 0) fail(TERN_INVALID_ARGUMENT, "routing file {}: {} bytes too many at its end", path, reader.left());
  validate_routing(routing);
  return routing;
}

}  // namespace tern::tools
