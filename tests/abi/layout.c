/* SPDX-License-Identifier: Apache-2.0
 *
 * The binary interface, frozen: where every published field of tern.h lies, how large the structs are, and what number each
 * choice is. Nothing here may ever change for a released version. A struct that grows at its end fails at its SIZE until
 * that line and a FIELD line for each new field say so.
 */
#include <assert.h>
#include <tern/tern.h>

#define FIELD(type, field, offset) static_assert(offsetof(type, field) == (offset), #type "." #field " moved")
#define SIZE(type, bytes) static_assert(sizeof(type) == (bytes), #type " has another size")
#define VALUE(name, number) static_assert((name) == (number), #name " has another number")

/* x86-64 and aarch64 Linux alike. */
static_assert(sizeof(void*) == 8 && sizeof(long) == 8 && sizeof(size_t) == 8, "the interface is frozen for LP64");

SIZE(tern_group_options, 56);
FIELD(tern_group_options, struct_size, 0);
FIELD(tern_group_options, name, 8);
FIELD(tern_group_options, node, 16);
FIELD(tern_group_options, timeout_ms, 24);
FIELD(tern_group_options, log, 32);
FIELD(tern_group_options, log_context, 40);
FIELD(tern_group_options, log_level, 48);
FIELD(tern_group_options, ranks_per_node, 52);

SIZE(tern_group_info, 32);
FIELD(tern_group_info, struct_size, 0);
FIELD(tern_group_info, rank, 8);
FIELD(tern_group_info, num_ranks, 12);
FIELD(tern_group_info, node, 16);
FIELD(tern_group_info, num_nodes, 20);
FIELD(tern_group_info, rank_in_node, 24);
FIELD(tern_group_info, ranks_in_node, 28);

SIZE(tern_exchange_options, 80);
FIELD(tern_exchange_options, struct_size, 0);
FIELD(tern_exchange_options, device, 8);
FIELD(tern_exchange_options, device_index, 12);
FIELD(tern_exchange_options, staging_bytes, 16);
FIELD(tern_exchange_options, window_bytes, 24);
FIELD(tern_exchange_options, max_tokens, 32);
FIELD(tern_exchange_options, max_row_bytes, 40);
FIELD(tern_exchange_options, max_topk, 48);
FIELD(tern_exchange_options, max_experts, 52);
FIELD(tern_exchange_options, num_lanes, 56);
FIELD(tern_exchange_options, num_sms, 60);
FIELD(tern_exchange_options, timeout_ms, 64);
FIELD(tern_exchange_options, on_timeout, 72);
FIELD(tern_exchange_options, mode, 76);

SIZE(tern_exchange_info, 32);
FIELD(tern_exchange_info, struct_size, 0);
FIELD(tern_exchange_info, device, 8);
FIELD(tern_exchange_info, device_index, 12);
FIELD(tern_exchange_info, num_lanes, 16);
FIELD(tern_exchange_info, reserved, 20);
FIELD(tern_exchange_info, timeout_ms, 24);

SIZE(tern_memory_info, 40);
FIELD(tern_memory_info, struct_size, 0);
FIELD(tern_memory_info, control_bytes, 8);
FIELD(tern_memory_info, staging_bytes, 16);
FIELD(tern_memory_info, window_bytes, 24);
FIELD(tern_memory_info, total_bytes, 32);

SIZE(tern_failure, 40);
FIELD(tern_failure, status, 0);
FIELD(tern_failure, waiter, 4);
FIELD(tern_failure, awaited, 8);
FIELD(tern_failure, lane, 12);
FIELD(tern_failure, operation, 16);
FIELD(tern_failure, reserved, 20);
FIELD(tern_failure, expected_epoch, 24);
FIELD(tern_failure, seen_epoch, 32);

SIZE(tern_exchange_state, 1080);
FIELD(tern_exchange_state, struct_size, 0);
FIELD(tern_exchange_state, health, 8);
FIELD(tern_exchange_state, generation, 12);
FIELD(tern_exchange_state, failure, 16);
FIELD(tern_exchange_state, masked, 56);

