# SPDX-License-Identifier: Apache-2.0
"""Loss curves: drawn, and compared."""

from __future__ import annotations

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

COLORS = ("#1f5fa8", "#d8541a", "#3a8a3a", "#7a4fa0")


def runs_of(folders: list[Path]) -> list[dict[str, Any]]:
    """What training.train wrote into each folder."""
    return [json.loads((folder / "losses.json").read_text()) for folder in folders]


def differences(one: list[float], other: list[float]) -> list[float]:
    """|a - b| / b for each step that both have."""
    return [abs(a - b) / b for a, b in zip(one, other)]


def draw(folders: list[Path], path: Path) -> None:
    """The curves, and below them how far each is from the last one named."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = runs_of(folders)
    rows = 2 if len(runs) > 1 else 1
    ratios = [3, 2][:rows]
    figure, found = plt.subplots(
        rows, 1, figsize=(7, 3 + 1.6 * (rows - 1)), sharex=True, squeeze=False, height_ratios=ratios
    )
    axes = found[:, 0]
    for run, color, style in zip(runs, COLORS, ("-", (0, (3, 2)), ":", "-.")):
        steps = range(1, len(run["losses"]) + 1)
        axes[0].plot(steps, run["losses"], color=color, linestyle=style, linewidth=1.4, label=run["label"])
    axes[0].set_ylabel("cross entropy, nats per byte")
    axes[0].set_title("A mixture-of-experts language model on this project's text", fontsize=11)
    axes[0].legend(frameon=False)
    if rows == 2:
        for run, color in zip(runs[:-1], COLORS):
            apart = list(accumulate(differences(run["losses"], runs[-1]["losses"]), max))
            axes[1].plot(range(1, len(apart) + 1), apart, color=color, linewidth=1.2)
        axes[1].set_yscale("log")
        axes[1].set_ylabel("largest relative\ndifference so far")
    axes[-1].set_xlabel("step")
    for one in axes:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
