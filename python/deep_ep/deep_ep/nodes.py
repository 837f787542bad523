# SPDX-License-Identifier: Apache-2.0
"""How many ranks share a node. The ranks of a node follow each other."""

from __future__ import annotations

import os
from typing import NamedTuple

import tern

RANKS_PER_NODE_VARIABLE = "TERN_RANKS_PER_NODE"
# What the interface takes for granted where nobody says otherwise.
_USUAL_RANKS_PER_NODE = 8


class Nodes(NamedTuple):
    num_ranks: int
    num_nodes: int

    @classmethod
    def of_group(cls, group: tern.Group) -> Nodes:
        """As the ranks have found out, or TERN_RANKS_PER_NODE declares."""
        return cls(group.num_ranks, group.num_nodes)

    @classmethod
    def expected(cls, num_ranks: int) -> Nodes:
        """For sizes that are asked for before there is a group: as TERN_RANKS_PER_NODE declares, else nodes of 8."""
        declared = os.environ.get(RANKS_PER_NODE_VARIABLE, "")
        ranks_per_node = int(declared) if declared.isdecimal() else 0  # the group says what is wrong with it
        return cls(num_ranks, max(1, -(-num_ranks // (ranks_per_node or _USUAL_RANKS_PER_NODE))))

    def as_one(self) -> Nodes:
        return Nodes(self.num_ranks, 1)

    @property
    def ranks_per_node(self) -> int:
        return -(-self.num_ranks // self.num_nodes)