SIZE(tern_recover_options, 32);
FIELD(tern_recover_options, struct_size, 0);
FIELD(tern_recover_options, timeout_ms, 8);
FIELD(tern_recover_options, mask, 16);
FIELD(tern_recover_options, allow_mask, 24);
FIELD(tern_recover_options, readmit, 28);

SIZE(tern_metrics, 104);
FIELD(tern_metrics, struct_size, 0);
FIELD(tern_metrics, num_routes, 8);
FIELD(tern_metrics, num_dispatches, 16);
FIELD(tern_metrics, num_combines, 24);
FIELD(tern_metrics, rounds, 32);
FIELD(tern_metrics, sent_bytes, 40);
FIELD(tern_metrics, sent_local_bytes, 48);
FIELD(tern_metrics, received_rows, 56);
FIELD(tern_metrics, waits, 64);
FIELD(tern_metrics, sleeps, 72);
FIELD(tern_metrics, wait_ns, 80);
FIELD(tern_metrics, timeouts, 88);
FIELD(tern_metrics, network_bytes, 96);

SIZE(tern_plan_options, 48);
FIELD(tern_plan_options, struct_size, 0);
FIELD(tern_plan_options, max_tokens, 8);
FIELD(tern_plan_options, num_experts, 16);
FIELD(tern_plan_options, num_topk, 20);
FIELD(tern_plan_options, layout, 24);
FIELD(tern_plan_options, extent, 28);
FIELD(tern_plan_options, expert_alignment, 32);
FIELD(tern_plan_options, zero_padding, 36);
FIELD(tern_plan_options, row_capacity, 40);

SIZE(tern_routing, 56);
FIELD(tern_routing, struct_size, 0);
FIELD(tern_routing, topk_idx, 8);
FIELD(tern_routing, topk_idx_type, 16);
FIELD(tern_routing, reserved, 20);
FIELD(tern_routing, num_tokens, 24);
FIELD(tern_routing, token_in_rank, 32);
FIELD(tern_routing, tokens_per_expert, 40);
FIELD(tern_routing, device_num_tokens, 48);

SIZE(tern_launch, 48);
FIELD(tern_launch, struct_size, 0);
FIELD(tern_launch, stream, 8);
FIELD(tern_launch, lane, 16);
FIELD(tern_launch, phase, 20);
FIELD(tern_launch, num_sms, 24);
FIELD(tern_launch, own_stream, 28);
FIELD(tern_launch, after_event, 32);
FIELD(tern_launch, done_event, 40);

SIZE(tern_plan_info, 104);
FIELD(tern_plan_info, struct_size, 0);
FIELD(tern_plan_info, num_tokens, 8);
FIELD(tern_plan_info, num_received, 16);
FIELD(tern_plan_info, num_rows, 24);
FIELD(tern_plan_info, row_capacity, 32);
FIELD(tern_plan_info, generation, 40);
FIELD(tern_plan_info, latency_path, 44);
FIELD(tern_plan_info, received_per_rank, 48);
FIELD(tern_plan_info, received_per_expert, 56);
FIELD(tern_plan_info, sent_per_rank, 64);
FIELD(tern_plan_info, pair_counts, 72);
FIELD(tern_plan_info, num_sms, 80);
FIELD(tern_plan_info, reserved, 84);
FIELD(tern_plan_info, rail_tokens, 88);
FIELD(tern_plan_info, rail_token_in_rank, 96);

SIZE(tern_routing_counts, 40);
FIELD(tern_routing_counts, struct_size, 0);
FIELD(tern_routing_counts, tokens_per_rank, 8);
FIELD(tern_routing_counts, tokens_per_node, 16);
FIELD(tern_routing_counts, tokens_per_expert, 24);
FIELD(tern_routing_counts, token_in_rank, 32);

