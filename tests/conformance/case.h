// SPDX-License-Identifier: Apache-2.0
// One exchange to be checked: its shape, its options and how it is driven. A case is a value; all of its inputs follow from
// it (inputs.h), and so do all right outputs (oracle.h).
//
//   Case c{.num_ranks = 4, .hidden = 64, .layout = TERN_LAYOUT_EXPERT_MAJOR};
//   std::vector<std::string> differences = run_as_threads(c.normalized());
#pragma once

#include <tern/tern.h>

#include <cstdint>
#include <string>

namespace tern::conformance {

enum class Routing {
  kUniform,       // distinct experts, each as likely as the others
  kZipf,          // expert i is drawn in proportion to about 1 / (i + 1)
  kGroupLimited,  // experts of at most half of 8 groups
  kOneExpert,     // every token goes to one expert, and to nothing else
  kOneRank,       // every entry goes to experts of one rank
  kHoles,         // like uniform, and a third of the entries is -1
  kDuplicates,    // experts are drawn with repetition
  kNothing,       // every entry is -1
  kRankMask       // token_in_rank instead of experts
};

enum class Spread {
  kFull,    // every rank has max_tokens tokens
  kRandom,  // 0 .. max_tokens
  kEmpty,   // every second rank has none
  kNothing  // no rank has any
};

struct Case {
  uint64_t seed = 1;
  int32_t num_ranks = 2;
  int32_t ranks_per_node = 0;  // declares nodes; 0: all ranks are on one
  int64_t max_tokens = 8;
  Spread spread = Spread::kFull;

  Routing routing = Routing::kUniform;
  int32_t experts_per_rank = 4;
  int32_t num_topk = 2;
  tern_index_type index_type = TERN_INDEX_INT64;

  tern_layout layout = TERN_LAYOUT_RANK_MAJOR;
  tern_extent extent = TERN_EXTENT_EXACT;
  int32_t expert_alignment = 1;
  bool zero_padding = false;
  int64_t row_capacity = 0;

  int64_t hidden = 64;
  tern_dtype dtype = TERN_DTYPE_BF16;
  tern_encoding encoding = TERN_ENCODING_AS_GIVEN;
  int64_t scale_bytes = 0;  // as given: opaque bytes for each token
  int64_t scale_element_bytes = 4;
  tern_scale_order scale_order = TERN_SCALES_ROW_MAJOR;
  bool strided = false;  // inputs with gaps between tokens and between scales
  bool carry_weights = true;
  bool fused = false;        // the first dispatch routes the plan
  bool few_outputs = false;  // some optional outputs are NULL

  tern_dtype combine_dtype = TERN_DTYPE_BF16;
  tern_combine_mode combine_mode = TERN_COMBINE_HIERARCHICAL;
  tern_wire wire = TERN_WIRE_AS_DTYPE;
  tern_weighting weighting = TERN_WEIGHTS_NONE;
  int32_t num_biases = 0;
  bool return_weights = false;

  bool phases = false;           // send, then receive, instead of whole operations
  bool window_tokens = false;    // tokens and scales to be sent lie in the window
  bool window_dispatch = false;  // outputs of dispatch lie in the window
  bool window_combine = false;   // rows of combine lie in the window
  bool mixed_windows = false;    // GPU: every second rank has its inputs, every second pair of ranks its outputs elsewhere
  int64_t staging_bytes = 0;     // 0: enough for one round
  tern_mode mode = TERN_MODE_AUTO;
  int32_t num_lanes = 1;
  int32_t lane = 0;
  bool masks = false;   // TERN_ON_TIMEOUT_MASK, though nobody is missing
  bool delays = false;  // ranks sleep for a few milliseconds at places drawn from the seed

  int32_t num_experts() const { return num_ranks * experts_per_rank; }
  int32_t node_of(int32_t rank) const { return ranks_per_node == 0 ? 0 : rank / ranks_per_node; }
  int32_t num_nodes() const { return node_of(num_ranks - 1) + 1; }
  bool casts() const { return encoding != TERN_ENCODING_AS_GIVEN; }
  bool masks_ranks() const { return routing == Routing::kRankMask; }

  int64_t token_bytes() const;  // of a row as it is sent
  int64_t token_stride_bytes() const { return token_bytes() + (strided ? 32 : 0); }
  int64_t scale_stride_bytes() const { return strided ? 2 * scale_element_bytes : scale_element_bytes; }
  int64_t scale_token_stride_bytes() const;
  int64_t arriving_token_bytes() const;
  int64_t arriving_scale_bytes() const;
  int64_t scale_granule_bytes() const { return casts() ? 4 : scale_element_bytes; }
  int64_t combine_hidden() const { return (hidden + 7) / 8 * 8; }  // a multiple of 16 bytes in every dtype
  int64_t combine_row_bytes() const;
  int64_t combine_wire_bytes() const;  // on the way
  int64_t num_tokens(int32_t rank) const;
  // Rows that the outputs have with extent worst, as tern_plan_options.row_capacity says.
  int64_t capacity() const;

  // The nearest case that the interface allows: options that contradict each other are brought together.
  Case normalized() const;

  // One line with everything that differs from the defaults.
  std::string name() const;
};

}  // namespace tern::conformance
