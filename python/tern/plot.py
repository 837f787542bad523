# SPDX-License-Identifier: Apache-2.0
"""Draws what `tern bench --json` wrote, and how tokens spread over experts and ranks. Needs matplotlib, once it is called.

python -m tern.plot bench.json more.json -o bench.png         # time and bandwidth against tokens, with the ceiling

figure = tern.plot.bench(["bench.json"])                      # a matplotlib Figure
tern.plot.load([topk_idx_of_rank_0, ...], num_experts=64).savefig("load.png")
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import InvalidArgumentError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart with the common colour deficiencies too: Okabe and Ito's palette.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*"
_MIDDLE_DOT = "\u00b7"


class Series(NamedTuple):
    """One line: records that differ in their tokens only, ascending."""

    op: str
    label: str
    records: list[dict[str, Any]]


# What makes two records of one operation different lines, and how a label says it.
_KEYS = {
    "device": "{}",
    "ranks": "{} ranks",
    "hidden": "hidden {}",
    "topk": "top-{}",
    "experts": "{} experts",
    "dtype": "{}",
    "layout": "{}",
    "extent": "{}",
    "buffers": "{} buffers",
    "mode": "{}",
    "routing": "{}",
    "clock": "{}",
    "cold": "cold {}",
    "num_sms": "{} SMs",
    "expert_alignment": "alignment {}",
}
# The engine chooses it by size, so it changes along a line.
_CHOSEN = ("mode", "num_sms")


def read(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """The records of all files."""
    records: list[dict[str, Any]] = []
    for path in paths:
        try:
            found = json.loads(Path(path).read_text())["records"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidArgumentError(f"{path} is not what `tern bench --json` writes: {error!r}") from error
        records.extend(found)
    if not records:
        raise InvalidArgumentError(f"there are no records in {', '.join(map(str, paths))}")
    return records


def series_of(records: Sequence[dict[str, Any]]) -> list[Series]:
    """Records as lines against tokens. A label says what sets a line apart from the others of its operation."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        key = (record["op"], *(record.get(name) for name in _KEYS if name not in _CHOSEN))
        groups.setdefault(key, []).append(record)
    found = []
    for key, members in groups.items():
        peers = [record for record in records if record["op"] == key[0]]
        parts = []
        for name, text in _KEYS.items():
            value = members[0].get(name)
            if name not in _CHOSEN and value not in (None, "") and len({str(peer.get(name)) for peer in peers}) > 1:
                parts.append(text.format(value))
        members.sort(key=lambda record: int(record["tokens"]))
        found.append(Series(key[0], ", ".join(parts), members))
    return found


def bench(paths: Iterable[str | Path], *, ops: Sequence[str] = ()) -> Figure:
    """A column for each operation: median time with the 99th percentile above, and logical bandwidth with its ceiling, against tokens.

    ops: those to draw, in this order; default: all that the files have. Raises tern.Error for files that are no results.
    """
    paths = list(paths)
    records = read(paths)
    series = series_of(records)
    there = list(dict.fromkeys(one.op for one in series))
    wanted = list(ops) or there
    missing = [op for op in wanted if op not in there]
    if missing:
        raise InvalidArgumentError(f"there are no records of {', '.join(missing)}; there are {', '.join(there)}")
    figure: Figure
    figure, axes = _grid(len(wanted))
    for column, op in enumerate(wanted):
        time, bandwidth = axes[0][column], axes[1][column]
        lines = [one for one in series if one.op == op]
        for line, color, marker in zip(lines, _repeated(_COLORS), _repeated(_MARKERS)):
            _draw_line(time, bandwidth, line, color, marker)
        _draw_ceilings(bandwidth, lines)
        _finish(time, bandwidth, lines)
        time.set_title(op.replace("_", " "), fontsize=11)
    axes[0][0].set_ylabel("time, microseconds\n(median; shaded to the 99th percentile)")
    axes[1][0].set_ylabel("logical bandwidth of a rank, GB/s")
    # One legend for all columns: a label has the same colour in most of them, and says what it is in the others.
    shown = {label: handle for one in axes.flat for handle, label in zip(*one.get_legend_handles_labels())}
    figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=min(len(shown), 4), fontsize=8, frameon=False
    )
    figure.suptitle(_common(records), fontsize=10)
    return figure


