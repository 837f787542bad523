// SPDX-License-Identifier: Apache-2.0
#include "forecast/load.h"

#include "layout/rail.h"

namespace tern::tools {
namespace {

// One round is assumed: a further one costs a header of 64 bytes for each node.
double put_bytes(const ForecastBatch& batch, const layout::RailBankLayout& bank) {
  const int num_others = batch.places.num_nodes - 1;
  return static_cast<double>(num_others * bank.slots()) + batch.network_rows() * static_cast<double>(bank.slot.stride());
}

layout::RailBankLayout route_bank(const ForecastBatch& batch) {
  return {.num_counts = batch.choices.num_experts / batch.places.num_nodes + batch.places.num_ranks() + 1,
          .slot = {.num_words = 1 + batch.choices.num_topk}};
}

Load load_of_rows(const ForecastBatch& batch, int64_t row_bytes) {
  const double bytes = batch.rows() * static_cast<double>(row_bytes);
  Load load;
  load.own = bytes / batch.places.ranks_per_node;
  load.link = bytes - load.own;
  load.tokens = static_cast<double>(batch.num_tokens * row_bytes);
  return load;
}

}  // namespace

Load load_of_route(const ForecastBatch& batch) {
  Load load;
  load.network = put_bytes(batch, route_bank(batch));
  return load;
}

Load load_of_dispatch(const ForecastBatch& batch, bool routes_on_its_way) {
  const int64_t row_bytes = batch.dispatch_row_bytes + batch.dispatch_scale_bytes;
  Load load = load_of_rows(batch, row_bytes);
  if (batch.layout != TERN_LAYOUT_RANK_MAJOR) load.entries = (batch.entries() - batch.rows()) * static_cast<double>(row_bytes);
  const layout::RailBankLayout routing = routes_on_its_way ? route_bank(batch) : layout::RailBankLayout{};
  load.network = put_bytes(batch, {.num_counts = routing.num_counts,
                                   .slot = {.payload_bytes = batch.dispatch_row_bytes,
                                            .scale_bytes = batch.dispatch_scale_bytes,
                                            .num_words = routing.slot.num_words + batch.choices.num_topk}});
  return load;
}

Load load_of_combine(const ForecastBatch& batch) {
  Load load = load_of_rows(batch, batch.combine_row_bytes);
  if (batch.layout != TERN_LAYOUT_RANK_MAJOR) load.entries = batch.entries() * static_cast<double>(batch.combine_row_bytes);
  load.network = put_bytes(batch, {.slot = {.payload_bytes = batch.combine_row_bytes}});
  return load;
}

}  // namespace tern::tools
