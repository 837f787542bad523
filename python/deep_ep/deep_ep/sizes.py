# SPDX-License-Identifier: Apache-2.0
"""How many bytes a buffer needs, and how an exchange divides those that it is given.

A buffer's bytes are divided into fixed shares when it is made, since only sizes are known then and no shapes:

    normal mode     routing 1/8, staging 7/8
    low latency     routing 1/8, staging 3/8, two buffers for zero-copy combine 1/4 each

Between nodes an exchange takes its staging once more, for what crosses the network. In normal mode that is in
num_rdma_bytes, or where there are none for it, in the staging's share; and low latency is divided so:

    low latency     staging 1/4, for the network 1/4, two buffers for zero-copy combine 1/4 each

The size hints are the least numbers for which every share suffices, so a buffer of a hinted size always does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .nodes import Nodes

NUM_BANKS = 2  # of staging, in each lane
_MOST_TOPK = 64
_PAGE_BYTES = 4096
_SLOT_OVERHEAD_BYTES = 1024  # source token, experts and weights of 64 entries, padding
_BANK_OVERHEAD_BYTES = 4096
_ROUTED_ENTRY_BYTES = 8
_ROUTED_TOKEN_BYTES = 4
_MOST_CHUNKS = 64  # in which GPU ranks stage a batch; a round carries whole chunks
_MOST_CPU_BANK_BYTES = 2 << 20
_MOST_ROW_BYTES = 1 << 30  # that an exchange can be told to expect
_LEAST_ROUTING_BYTES = 2 << 20  # of one source: 30,000 tokens with top-8


def slot_bytes(row_bytes: int) -> int:
    """Staging of one row, with its scales."""
    return row_bytes + row_bytes // 8 + _SLOT_OVERHEAD_BYTES


def node_staging_bytes(num_rows: int, row_bytes: int, num_experts: int, nodes: Nodes) -> int:
    """For operations in which each rank sends num_rows to each rank: what goes from one to another within a node, of
    all nodes' tokens."""
    counts = num_experts + nodes.num_nodes * (nodes.num_ranks + 1)
    bank = _BANK_OVERHEAD_BYTES + 4 * counts + nodes.num_nodes * num_rows * slot_bytes(row_bytes)
    return NUM_BANKS * nodes.ranks_per_node * bank


def network_staging_bytes(num_rows: int, row_bytes: int, num_experts: int, nodes: Nodes) -> int:
    """The same for what crosses the network: to each node and from it. 0 inside one node."""
    if nodes.num_nodes == 1:
        return 0
    counts = num_experts + nodes.num_ranks + 1
    bank = _BANK_OVERHEAD_BYTES + 4 * counts + num_rows * slot_bytes(row_bytes)
    return NUM_BANKS * 2 * nodes.num_nodes * bank


def staging_bytes(num_rows: int, row_bytes: int, num_experts: int, nodes: Nodes) -> int:
    """Of an exchange of one lane; it takes as much again for the network."""
    return max(
        node_staging_bytes(num_rows, row_bytes, num_experts, nodes),
        network_staging_bytes(num_rows, row_bytes, num_experts, nodes),
    )


