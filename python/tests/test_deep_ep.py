# SPDX-License-Identifier: Apache-2.0
"""The drop-in module deep_ep: the checks of deep_ep_checks_*.py, each a test for each number of ranks, on CPUs and on GPUs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

torch = pytest.importorskip("torch", reason="deep_ep needs torch")
deep_ep = pytest.importorskip("deep_ep", reason="deep_ep is not installed")

HERE = Path(__file__).parent
_finished = {}


class Run(NamedTuple):
    checks: str
    num_ranks: int
    ranks_per_node: int = 0  # 0: all are on one
    devices: tuple[str, ...] = ("cpu", "cuda")


RUNS = [
    Run("normal", 2),
    Run("normal", 4),
    Run("low_latency", 2),
    Run("low_latency", 4),
    Run("repeats", 2),
    Run("repeats", 4),
    Run("rules", 3),
    Run("masks", 4),
    Run("masks", 4, 2),
    Run("graphs", 2, devices=("cuda",)),
    Run("nodes", 4, 2),
    Run("rails", 4, 1),
    Run("rails", 2, 1),
]


def module_of(checks):
    return importlib.import_module(f"deep_ep_checks_{checks}")


def results_of(device, run, directory):
    """({check: {rank: error}}, standard error) of one run of the ranks, which the first test that asks makes."""
    key = (device, run)
    if key not in _finished:
        path, module = directory / name_of(device, run), f"deep_ep_checks_{run.checks}"
        finished = subprocess.run(
            [sys.executable, str(HERE / "deep_ep_ranks.py"), module, str(run.num_ranks), str(path)],
            env=dict(
                os.environ,
                TERN_DEEP_EP_DEVICE=device,
                TERN_SHARE_GPU="1",  # ranks take turns where there are fewer GPUs
                TERN_TIMEOUT_MS=str(module_of(run.checks).TIMEOUT_MS),
                TERN_RANKS_PER_NODE=str(run.ranks_per_node),
                PYTHONPATH=os.pathsep.join([str(HERE), *sys.path]),
            ),
            capture_output=True,
            text=True,
            timeout=200,
        )
        results = {}
        for part in sorted(directory.glob(f"{path.name}.*")):
            for line in part.read_text().splitlines():
                entry = json.loads(line)
                results.setdefault(entry["check"], {})[entry["rank"]] = entry["error"]
        _finished[key] = results, finished.stderr[-4000:]
    return _finished[key]


def name_of(device, run):
    nodes = "" if run.ranks_per_node == 0 else f"of-{run.ranks_per_node}-"
    return f"{device}-{run.checks}-{nodes}{run.num_ranks}"


def parameters():
    has_gpu = torch.cuda.is_available()
    for device in ("cpu", "cuda"):
        for run in RUNS:
            if device not in run.devices:
                continue
            marks = [pytest.mark.skip(reason="there is no GPU")] if device == "cuda" and not has_gpu else []
            for check in module_of(run.checks).CHECKS:
                yield pytest.param(device, run, check, id=f"{name_of(device, run)}-{check}", marks=marks)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("deep_ep")


@pytest.mark.parametrize(("device", "run", "check"), list(parameters()))
def test_ranks(device, run, check, directory):
    results, stderr = results_of(device, run, directory)
    errors = results.get(check, {})
    missing = set(range(run.num_ranks)) - set(module_of(run.checks).KILLED) - set(errors)
    assert not missing, f"ranks {sorted(missing)} did not finish {check}\n{stderr}"
    failed = [f"rank {rank}:\n{error}" for rank, error in sorted(errors.items()) if error]
    assert not failed, "\n".join(failed) + stderr


def test_module():
    from deep_ep import Buffer, Config, EventHandle, EventOverlap, topk_idx_t, utils

    assert topk_idx_t is torch.int64
    assert utils.EventHandle is EventHandle and utils.EventOverlap is EventOverlap
    assert isinstance(deep_ep.__version__, str) and Buffer.num_sms == 20 and Config().num_sms == 20
    for absent in ("HybridEPBuffer", "ElasticBuffer"):
        assert not hasattr(deep_ep, absent)


def test_static_methods():
    from deep_ep import Buffer, Config, EventHandle, EventOverlap

    Buffer.set_num_sms(24)
    assert Buffer.num_sms == 24 and Buffer.get_dispatch_config(6).num_sms == 24
    Buffer.set_num_sms(20)
    for wrong in (7, 0, -2):
        with pytest.raises(RuntimeError, match="even"):
            Buffer.set_num_sms(wrong)
    assert isinstance(Buffer.is_sm90_compiled(), bool)
    assert isinstance(Buffer.capture(), EventOverlap) and isinstance(Buffer.capture().event, EventHandle)
    by_keyword = {"num_max_dispatch_tokens_per_rank": 128, "hidden": 7168, "num_ranks": 8, "num_experts": 256}
    hint = Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 256)
    assert hint == Buffer.get_low_latency_rdma_size_hint(**by_keyword) > 0
    for num_ranks in (1, 2, 3, 5, 7, 8, 12, 160):
        for config in (Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks)):
            assert isinstance(config, Config)
            assert config.get_nvl_buffer_size_hint(7168 * 2, num_ranks) > 0
            assert config.get_rdma_buffer_size_hint(7168 * 2, num_ranks) >= 0


@pytest.mark.parametrize(
    ("declared", "num_ranks", "several"), [("", 8, False), ("", 16, True), ("2", 4, True), ("16", 16, False)]
)
def test_sizes_of_nodes(declared, num_ranks, several, monkeypatch):
    """More than 8 ranks are several nodes, unless TERN_RANKS_PER_NODE says otherwise."""
    from deep_ep import Buffer, Config

    monkeypatch.setenv("TERN_RANKS_PER_NODE", declared)
    config = Config()
    assert (config.get_rdma_buffer_size_hint(14336, num_ranks) > 0) == several
    more = Config(num_max_rdma_chunked_recv_tokens=2048).get_rdma_buffer_size_hint(14336, num_ranks)
    assert (more > config.get_rdma_buffer_size_hint(14336, num_ranks)) == several
    between = Buffer.get_low_latency_rdma_size_hint(128, 7168, num_ranks, num_ranks)
    monkeypatch.setenv("TERN_RANKS_PER_NODE", str(num_ranks))
    assert (between > Buffer.get_low_latency_rdma_size_hint(128, 7168, num_ranks, num_ranks)) == several
    for many in (5, 12, 48, 144, 320, 2048):
        assert Buffer.get_dispatch_config(many).get_rdma_buffer_size_hint(14336, many) >= 0


def test_config():
    from deep_ep import Config

    given = json.loads('{"num_sms": 24, "num_max_nvl_chunked_send_tokens": 8, "num_max_nvl_chunked_recv_tokens": 128}')
    config = Config(**given)
    assert config.num_sms == 24 and config.num_max_rdma_chunked_recv_tokens == 256
    assert Config() == Config(20, 6, 256, 6, 256)
    assert config.get_nvl_buffer_size_hint(hidden_bytes=4096, num_ranks=4) > 0


def test_events_without_a_gpu():
    from deep_ep import EventHandle, EventOverlap

    event = EventOverlap(EventHandle(), extra_tensors=())
    event.current_stream_wait()
    event.event.current_stream_wait()
    with EventOverlap() as overlap:
        assert overlap.event is None
    with EventOverlap(EventHandle()):
        pass


def test_needs_a_group():
    with pytest.raises(RuntimeError, match="ProcessGroup"):
        deep_ep.Buffer(None, 1 << 20)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_events_on_a_gpu():
    ones = torch.zeros(1 << 24, device="cuda")
    other = torch.cuda.Stream()
    ones += 1
    event = deep_ep.Buffer.capture()
    with torch.cuda.stream(other):
        event.current_stream_wait()
        doubled = ones * 2
    other.synchronize()
    assert bool((doubled == 2).all())
