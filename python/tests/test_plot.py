# SPDX-License-Identifier: Apache-2.0
"""Pictures of bench results and of loads: that they are images, that what they show is in them, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tern.plot

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
numpy: Any = pytest.importorskip("numpy", reason="NumPy is not installed")

SETTING = {"device": "cpu", "mode": "throughput", "layout": "rank_major", "dtype": "bf16", "ranks": 4, "hidden": 7168}
TOKENS = (16, 64, 1024)


def record(op: str, tokens: int, buffers: str, microseconds: float) -> dict[str, Any]:
    moved = 0 if op == "plan" else 100_000 * tokens
    return {
        **SETTING,
        "op": op,
        "tokens": tokens,
        "buffers": buffers,
        "median_us": microseconds,
        "p99_us": 1.3 * microseconds,
        "logical_bytes": moved,
        "logical_gbps": moved / microseconds * 1e-3,
        "ceiling_logical_gbps": 20.0 if moved else 0.0,
    }


@pytest.fixture
def results(tmp_path: Path) -> list[Path]:
    """A file for each number of tokens, as tern bench writes them."""
    paths = []
    for tokens in reversed(TOKENS):
        records = [record("plan", tokens, "", 20 + tokens / 10)]
        for buffers, factor in (("window", 1), ("caller", 2)):
            records.append(record("dispatch", tokens, buffers, factor * (10 + 8 * tokens)))
        path = tmp_path / f"{tokens}.json"
        path.write_text(json.dumps({"machine": {}, "records": records}))
        paths.append(path)
    return paths


def check_picture(path: Path, *, colors: int) -> None:
    """A PNG of a sensible size in which something is drawn, in several colours."""
    from matplotlib.image import imread

    pixels = (255 * imread(path)).astype("uint8")[..., :3].reshape(-1, 3)
    assert len(pixels) > 300_000
    found, counts = numpy.unique(pixels, axis=0, return_counts=True)
    saturated = (found.max(axis=1).astype(int) - found.min(axis=1)) > 100
    assert (counts[saturated] > 100).sum() >= colors
    assert (found.max(axis=1) < 60).any()  # text


def test_lines_are_told_apart_by_what_differs(results: list[Path]) -> None:
    series = tern.plot.series_of(tern.plot.read(results))
    assert {(one.op, one.label) for one in series} == {
        ("plan", ""),
        ("dispatch", "window buffers"),
        ("dispatch", "caller buffers"),
    }
    for one in series:
        assert [found["tokens"] for found in one.records] == list(TOKENS)


def test_bench_shows_times_bandwidths_and_the_ceiling(results: list[Path], tmp_path: Path) -> None:
    figure = tern.plot.bench(results)
    times, rates = figure.axes[1], figure.axes[3]
    assert times.get_title() == "dispatch"
    numpy.testing.assert_equal([line.get_ydata() for line in times.lines], [[138, 522, 8202], [276, 1044, 16404]])
    expected = [[100 * t / (f * (10 + 8 * t)) for t in TOKENS] for f in (1, 2)] + [[20.0] * 3]
    numpy.testing.assert_allclose([line.get_ydata() for line in rates.lines], expected)
    assert "microseconds" in figure.axes[0].get_ylabel()
    assert "GB/s" in figure.axes[2].get_ylabel()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "measured",
        "window buffers",
        "caller buffers",
        "ceiling",
    ]
    assert "hidden 7168" in figure.get_suptitle()
    figure.savefig(tmp_path / "bench.png", dpi=130)
    check_picture(tmp_path / "bench.png", colors=2)


def test_command_line(results: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "from_command.png"
    command = [sys.executable, "-m", "tern.plot", *map(str, results), "-o", str(out), "--ops", "dispatch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    check_picture(out, colors=2)


def test_wrong_files_are_named(results: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("[]")
    assert tern.plot.main([str(bad), "-o", str(tmp_path / "x.png")]) == 1
    assert "bad.json is not what `tern bench --json` writes" in capsys.readouterr().err
    assert tern.plot.main([str(results[0]), "--ops", "combine"]) == 1
    assert "there are no records of combine; there are plan, dispatch" in capsys.readouterr().err
    bad.write_text('{"records": []}')
    with pytest.raises(tern.Error, match="no records in"):
        tern.plot.bench([bad])


def test_load_counts_entries_by_expert_and_rank(tmp_path: Path) -> None:
    idx = [numpy.array([[0, 1], [0, -1]]), [[5, 5]]]
    figure = tern.plot.load(idx, num_experts=6)
    of_experts, of_ranks = figure.axes
    heights = [[bar.get_height() for bar in container] for container in of_experts.containers]
    assert heights == [[2, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 2]]
    assert [[bar.get_height() for bar in container] for container in of_ranks.containers] == [[3, 0], [0, 2]]
    assert "at most 2.40 times" in of_experts.get_title()
    figure.savefig(tmp_path / "load.png", dpi=110)
    check_picture(tmp_path / "load.png", colors=2)


def test_load_takes_torch_tensors_and_refuses_what_cannot_be() -> None:
    torch: Any = pytest.importorskip("torch", reason="torch is not installed")
    figure = tern.plot.load([torch.tensor([[0, 3]])], num_experts=4)
    assert [bar.get_height() for bar in figure.axes[0].containers[0]] == [1, 0, 0, 1]
    with pytest.raises(tern.InvalidArgumentError, match="rank 0 chose expert 4"):
        tern.plot.load([numpy.array([[4]])], num_experts=4)
    with pytest.raises(tern.InvalidArgumentError, match="5 experts cannot be spread"):
        tern.plot.load([numpy.array([[1]])] * 2, num_experts=5)