def whole_chunks(num_tokens: int) -> int:
    """The number of tokens when the last chunk is counted as a full one."""
    return num_tokens + -(-num_tokens // _MOST_CHUNKS)


def _routing_bytes(num_tokens: int, num_topk: int, num_experts: int, num_ranks: int) -> int:
    return 2048 + 4 * (num_experts + num_ranks) + num_tokens * (_ROUTED_TOKEN_BYTES + num_topk * _ROUTED_ENTRY_BYTES)


@dataclass(frozen=True)
class Shares:
    """What becomes of the bytes of a buffer, for one of its modes."""

    routing_bytes: int
    staging_bytes: int
    window_bytes: int
    num_lanes: int
    nodes: Nodes

    @classmethod
    def of_normal(cls, num_bytes: int, num_network_bytes: int, nodes: Nodes, on_gpu: bool) -> Shares:
        """num_network_bytes: for what crosses the network; 0: that is in num_bytes too."""
        staging = num_bytes - num_bytes // 8
        if nodes.num_nodes > 1:
            staging = min(staging, num_network_bytes) if num_network_bytes > 0 else staging // 2
        if not on_gpu:
            # Rounds of CPU ranks are small, to stay in caches: more would be taken from the system and never used.
            staging = min(staging, NUM_BANKS * nodes.num_ranks * _MOST_CPU_BANK_BYTES)
        return cls(num_bytes // 8, staging, 0, 1, nodes)

    @classmethod
    def of_low_latency(cls, num_bytes: int, nodes: Nodes, num_lanes: int) -> Shares:
        eighth = num_bytes // 8
        staging = 3 * eighth if nodes.num_nodes == 1 else 2 * eighth
        return cls(eighth, staging, 4 * eighth // 512 * 512, num_lanes, nodes)

    def has_room_for(self, num_rows: int, row_bytes: int, num_experts: int) -> bool:
        """Whether each rank can send num_rows to each rank at once."""
        return self.num_lanes * staging_bytes(num_rows, row_bytes, num_experts, self.nodes) <= self.staging_bytes

    def exchange_options(self) -> dict[str, Any]:
        routing_bytes = self.routing_bytes // (self.num_lanes * NUM_BANKS * self.nodes.num_ranks)
        token_bytes = _ROUTED_TOKEN_BYTES + _MOST_TOPK * _ROUTED_ENTRY_BYTES
        options = {
            "staging_bytes": self.staging_bytes,
            "window_bytes": self.window_bytes,
            "num_lanes": self.num_lanes,
            # The shapes size the routing alone: counts of experts and shorter top-k find room among the bytes of the
            # tokens.
            "max_tokens": max(1, routing_bytes // token_bytes),
            "max_topk": _MOST_TOPK,
            "max_experts": 1,
        }
        if self.nodes.num_nodes > 1:
            # They bound what is taken for the network too. All of it is wanted, whatever the rows will be.
            options["max_row_bytes"] = min(self.staging_bytes, _MOST_ROW_BYTES)
        return options


def least_bytes(num_ranks: int, num_lanes: int) -> int:
    """Of a buffer that can be made at all."""
    return num_ranks * num_lanes * NUM_BANKS * 8 * _PAGE_BYTES


def normal_bytes(
    tokens_per_round: int, max_tokens: int, row_bytes: int, num_topk: int, num_experts: int, nodes: Nodes
) -> int:
    """A buffer with which batches of max_tokens run in rounds of at least tokens_per_round. Between nodes as much again
    is needed for the network."""
    num_ranks, tokens = nodes.num_ranks, max(tokens_per_round, -(-max_tokens // _MOST_CHUNKS))
    staging = staging_bytes(tokens, row_bytes, num_experts, nodes)
    routing = NUM_BANKS * num_ranks * _routing_bytes(max_tokens, max(1, num_topk), num_experts, num_ranks)
    return _page(max(-(-staging * 8 // 7), routing * 8, least_bytes(num_ranks, 1)))


def normal_hint(tokens_per_round: int, row_bytes: int, nodes: Nodes) -> int:
    """A buffer for any batch up to some ten thousand tokens: longer top-k counts as more tokens. The bytes suffice
    inside one node too."""
    routing = NUM_BANKS * nodes.num_ranks * _LEAST_ROUTING_BYTES
    each = [normal_bytes(tokens_per_round, 1, row_bytes, _MOST_TOPK, 4096, n) for n in (nodes, nodes.as_one())]
    return max(*each, _page(routing * 8))


def network_hint(tokens_per_round: int, row_bytes: int, nodes: Nodes) -> int:
    """For the network in normal mode."""
    if nodes.num_nodes == 1:
        return 0
    network = network_staging_bytes(tokens_per_round, row_bytes, 4096, nodes)
    return _page(max(network, least_bytes(nodes.num_ranks, 1)))


def low_latency_hint(
    num_max_dispatch_tokens_per_rank: int, hidden: int, nodes: Nodes, num_experts: int, rows_per_token: int = 1
) -> int:
    """rows_per_token: that come back from one rank; more than one in combine mode "exact". The bytes suffice inside one
    node too."""
    tokens, row_bytes, num_lanes, num_ranks = num_max_dispatch_tokens_per_rank, 2 * hidden, 2, nodes.num_ranks
    rows = whole_chunks(tokens) * rows_per_token
    staging = num_lanes * node_staging_bytes(rows, row_bytes, num_experts, nodes.as_one())
    between = 0 if nodes.num_nodes == 1 else num_lanes * staging_bytes(rows, row_bytes, num_experts, nodes)
    routing = num_lanes * NUM_BANKS * num_ranks * _routing_bytes(tokens, _MOST_TOPK, num_experts, num_ranks)
    zero_copy = num_experts * tokens * row_bytes + 512
    least = least_bytes(num_ranks, num_lanes)
    return _page(max(routing * 8, -(-staging * 8 // 3) + 8, between * 4 + 8, zero_copy * 4, least))


def _page(num_bytes: int) -> int:
    return -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
