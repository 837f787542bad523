# SPDX-License-Identifier: Apache-2.0
"""Runs every example in Python, as its docstring says, and what the training example promises."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

torch: Any = pytest.importorskip("torch", reason="torch is not installed")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
DEADLINE_S = 150  # of each program
# A model that takes milliseconds for a step.
SMALL = [
    "--hidden",
    "32",
    "--ffn-hidden",
    "32",
    "--context",
    "32",
    "--batch",
    "8",
    "--experts",
    "8",
    "--layers",
    "1",
    "--heads",
    "2",
    "--log-every",
    "1",
]


def run(*command: str, status: int = 0) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def example(name: str, *arguments: str, status: int = 0) -> str:
    return run(sys.executable, str(EXAMPLES / name), *arguments, status=status)


@pytest.mark.parametrize("arrays", ["numpy", "torch"])
def test_hello(arrays: str) -> None:
    if arrays == "numpy":
        pytest.importorskip("numpy", reason="NumPy is not installed")
    printed = example("python/hello.py", *(["--torch"] if arrays == "torch" else []))
    assert sorted(printed.splitlines()) == [f"rank {r}: 32 rows; sent {r + 1}, got {2 * r + 2}" for r in range(4)]


def test_hello_torchrun() -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = run(*torchrun, str(EXAMPLES / "python" / "hello_torchrun.py"))
    assert "sent 1, got 2" in printed
    assert "sent 2, got 4" in printed
    example("python/hello_torchrun.py", status=2)  # says how to start it


def test_overlap() -> None:
    printed = example("python/overlap.py", "--ranks", "2", "--tokens", "64", "--hidden", "64", "--repeat", "2")
    assert printed.count("equal results") == 2


def losses_in(folder: Path) -> list[float]:
    found: list[float] = json.loads((folder / "losses.json").read_text())["losses"]
    return found


def test_training_on_ranks_and_in_one_process_agrees() -> None:
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    printed = example("train_moe_lm.py", "--check", "--ranks", "4", "--steps", "5", *SMALL)
    assert "the curves agree: over 5 steps" in printed


def interrupt_at_step(step: int, *arguments: str) -> str:
    """Starts the training, and sends SIGINT to the process that was started when it has done `step` steps. Its output."""
    command = [sys.executable, "-u", str(EXAMPLES / "train_moe_lm.py"), *arguments]
    # A session of its own, so that whatever is left of it can be ended.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    printed = []
    try:
        for line in process.stdout:
            printed.append(line)
            if line.startswith(f"step {step} "):
                process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 130, "".join(printed)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "".join(printed)


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    parted, whole = tmp_path / "parted", tmp_path / "whole"
    printed = interrupt_at_step(3, "--ranks", "2", "--steps", "100000", "--out", str(parted), *SMALL)
    done = len(losses_in(parted))
    assert done >= 3
    assert f"stopped after {done} steps" in printed
    steps = str(done + 3)
    example("train_moe_lm.py", "--ranks", "2", "--steps", steps, "--resume", "--out", str(parted), *SMALL)
    # Another cut, at a checkpoint on the way: it changes nothing, and only the last one stays.
    every = ["--checkpoint-every", "2"]
    example("train_moe_lm.py", "--ranks", "2", "--steps", steps, "--out", str(whole), *every, *SMALL)
    assert losses_in(parted) == losses_in(whole)  # every bit
    assert [path.name for path in whole.glob("step-*")] == [f"step-{done + 3:06d}"]
    assert not list(whole.rglob("*.partial"))
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    picture = tmp_path / "curves.png"
    example("train_moe_lm.py", "--draw", str(parted), str(whole), "--png", str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


def test_one_rank_needs_no_launcher(tmp_path: Path) -> None:
    pytest.importorskip("tqdm", reason="tqdm is not installed")
    example("train_moe_lm.py", "--ranks", "1", "--steps", "2", "--out", str(tmp_path), *SMALL)
    started = time.time()
    assert len(losses_in(tmp_path)) == 2
    assert (tmp_path / "latest").stat().st_mtime <= started
    example("train_moe_lm.py", "--ranks", "3", "--steps", "2", "--out", str(tmp_path), *SMALL, status=2)  # 8 sequences
