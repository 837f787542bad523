// SPDX-License-Identifier: Apache-2.0
// A note of each rank that ranks of other hosts read whenever they like: its last words, for rare things that must work while other ranks
// are gone. Nobody waits for anybody, and no epochs are counted.
//
//   Noticeboard board(bootstrap, sizeof(note), ranks_of_other_hosts, {}, deadline);  // collective
//   board.write(std::as_bytes(std::span(&note, 1)));
//   while (!board.read(3, bytes)) board.progress();                                   // with pauses and a deadline
//
// A note is on its way to one reader at most once at a time, and a newer one follows when the reader has it; readers that do not answer
// hold up nobody else. A hash tells a note that is whole from one that is being written.
// Nothing moves but in progress(): somebody must call it now and then for as long as others may read or write.
// Threads: any, at the same time. Lifetime: destroying is never collective and waits for nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "transport/endpoint.h"

namespace tern {

// Never 0, which is what a note that was never written has.
uint64_t note_hash(std::span<const uint64_t> words);

class Noticeboard {
 public:
  // `note_bytes`: a multiple of 8. `readers`: ranks that read this one's notes, and whose notes it reads. Of the network devices that the
  // options choose the first one will do.
  Noticeboard(Bootstrap& bootstrap, size_t note_bytes, const std::vector<int>& readers, EndpointOptions options, Deadline deadline);

  void write(std::span<const std::byte> note);
  // False: the rank has written nothing yet, or it is arriving.
  bool read(int rank, std::span<std::byte> note);
  // Sends what can be sent now, and takes what has come; does not wait. Readers that could not be reached are tried again now and then.
  void progress();

 private:
  struct Reader {
    int rank = 0;
    RemoteRegion memory;
    bool is_due = false;  // it has not been sent the newest note
    Deadline retry = Deadline::in_ms(0);
  };

  size_t slot_words() const { return 1 + note_bytes_ / sizeof(uint64_t); }
  size_t slot_bytes() const { return slot_words() * sizeof(uint64_t); }
  void send(size_t reader_idx);

  std::mutex mutex_;  // guards all that follows
  const int rank_;
  const size_t note_bytes_;
  std::vector<uint64_t> memory_;  // slots: hash, note: of each rank, as it arrives; own ones on their way to each reader
  std::unique_ptr<Endpoint> endpoint_;
  std::optional<Region> region_;
  std::vector<Reader> readers_;
  std::vector<uint64_t> own_;  // hash, note
};

}  // namespace tern
