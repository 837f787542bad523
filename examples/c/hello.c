/* SPDX-License-Identifier: Apache-2.0
 *
 * A Mixture-of-Experts layer on four ranks, which are threads of this process: each token goes to two experts, expert e
 * multiplies by e + 1, and the results come back as a weighted sum. Needs no GPU.
 *
 *   cc -std=c11 hello.c -o hello $(pkg-config --cflags --libs tern) -pthread
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <tern/tern.h>

enum { kRanks = 4, kExperts = 8, kTokens = 16, kHidden = 64, kTopk = 2 };

typedef struct rank_state {
  int rank;
  tern_group* group;
  tern_exchange* exchange;
  tern_plan* plan;
  float* rows;         /* what arrives, as many rows as the routing says */
  int32_t* row_expert; /* and whose they are */
  int right;
} rank_state;

static int ok(const rank_state* state, tern_status status) {
  if (status != TERN_OK) fprintf(stderr, "rank %d: %s: %s\n", state->rank, tern_status_name(status), tern_last_error());
  return status == TERN_OK;
}

static int expert_of(int rank, int token, int k) { return (rank + 3 * token + 5 * k) % kExperts; }

static float value_of(int rank, int token, int channel) { return (float)(100 * rank + token + channel % 2); }

static int create(rank_state* state) {
  const tern_exchange_options exchange = {.struct_size = sizeof exchange,
                                          .device = TERN_DEVICE_CPU,
                                          .max_tokens = kTokens,
                                          .max_row_bytes = kHidden * sizeof(float),
                                          .max_topk = kTopk,
                                          .max_experts = kExperts};
  const tern_plan_options plan = {
      .struct_size = sizeof plan, .max_tokens = kTokens, .num_experts = kExperts, .num_topk = kTopk, .layout = TERN_LAYOUT_EXPERT_MAJOR};
  return ok(state, tern_exchange_create(state->group, &exchange, &state->exchange)) &&
         ok(state, tern_plan_create(state->exchange, &plan, &state->plan));
}

static void apply_experts(rank_state* state, int64_t num_rows) {
  const int first_expert = state->rank * (kExperts / kRanks);
  for (int64_t row = 0; row < num_rows; ++row)
    for (int c = 0; c < kHidden; ++c) state->rows[row * kHidden + c] *= (float)(first_expert + state->row_expert[row] + 1);
}

static int is_right(int rank, float result[kTokens][kHidden]) {
  for (int t = 0; t < kTokens; ++t)
    for (int c = 0; c < kHidden; ++c) {
      const float factor = 0.5f * (float)(expert_of(rank, t, 0) + 1) + 0.5f * (float)(expert_of(rank, t, 1) + 1);
      if (result[t][c] != factor * value_of(rank, t, c)) return 0;
    }
  return 1;
}

static int round_trip(rank_state* state) {
  float tokens[kTokens][kHidden], result[kTokens][kHidden], weights[kTokens][kTopk];
  int32_t experts[kTokens][kTopk]; /* what a gate would choose */
  for (int t = 0; t < kTokens; ++t) {
    for (int c = 0; c < kHidden; ++c) tokens[t][c] = value_of(state->rank, t, c);
    for (int k = 0; k < kTopk; ++k) {
      experts[t][k] = expert_of(state->rank, t, k);
      weights[t][k] = 0.5f;
    }
  }

  const tern_routing routing = {
      .struct_size = sizeof routing, .topk_idx = experts, .topk_idx_type = TERN_INDEX_INT32, .num_tokens = kTokens};
  tern_plan_info info = {.struct_size = sizeof info};
  if (!ok(state, tern_plan_route(state->plan, &routing, NULL, &info))) return 0;

  state->rows = calloc((size_t)info.num_rows + 1, kHidden * sizeof(float));
  state->row_expert = calloc((size_t)info.num_rows + 1, sizeof(int32_t));
  if (state->rows == NULL || state->row_expert == NULL) return 0;

  const tern_dispatch_args dispatch = {.struct_size = sizeof dispatch,
                                       .tokens = tokens,
                                       .dtype = TERN_DTYPE_FP32,
                                       .hidden = kHidden,
                                       .topk_weights = &weights[0][0],
                                       .out_tokens = state->rows,
                                       .out_row_expert = state->row_expert};
  if (!ok(state, tern_dispatch(state->plan, &dispatch, NULL))) return 0;

  apply_experts(state, info.num_rows);

  const tern_combine_args combine = {.struct_size = sizeof combine,
                                     .rows = state->rows,
                                     .dtype = TERN_DTYPE_FP32,
                                     .hidden = kHidden,
                                     .weighting = TERN_WEIGHTS_DISPATCH,
                                     .out_tokens = result};
  if (!ok(state, tern_combine(state->plan, &combine, NULL))) return 0;

  const int right = is_right(state->rank, result);
  printf("rank %d of %d: %lld rows for its experts, results %s\n", state->rank, kRanks, (long long)info.num_rows,
         right ? "right" : "WRONG");
  return right;
}

static void* run_rank(void* argument) {
  rank_state* state = argument;
  state->right = create(state) && round_trip(state);
  free(state->rows);
  free(state->row_expert);
  tern_plan_destroy(state->plan);
  tern_exchange_destroy(state->exchange);
  tern_group_destroy(state->group);
  return NULL;
}

int main(void) {
  tern_group* groups[kRanks];
  pthread_t threads[kRanks];
  rank_state states[kRanks] = {0};
  if (tern_group_create_local(NULL, kRanks, groups) != TERN_OK) {
    fprintf(stderr, "%s\n", tern_last_error());
    return 1;
  }
  for (int r = 0; r < kRanks; ++r) {
    states[r].rank = r;
    states[r].group = groups[r];
    if (pthread_create(&threads[r], NULL, run_rank, &states[r]) != 0) abort();
  }
  int right = 1;
  for (int r = 0; r < kRanks; ++r) {
    pthread_join(threads[r], NULL);
    right &= states[r].right;
  }
  return right ? 0 : 1;
}