SIZE(tern_dispatch_args, 208);
FIELD(tern_dispatch_args, struct_size, 0);
FIELD(tern_dispatch_args, routing, 8);
FIELD(tern_dispatch_args, tokens, 16);
FIELD(tern_dispatch_args, dtype, 24);
FIELD(tern_dispatch_args, encoding, 28);
FIELD(tern_dispatch_args, hidden, 32);
FIELD(tern_dispatch_args, token_stride_bytes, 40);
FIELD(tern_dispatch_args, scales, 48);
FIELD(tern_dispatch_args, scale_bytes, 56);
FIELD(tern_dispatch_args, scale_element_bytes, 64);
FIELD(tern_dispatch_args, scale_token_stride_bytes, 72);
FIELD(tern_dispatch_args, scale_element_stride_bytes, 80);
FIELD(tern_dispatch_args, topk_weights, 88);
FIELD(tern_dispatch_args, carry_weights, 96);
FIELD(tern_dispatch_args, out_scale_order, 100);
FIELD(tern_dispatch_args, out_tokens, 104);
FIELD(tern_dispatch_args, out_scales, 112);
FIELD(tern_dispatch_args, out_topk_idx, 120);
FIELD(tern_dispatch_args, out_topk_weights, 128);
FIELD(tern_dispatch_args, out_source_token, 136);
FIELD(tern_dispatch_args, out_source_rank, 144);
FIELD(tern_dispatch_args, out_row_expert, 152);
FIELD(tern_dispatch_args, out_expert_offsets, 160);
FIELD(tern_dispatch_args, out_expert_counts, 168);
FIELD(tern_dispatch_args, out_rank_counts, 176);
FIELD(tern_dispatch_args, out_expert_rank_ranges, 184);
FIELD(tern_dispatch_args, zero_copy, 192);
FIELD(tern_dispatch_args, reserved, 196);
FIELD(tern_dispatch_args, wait_ns, 200);

SIZE(tern_combine_args, 104);
FIELD(tern_combine_args, struct_size, 0);
FIELD(tern_combine_args, rows, 8);
FIELD(tern_combine_args, dtype, 16);
FIELD(tern_combine_args, mode, 20);
FIELD(tern_combine_args, hidden, 24);
FIELD(tern_combine_args, weighting, 32);
FIELD(tern_combine_args, carry_weights, 36);
FIELD(tern_combine_args, topk_weights, 40);
FIELD(tern_combine_args, row_weights, 48);
FIELD(tern_combine_args, bias, 56);
FIELD(tern_combine_args, out_tokens, 72);
FIELD(tern_combine_args, out_topk_weights, 80);
FIELD(tern_combine_args, zero_copy, 88);
FIELD(tern_combine_args, wire, 92);
FIELD(tern_combine_args, wait_ns, 96);

SIZE(tern_span, 64);
FIELD(tern_span, begin_ns, 0);
FIELD(tern_span, end_ns, 8);
FIELD(tern_span, epoch, 16);
FIELD(tern_span, bytes, 24);
FIELD(tern_span, kind, 32);
FIELD(tern_span, operation, 36);
FIELD(tern_span, phase, 40);
FIELD(tern_span, lane, 44);
FIELD(tern_span, peer, 48);
FIELD(tern_span, awaited, 52);
FIELD(tern_span, status, 56);
FIELD(tern_span, reserved, 60);

SIZE(tern_status, 4);
VALUE(TERN_OK, 0);
VALUE(TERN_INVALID_ARGUMENT, 1);
VALUE(TERN_INVALID_STATE, 2);
VALUE(TERN_OUT_OF_MEMORY, 3);
VALUE(TERN_UNSUPPORTED, 4);
VALUE(TERN_TIMEOUT, 5);
VALUE(TERN_ABORTED, 6);
VALUE(TERN_MISMATCH, 7);
VALUE(TERN_STALE_PLAN, 8);
VALUE(TERN_MASKED_OUT, 9);
VALUE(TERN_CAPACITY_EXCEEDED, 10);
VALUE(TERN_SYSTEM_ERROR, 11);
VALUE(TERN_INTERNAL_ERROR, 12);

SIZE(tern_device_type, 4);
VALUE(TERN_DEVICE_AUTO, 0);
VALUE(TERN_DEVICE_CPU, 1);
VALUE(TERN_DEVICE_CUDA, 2);

