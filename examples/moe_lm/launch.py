# SPDX-License-Identifier: Apache-2.0
"""Ranks as processes: started by torchrun, or by this program itself. A Ctrl-C reaches all of them, and all end behind the same step.

Nothing here loads torch: the process that starts the ranks has no use for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

STORE = "MOE_LM_STORE"  # where ranks that this program started meet
INTERRUPTED = 130  # exit status, as a shell's
GRACE_S = 30  # for the other ranks, once one has failed


def are_started() -> bool:
    """Whether this process is a rank, and not the one that starts them."""
    return "RANK" in os.environ


def num_started() -> int:
    """How many ranks the launcher has started; 0 where this process is the one that starts them."""
    return int(os.environ.get("WORLD_SIZE", "1")) if are_started() else 0


def start(num_ranks: int) -> int:
    """Runs this program on every rank, hands signals on to them, and returns the exit status of the whole."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, STORE: str(Path(folder) / "store"), "WORLD_SIZE": str(num_ranks)}
        # In sessions of their own: a Ctrl-C in the terminal reaches this process alone, which hands it on, once.
        ranks = [
            subprocess.Popen(
                [sys.executable, *sys.argv],
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                start_new_session=True,
            )
            for rank in range(num_ranks)
        ]

        def hand_on(number: int, _frame: FrameType | None) -> None:
            for rank in ranks:
                if rank.poll() is None:
                    rank.send_signal(number)

        signal.signal(signal.SIGINT, hand_on)
        signal.signal(signal.SIGTERM, hand_on)
        try:
            return _wait(ranks)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    deadline = None
    while True:
        found = [rank.poll() for rank in ranks]
        failed = [status for status in found if status not in (None, 0)]
        if None not in found:
            return failed[0] or 0 if failed else 0
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            return failed[0] or 1
        time.sleep(0.05)


class StopRequest:
    """Notes the first Ctrl-C, or SIGTERM, instead of ending this process; a second one ends it at once."""

    def __init__(self) -> None:
        self._noted = False
        self._parent = os.getppid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._noted = True
        signal.signal(number, signal.SIG_DFL)

    def is_there(self) -> bool:
        return self._noted or os.getppid() != self._parent  # whoever started the ranks is gone
