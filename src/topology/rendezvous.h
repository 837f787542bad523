// SPDX-License-Identifier: Apache-2.0
// Rendezvous: how the ranks of a launcher meet.
//
// Rank and size are the first complete pair of
//   RANK and WORLD_SIZE                           (torchrun)
//   OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE (Open MPI)
//   SLURM_PROCID and SLURM_NTASKS                 (Slurm, only inside a step: srun, not the batch script itself)
// With none of them, or with a size of 1, the group has one rank and nobody meets.
//
// The ranks meet at rank 0, which listens on TCP at the first of
//   1. TERN_RENDEZVOUS=host:port (an IPv6 address in brackets)
//   2. MASTER_ADDR, and MASTER_PORT + 1: the launcher's own store holds MASTER_PORT (65534 if that is 65535).
//      Without MASTER_PORT: the derived port
//   3. 127.0.0.1 and the derived port, if the launcher says that all ranks are on one host (LOCAL_WORLD_SIZE = WORLD_SIZE,
//      OMPI_COMM_WORLD_LOCAL_SIZE = OMPI_COMM_WORLD_SIZE, SLURM_STEP_NUM_NODES = 1)
//   4. the first host of SLURM_STEP_NODELIST, where Slurm puts task 0, and the derived port
// and else the environment does not suffice, which is an error that asks for TERN_RENDEZVOUS.
// The derived port is 20000 + h % 12768, with h the 64-bit FNV-1a hash of the job's name:
//   torchrun "torchrun $TORCHELASTIC_RUN_ID $MASTER_PORT", Open MPI "Open MPI $PMIX_NAMESPACE",
//   Slurm "Slurm $SLURM_JOB_ID.$SLURM_STEP_ID"
//
// Rank 0 listens only while a group is being made. Every other rank connects, again and again until its deadline, and
// says hello: magic, protocol version, hash of the job's name, name of the group, number of ranks, its rank, and a random
// number of its own. Rank 0 answers with a verdict and a text:
//   welcome  the connection stays open as long as the group
//   later    rank 0 is busy with another group, or belongs to another job: the rank tries again until its deadline
//   never    another version or number of ranks, or another process came as this rank: the rank fails with the text
// A rank that comes twice with the same random number has given up its first connection; the second replaces it, and so does
// one whose predecessor has closed. When the last rank has come, rank 0 stops listening and sends everyone a first (empty)
// allgather. Groups of one name follow each other without a number, because nobody can come for the next before rank 0 has
// stopped listening for this one. Two groups that are made at once by two threads of rank 0 take turns at the port.
// Where the port is taken, rank 0 tries again until its deadline.
//
// The hello keeps honest jobs apart. It is no password: TCP ports are open to whoever can reach them, and so is the
// rendezvous while it lasts; nothing but a few bytes of addresses and sizes goes through it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "base/deadline.h"
#include "topology/bootstrap.h"
#include "topology/launch.h"

namespace tern {

// Collective over the ranks of the launch, of which there are at least two.
std::unique_ptr<Bootstrap> meet(const Launch& launch, const std::string& group_name, Deadline deadline);

// FNV-1a, 64 bits: the same in every build.
uint64_t stable_hash(std::string_view text);

}  // namespace tern