SIZE(tern_dtype, 4);
VALUE(TERN_DTYPE_BF16, 0);
VALUE(TERN_DTYPE_FP16, 1);
VALUE(TERN_DTYPE_FP32, 2);
VALUE(TERN_DTYPE_FP8_E4M3, 3);
VALUE(TERN_DTYPE_BYTES, 4);

SIZE(tern_index_type, 4);
VALUE(TERN_INDEX_INT64, 0);
VALUE(TERN_INDEX_INT32, 1);

SIZE(tern_layout, 4);
VALUE(TERN_LAYOUT_RANK_MAJOR, 0);
VALUE(TERN_LAYOUT_EXPERT_MAJOR, 1);
VALUE(TERN_LAYOUT_EXPERT_PADDED, 2);

SIZE(tern_extent, 4);
VALUE(TERN_EXTENT_EXACT, 0);
VALUE(TERN_EXTENT_WORST, 1);

SIZE(tern_phase, 4);
VALUE(TERN_PHASE_WHOLE, 0);
VALUE(TERN_PHASE_SEND, 1);
VALUE(TERN_PHASE_RECEIVE, 2);

SIZE(tern_encoding, 4);
VALUE(TERN_ENCODING_AS_GIVEN, 0);
VALUE(TERN_ENCODING_FP8_F32, 1);
VALUE(TERN_ENCODING_FP8_F32_POW2, 2);
VALUE(TERN_ENCODING_FP8_UE8M0, 3);

SIZE(tern_scale_order, 4);
VALUE(TERN_SCALES_ROW_MAJOR, 0);
VALUE(TERN_SCALES_COLUMN_MAJOR, 1);

SIZE(tern_combine_mode, 4);
VALUE(TERN_COMBINE_HIERARCHICAL, 0);
VALUE(TERN_COMBINE_EXACT, 1);

SIZE(tern_weighting, 4);
SIZE(tern_wire, 4);
VALUE(TERN_WEIGHTS_NONE, 0);
VALUE(TERN_WEIGHTS_DISPATCH, 1);
VALUE(TERN_WEIGHTS_OWNER, 2);

SIZE(tern_timeout_policy, 4);
VALUE(TERN_ON_TIMEOUT_ABORT, 0);
VALUE(TERN_ON_TIMEOUT_MASK, 1);

SIZE(tern_mode, 4);
VALUE(TERN_MODE_AUTO, 0);
VALUE(TERN_MODE_THROUGHPUT, 1);
VALUE(TERN_MODE_LATENCY, 2);

SIZE(tern_log_level, 4);
VALUE(TERN_LOG_OFF, 0);
VALUE(TERN_LOG_ERROR, 1);
VALUE(TERN_LOG_WARNING, 2);
VALUE(TERN_LOG_INFO, 3);
VALUE(TERN_LOG_DEBUG, 4);

SIZE(tern_health, 4);
VALUE(TERN_HEALTH_OK, 0);
VALUE(TERN_HEALTH_DEGRADED, 1);
VALUE(TERN_HEALTH_FAILED, 2);

SIZE(tern_operation, 4);
VALUE(TERN_OP_NONE, 0);
VALUE(TERN_OP_ROUTE, 1);
VALUE(TERN_OP_DISPATCH, 2);
VALUE(TERN_OP_WEIGHTS, 3);
VALUE(TERN_OP_COMBINE, 4);
VALUE(TERN_OP_RECOVER, 5);

SIZE(tern_span_kind, 4);
VALUE(TERN_SPAN_OPERATION, 0);
VALUE(TERN_SPAN_PLAN, 1);
VALUE(TERN_SPAN_SEND, 2);
VALUE(TERN_SPAN_WAIT, 3);
VALUE(TERN_SPAN_RECEIVE, 4);
VALUE(TERN_SPAN_REDUCE, 5);

SIZE(tern_awaited, 4);
VALUE(TERN_AWAITED_NOTHING, 0);
VALUE(TERN_AWAITED_MESSAGES, 1);
VALUE(TERN_AWAITED_ADDRESS, 2);
VALUE(TERN_AWAITED_CONSUMED, 3);
VALUE(TERN_AWAITED_OWN_GPU, 4);