def load(topk_idx: Sequence[Any], *, num_experts: int) -> Figure:
    """How many entries each expert gets, stacked by the rank they come from, and each rank in all.

    topk_idx: for each rank an array [tokens, top-k] of global experts, -1: none; NumPy, torch, or nested lists.
    num_experts: of all ranks, divisible by their number.
    """
    import numpy as np

    counts = []
    for rank, given in enumerate(topk_idx):
        flat = np.asarray(given.cpu() if hasattr(given, "cpu") else given).reshape(-1)
        flat = flat[flat >= 0]
        if flat.size and int(flat.max()) >= num_experts:
            raise InvalidArgumentError(f"rank {rank} chose expert {int(flat.max())}, but there are {num_experts}")
        counts.append(np.bincount(flat.astype(np.int64), minlength=num_experts))
    num_ranks = len(counts)
    if num_ranks == 0 or num_experts % num_ranks != 0:
        raise InvalidArgumentError(f"{num_experts} experts cannot be spread evenly over {num_ranks} ranks")
    per_rank = [count.reshape(num_ranks, -1).sum(axis=1) for count in counts]
    figure: Figure
    figure, (of_experts, of_ranks) = _subplots(1, 2, figsize=(11, 4), gridspec_kw={"width_ratios": [3, 1]})
    _stack(of_experts, counts, "expert")
    _stack(of_ranks, per_rank, "rank of the expert")
    local = num_experts // num_ranks
    for rank in range(1, num_ranks):
        of_experts.axvline(rank * local - 0.5, color="0.75", linewidth=0.8, zorder=0)
    of_experts.set_ylabel("entries (token, k)")
    of_ranks.set_xticks(range(num_ranks) if num_ranks <= 16 else range(0, num_ranks, -(-num_ranks // 16)))
    handles, labels = of_experts.get_legend_handles_labels()
    # Many ranks would fill the picture with their names: the stack's order says it then.
    shown = len(handles) if num_ranks <= 8 else 1
    of_ranks.legend(
        handles[:shown], labels[:shown], fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0)
    )
    return figure


# ------------------------------------------------------------------------------------------------------------- parts of it


def _subplots(*arguments: Any, **options: Any) -> Any:
    """pyplot's, without pyplot: nothing global, no window, and no backend chosen for the caller."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("tern.plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=options.pop("figsize"), layout="constrained")
    return figure, figure.subplots(*arguments, **options)


def _grid(num_columns: int) -> Any:
    size = (max(3.4 * num_columns, 5), 6.4)
    return _subplots(2, num_columns, figsize=size, sharex="col", squeeze=False)


def _repeated(values: Sequence[str]) -> Any:
    return itertools.cycle(values)


def _draw_line(time: Any, bandwidth: Any, line: Series, color: str, marker: str) -> None:
    tokens = [record["tokens"] for record in line.records]
    median = [record["median_us"] for record in line.records]
    slow = [record["p99_us"] for record in line.records]
    style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.4}
    time.plot(tokens, median, label=line.label or "measured", **style)
    time.fill_between(tokens, median, slow, color=color, alpha=0.15, linewidth=0)
    time.vlines(tokens, median, slow, color=color, alpha=0.4, linewidth=1)
    if any(record["logical_bytes"] for record in line.records):
        bandwidth.plot(tokens, [record["logical_gbps"] for record in line.records], **style)


def _draw_ceilings(bandwidth: Any, lines: Sequence[Series]) -> None:
    """Dashed: one in grey where the lines share it, else each in its line's colour."""
    ceilings: dict[tuple[tuple[int, float], ...], str] = {}
    for line, color in zip(lines, _repeated(_COLORS)):
        points = tuple(
            (int(r["tokens"]), float(r["ceiling_logical_gbps"])) for r in line.records if r.get("ceiling_logical_gbps")
        )
        if points:
            ceilings.setdefault(points, color)
    for place, (points, color) in enumerate(ceilings.items()):
        # A line through one point is none: then a short stroke at its height.
        style: dict[str, Any] = {"marker": "_", "markersize": 22} if len(points) == 1 else {}
        bandwidth.plot(
            *zip(*points),
            color="0.35" if len(ceilings) == 1 else color,
            linestyle=(0, (4, 2)),
            linewidth=1.1,
            label="ceiling" if place == 0 else None,
            **style,
        )


def _finish(time: Any, bandwidth: Any, lines: Sequence[Series]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    ticks = sorted({int(record["tokens"]) for line in lines for record in line.records})
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axes in (time, bandwidth):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xscale("log", base=2)
        # At most eight numbers, of what was measured: they stay legible.
        axes.xaxis.set_major_locator(FixedLocator(ticks[:: -(-len(ticks) // 8)]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(plain)
        axes.tick_params(labelsize=8)
    time.set_yscale("log")
    time.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    time.yaxis.set_minor_locator(NullLocator())
    time.yaxis.set_major_formatter(plain)
    bandwidth.set_ylim(bottom=0)
    bandwidth.set_xlabel("tokens on each rank")
    if not bandwidth.lines:
        bandwidth.text(0.5, 0.5, "carries no tokens", transform=bandwidth.transAxes, ha="center", color="0.5")
        bandwidth.set_yticks([])


def _stack(axes: Any, counts: Sequence[Any], xlabel: str) -> None:
    bottom = counts[0] * 0
    places = range(len(bottom))
    for rank, (count, color) in enumerate(zip(counts, _repeated(_COLORS))):
        axes.bar(places, count, bottom=bottom, color=color, width=0.85, label=f"from rank {rank}")
        bottom = bottom + count
    mean = float(bottom.mean())
    share = f"; at most {bottom.max() / mean:.2f} times that" if mean > 0 else ""
    axes.axhline(mean, color="0.2", linestyle=(0, (4, 2)), linewidth=1)
    axes.set_title(f"{mean:.4g} entries in the mean{share}", fontsize=9)
    axes.set_xlabel(xlabel)
    axes.margins(x=0.01)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _common(records: Sequence[dict[str, Any]]) -> str:
    """What all records share, for the title."""
    parts = []
    for name, text in _KEYS.items():
        values = {str(record.get(name)) for record in records if record.get(name) not in (None, "")}
        if len(values) == 1 and name not in _CHOSEN:
            parts.append(text.format(values.pop()))
    return f"tern bench {_MIDDLE_DOT} " + ", ".join(parts) if parts else "tern bench"


def main(arguments: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m tern.plot", description="Draws the results of tern bench --json.")
    parser.add_argument(
        "results", nargs="+", help="files that tern bench --json wrote; several settings share a picture"
    )
    parser.add_argument("-o", "--output", default="bench.png", help="PNG, SVG or PDF, by its ending (bench.png)")
    parser.add_argument("--ops", nargs="+", default=[], help="operations to draw; default: all")
    parser.add_argument("--dpi", type=int, default=130)
    args = parser.parse_args(arguments or None)
    try:
        bench(args.results, ops=args.ops).savefig(args.output, dpi=args.dpi)
    except (InvalidArgumentError, ImportError, OSError, ValueError) as error:
        print(f"tern.plot: {error}", file=sys.stderr)
        return 1
    print(f"drew {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
