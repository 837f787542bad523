# SPDX-License-Identifier: Apache-2.0
"""Four ranks as threads, 8 experts that double what they get. Each token goes to two experts, whose results are averaged.

python examples/python/hello.py            with NumPy
python examples/python/hello.py --torch    with torch tensors
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import tern

TOKENS, HIDDEN, EXPERTS, TOPK = 16, 256, 8, 2


def run_rank(group: tern.Group, xp: Any) -> bool:
    """`xp` is NumPy or torch: Tern takes the arrays of both."""
    exchange = tern.Exchange(group, device="cpu", max_tokens=TOKENS, max_row_bytes=4 * HIDDEN)
    plan = exchange.plan(max_tokens=TOKENS, num_experts=EXPERTS, num_topk=TOPK, layout="expert_major")

    tokens = xp.full((TOKENS, HIDDEN), 1.0 + group.rank, dtype=xp.float32)
    weights = xp.full((TOKENS, TOPK), 0.5, dtype=xp.float32)
    token = xp.arange(TOKENS)
    experts = xp.stack([token % EXPERTS, (3 * token + 1) % EXPERTS], -1)  # what a gate would choose

    plan.route(experts)
    arrived = plan.dispatch(tokens, topk_weights=weights)
    rows = 2 * arrived.tokens  # the experts
    results = plan.combine(rows, weighting="dispatch").tokens

    # With its end of line in one piece: ranks are threads, and print at the same time.
    print(f"rank {group.rank}: {len(rows)} rows; sent {tokens[0, 0]:g}, got {results[0, 0]:g}\n", end="", flush=True)
    return bool((results == 2 * tokens).all())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", action="store_true", help="torch tensors instead of NumPy arrays")
    if parser.parse_args().torch:
        import torch as xp
    else:
        import numpy as xp  # type: ignore[no-redef]
    with ThreadPoolExecutor(4) as ranks:
        return 0 if all(ranks.map(lambda group: run_rank(group, xp), tern.Group.local(4))) else 1


if __name__ == "__main__":
    sys.exit(main())
