// SPDX-License-Identifier: Apache-2.0
// What one rank, the busiest, is expected to move in a dispatch or a combine. Every figure follows from the protocol (docs/protocol.md).
#pragma once

#include <tern/tern.h>

#include <cstdint>

#include "forecast/reach.h"

namespace tern::tools {

// A batch as all ranks have it.
struct ForecastBatch {
  Places places;
  Choices choices;
  Reach reach;
  int64_t num_tokens = 0;  // on each rank
  int64_t dispatch_row_bytes = 0;
  int64_t dispatch_scale_bytes = 0;
  int64_t combine_row_bytes = 0;
  tern_layout layout = TERN_LAYOUT_RANK_MAJOR;
  bool casts = false;  // rows of a dispatch are cast on their way

  // Rows that come to the busiest rank, one for each token and rank: from all ranks.
  double rows() const { return static_cast<double>(num_tokens) * reach.ranks * reach.busiest_rank; }
  // Rows of the expert layouts there, one for each entry.
  double entries() const { return static_cast<double>(num_tokens) * reach.entries * reach.busiest_entries; }
  // Tokens that a rank sends to the nodes of its rails, or gets from there.
  double network_rows() const {
    return static_cast<double>(num_tokens) * reach.nodes * reach.busiest_node * (places.num_nodes - 1) / places.num_nodes;
  }
};

// Bytes. A rank's rows come from its node only: from its own memory and over the link, those of other nodes from the rails there.
struct Load {
  double own = 0;      // rows that stay on the rank
  double link = 0;     // to or from the other ranks of the node
  double network = 0;  // to or from other nodes, as they are put: with metadata
  double entries = 0;  // expert layouts: rows of entries; dispatch: those beyond the first of a message
  double tokens = 0;   // the rank's own tokens

  double rows() const { return own + link; }
};

Load load_of_route(const ForecastBatch& batch);
// `routes_on_its_way`: between nodes, what a route would bring comes with the rows.
Load load_of_dispatch(const ForecastBatch& batch, bool routes_on_its_way = false);
Load load_of_combine(const ForecastBatch& batch);

}  // namespace tern::tools
