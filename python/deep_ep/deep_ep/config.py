# SPDX-License-Identifier: Apache-2.0
"""The knobs that frameworks tune per number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

from . import sizes
from .nodes import Nodes


@dataclass(frozen=True)
class Config:
    """num_sms: SMs of an operation in normal mode (GPU ranks). There are no queues here, so the chunk sizes only shape
    the size hints.

    The hints are asked for before there is a group: more than 8 ranks, or than TERN_RANKS_PER_NODE says, count as
    several nodes. Any number of ranks will do.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes for Buffer's num_nvl_bytes, for rows of hidden_bytes. Larger batches go in rounds."""
        tokens_per_round = max(1, self.num_sms // 4 * self.num_max_nvl_chunked_recv_tokens)
        return sizes.normal_hint(tokens_per_round, hidden_bytes, Nodes.expected(num_ranks))

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes for Buffer's num_rdma_bytes in normal mode, for what crosses the network: none inside one node."""
        tokens_per_round = max(1, self.num_sms // 4 * self.num_max_rdma_chunked_recv_tokens)
        return sizes.network_hint(tokens_per_round, hidden_bytes, Nodes.expected(num_ranks))
