// SPDX-License-Identifier: Apache-2.0
// Routings kept in files, so that the traffic of a real model can be measured again (`tern bench --routing FILE`).
//
// Format, all numbers little-endian and without padding:
//
//   bytes      what
//   8          the letters "TERNROUT"
//   4          uint32, version of the format: 1
//   4          uint32, num_ranks  (R)
//   4          uint32, num_experts
//   4          uint32, num_topk   (K)
//   8          uint64, max_tokens: the most tokens of any rank
//   8 R        uint64, tokens of each rank (T_0 ... T_{R-1})
//   4 K T_r    for each rank in turn: int32 [T_r, K], global expert numbers, -1: none
//
// With numpy, for `idx`, a list of one int array [T_r, K] per rank:
//
//   with open("layer.routing", "wb") as f:
//       f.write(b"TERNROUT" + numpy.array([1, len(idx), num_experts, idx[0].shape[1]], "<u4").tobytes())
//       f.write(numpy.array([max(map(len, idx))] + [len(i) for i in idx], "<u8").tobytes())
//       for i in idx: f.write(i.astype("<i4").tobytes())
#pragma once

#include <string>

#include "routing/routing.h"

namespace tern::tools {

// Throws TERN_SYSTEM_ERROR if the file cannot be written.
void write_routing(const Routing& routing, const std::string& path);

// Throws TERN_SYSTEM_ERROR if the file cannot be read, TERN_INVALID_ARGUMENT if it is not a whole and valid routing.
Routing read_routing(const std::string& path);

}  // namespace tern::tools
