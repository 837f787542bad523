# SPDX-License-Identifier: Apache-2.0
"""Nodes of one rank each, where everything but a rank's own rows crosses the network. Run by deep_ep_ranks.py."""

from __future__ import annotations

import deep_ep_checks_nodes as nodes

KILLED = ()
TIMEOUT_MS = nodes.TIMEOUT_MS

CHECKS = {
    name: nodes.CHECKS[name]
    for name in (
        "sums_in_two_levels",
        "as_frameworks_call",
        "bytes_for_the_network",
        "low_latency_sums",
        "normal_layout",
        "normal_round_trip",
        "normal_worst_case_rows",
        "normal_routing_by_ranks",
        "normal_no_tokens_anywhere",
        "low_latency_encodings",
        "low_latency_zero_copy",
        "low_latency_hinted_sizes_suffice",
        "low_latency_small_buffers",
    )
}
