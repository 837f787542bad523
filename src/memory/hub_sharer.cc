// SPDX-License-Identifier: Apache-2.0
#include <condition_variable>
#include <map>
#include <mutex>

#include "base/error.h"
#include "memory/sharers.h"

namespace tern {

class Hub {
 public:
  explicit Hub(int num_ranks) : num_ranks_(num_ranks), num_users_(num_ranks) {}

  int num_ranks() const { return num_ranks_; }

  std::vector<std::shared_ptr<Segment>> share(int rank, std::shared_ptr<Segment> mine, const std::string& tag,
                                              std::span<const uint8_t> is_member, Deadline deadline) {
    std::unique_lock lock(mutex_);
    Meeting& meeting = meetings_[tag];
    if (meeting.segments.empty()) meeting.segments.resize(num_ranks_);
    meeting.segments[rank] = std::move(mine);
    ++meeting.num_inside;
    came_.notify_all();
    const bool complete = came_.wait_until(lock, deadline.time(), [&] { return missing(meeting, is_member).empty(); });
    std::vector<std::shared_ptr<Segment>> result = meeting.segments;
    const std::vector<int> absent = missing(meeting, is_member);
    if (!complete) meeting.segments[rank] = nullptr;  // whoever comes later shall not find what nobody waits with any more
    if (--meeting.num_inside == 0) meetings_.erase(tag);
    if (!complete)
      fail(TERN_TIMEOUT, "sharing of segments \"{}\": rank {} waited for {} until the deadline (threads of this process)", tag, rank,
           name_ranks(absent));
    return result;
  }

  // True for the last one.
  bool leave() {
    const std::lock_guard lock(mutex_);
    return --num_users_ == 0;
  }

 private:
  struct Meeting {
    std::vector<std::shared_ptr<Segment>> segments;  // [num_ranks]
    int num_inside = 0;
  };

  static std::vector<int> missing(const Meeting& meeting, std::span<const uint8_t> is_member) {
    std::vector<int> result;
    for (size_t r = 0; r < is_member.size(); ++r)
      if (is_member[r] != 0 && meeting.segments[r] == nullptr) result.push_back(static_cast<int>(r));
    return result;
  }

  const int num_ranks_;
  std::mutex mutex_;
  std::condition_variable came_;
  std::map<std::string, Meeting> meetings_;
  int num_users_;
};

namespace {

class HubSharer final : public SegmentSharer {
 public:
  HubSharer(int rank, Hub* hub) : rank_(rank), hub_(hub) {}
  ~HubSharer() override {
    if (hub_->leave()) delete hub_;
  }

  std::vector<std::shared_ptr<Segment>> share(std::shared_ptr<Segment> mine, const std::string& tag, std::span<const uint8_t> is_member,
                                              Deadline deadline) override {
    check_share(rank_, hub_->num_ranks(), mine, tag, is_member);
    return hub_->share(rank_, std::move(mine), tag, is_member, deadline);
  }

  bool shares_address_space() const override { return true; }

 private:
  int rank_;
  Hub* hub_;
};

}  // namespace

Hub* make_hub(int num_ranks) { return new Hub(num_ranks); }

std::unique_ptr<SegmentSharer> make_hub_sharer(int rank, Hub* hub) { return std::make_unique<HubSharer>(rank, hub); }

}  // namespace tern
