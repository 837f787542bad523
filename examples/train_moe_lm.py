#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains a small byte-level language model, top-2 of 16 experts, on real text, with its experts spread over ranks by tern.nn.

    python examples/train_moe_lm.py --out runs/spread                      # starts 4 ranks here
    torchrun --nproc-per-node 4 examples/train_moe_lm.py --out runs/spread # the same, started by torchrun
    python examples/train_moe_lm.py --out runs/spread --resume --steps 400 # goes on
    python examples/train_moe_lm.py --out runs/whole --dense               # one process, no expert parallelism
    python examples/train_moe_lm.py --draw runs/spread runs/whole          # loss curves as PNG
    python examples/train_moe_lm.py --check                                # both for a few steps; fails if they differ

Ctrl-C ends all ranks behind the same step, with a checkpoint; a second one ends them at once.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from moe_lm import curves, launch

# Of the loss, relative, for a few steps: both runs compute the same in FP32, but sums come in another order. After many steps a token
# whose second and third expert are all but equally probable goes another way, and from then on the runs differ by more.
CHECK_TOLERANCE = 1e-4


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--ranks",
        type=int,
        default=0,
        help="processes to start here; default 4, with --dense 1. torchrun says it itself",
    )
    add("--dense", action="store_true", help="all experts in one process: no exchange. For comparison")
    add(
        "--shards",
        type=int,
        default=4,
        help="--dense: parts that the batch is taken in, as many as the other run's ranks (4)",
    )
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU for each rank if there are so many",
    )
    add(
        "--threads",
        type=int,
        default=1,
        help="of each rank on the CPU; with one, sums come in the same order in every run (1)",
    )
    add("--steps", type=int, default=0, help="default 200; with --check 10")
    add("--batch", type=int, default=16, help="sequences of a step, on all ranks together (16)")
    add("--context", type=int, default=128, help="bytes of a sequence (128)")
    add("--hidden", type=int, default=128)
    add("--ffn-hidden", type=int, default=128, help="inner width of each expert (128)")
    add("--layers", type=int, default=2)
    add("--heads", type=int, default=4)
    add("--experts", type=int, default=16)
    add("--topk", type=int, default=2)
    add("--balance-loss", type=float, default=0.01, help="coefficient of the load-balancing loss (0.01)")
    add("--lr", type=float, default=3e-3)
    add("--seed", type=int, default=1, help="of weights and batches (1)")
    add("--text", type=Path, nargs="+", help="files or folders; default: this project's documents, and licence texts")
    add("--out", type=Path, default=Path("runs/train_moe_lm"), help="folder of checkpoints and losses.json")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    add("--checkpoint-every", type=int, default=100, help="steps; 0: at the end only (100)")
    add(
        "--log-every",
        type=int,
        default=10,
        help="steps between lines where there is no terminal for a progress bar (10)",
    )
    add("--timeout", type=int, default=120, help="seconds that a rank waits for another one (120)")
    add("--draw", type=Path, nargs="+", metavar="FOLDER", help="draw the curves of these runs, and train nothing")
    add("--png", type=Path, default=Path("train_moe_lm.png"), help="where --draw draws")
    add("--check", action="store_true", help="train spread and whole for --steps, and compare the losses")
    args = parser.parse_args(arguments)
    if args.ranks < 0 or args.steps < 0:
        parser.error("--ranks and --steps must not be negative")
    args.steps = args.steps or (10 if args.check else 200)
    num_shards = args.shards if args.dense else launch.num_started() or args.ranks or 4
    if args.batch % num_shards or (not args.dense and args.experts % num_shards):
        parser.error(f"--batch ({args.batch}) and --experts ({args.experts}) must be divisible by {num_shards} ranks")
    return args


def check(args: argparse.Namespace) -> int:
    """Two runs of this program with the same arguments, one of them --dense."""
    num_ranks = args.ranks or 4
    own = [*(argument for argument in sys.argv[1:] if argument != "--check"), "--steps", str(args.steps)]
    with tempfile.TemporaryDirectory() as folder:
        spread, whole = Path(folder) / "spread", Path(folder) / "whole"
        for out, mode in (
            (spread, ["--ranks", str(num_ranks)]),
            (whole, ["--ranks", "1", "--dense", "--shards", str(num_ranks)]),
        ):
            command = [sys.executable, sys.argv[0], *own, *mode, "--out", str(out)]
            status = subprocess.run(command, check=False).returncode
            if status != 0:
                return status
        losses = [run["losses"] for run in curves.runs_of([spread, whole])]
    largest = max(curves.differences(*losses))
    verdict = "agree" if largest <= CHECK_TOLERANCE else "DIFFER"
    print(f"the curves {verdict}: over {len(losses[0])} steps the losses are apart by at most {largest:.2e} of them")
    return 0 if largest <= CHECK_TOLERANCE else 1


def main() -> int:
    args = parse(sys.argv[1:])
    if args.draw:
        curves.draw(args.draw, args.png)
        print(f"drew {args.png}")
        return 0
    if args.check:
        return check(args)
    num_ranks = args.ranks or (1 if args.dense else 4)
    if args.dense and (num_ranks > 1 or launch.are_started()):
        print("--dense is one process: start it with --ranks 1, and without torchrun", file=sys.stderr)
        return 2
    if num_ranks > 1 and not launch.are_started():
        return launch.start(num_ranks)
    stop = launch.StopRequest()  # before what takes long: a Ctrl-C may come while torch is still being loaded
    from moe_lm.training import train

    return train(args, stop)


if __name__ == "__main__":
    sys.exit(main())
