# SPDX-License-Identifier: Apache-2.0
"""The memory that ranks share, and what operations run on."""

from __future__ import annotations

import ctypes
import math
import sys
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, TypeVar

from . import _c
from ._arrays import Array, ArraysOfDevice, memory_at, raw_stream
from ._library import lib
from .errors import InvalidArgumentError, check
from .group import Group
from .results import RoutingCounts

if TYPE_CHECKING:
    from .plan import Plan

E = TypeVar("E", bound=IntEnum)


def choice(kind: type[E], given: E | str) -> E:
    """An enum's member by itself or by its name in small letters."""
    if isinstance(given, kind):
        return given
    try:
        return kind[given.upper()] if isinstance(given, str) else kind(given)
    except (KeyError, ValueError):
        names = ", ".join(repr(member.name.lower()) for member in kind)
        raise InvalidArgumentError(f"{given!r} is no {kind.__name__}; it must be one of {names}") from None


@dataclass(frozen=True)
class MemoryInfo:
    """Bytes of each rank's windows."""

    control_bytes: int
    staging_bytes: int
    window_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Failure:
    """Who waited for whom: tern.h, tern_failure."""

    status: _c.Status
    waiter: int
    awaited: int
    lane: int
    operation: _c.Operation
    expected_epoch: int
    seen_epoch: int


@dataclass(frozen=True)
class State:
    health: _c.Health
    generation: int  # 0 at first, grows with every recovery
    masked: list[int]  # ranks
    failure: Failure | None


class Exchange:
    """Windows of a group's ranks, mapped by each other. Making one is collective; all ranks give equal options.

    device: "cpu", "cuda", "cuda:1" or a torch.device; None: a GPU where there is one and the library has the engine.
        "cuda" alone is torch's current device if torch uses CUDA already, else the rank's index on its host.
    max_tokens, max_row_bytes (scales included), max_topk, max_experts: shapes to be expected, per rank, from which the staging is
        computed; larger batches go in rounds. staging_bytes sets it by hand.
    window_bytes: memory for `empty`. num_lanes: independent sequences of operations. num_sms: SMs of an operation on a GPU, 0: chosen.
    timeout_ms: the deadline of every wait, 0: TERN_TIMEOUT_MS, else 30 s. on_timeout: "abort" or "mask" (GPU ranks: on the
        latency path).
    mode: "auto", "throughput" or "latency".

    One thread at a time uses a lane; different lanes may be used from different threads. Operations on GPU ranks run on torch's
    current stream, in the order of the calls on every rank.
    """

    def __init__(
        self,
        group: Group,
        *,
        device: Any = None,
        max_tokens: int = 0,
        max_row_bytes: int = 0,
        max_topk: int = 0,
        max_experts: int = 0,
        window_bytes: int = 0,
        staging_bytes: int = 0,
        num_lanes: int = 1,
        num_sms: int = 0,
        timeout_ms: int = 0,
        on_timeout: _c.TimeoutPolicy | str = _c.TimeoutPolicy.ABORT,
        mode: _c.Mode | str = _c.Mode.AUTO,
    ) -> None:
        kind, index = _device(device)
        options = _c.ExchangeOptions(
            device=kind,
            device_index=index,
            max_tokens=max_tokens,
            max_row_bytes=max_row_bytes,
            max_topk=max_topk,
            max_experts=max_experts,
            window_bytes=window_bytes,
            staging_bytes=staging_bytes,
            num_lanes=num_lanes,
            num_sms=num_sms,
            timeout_ms=timeout_ms,
            on_timeout=choice(_c.TimeoutPolicy, on_timeout),
            mode=choice(_c.Mode, mode),
        )
        handle = ctypes.c_void_p()
        group.call_collective(lib.tern_exchange_create, group._handle, ctypes.byref(options), ctypes.byref(handle))
        self.group = group
        self._native = NativeExchange(handle)
        info = _c.ExchangeInfo()
        check(lib.tern_exchange_get_info(handle, ctypes.byref(info)))
        self.cuda_index: int | None = info.device_index if info.device == _c.DeviceType.CUDA else None
        self.num_lanes = int(info.num_lanes)
        self.timeout_ms = int(info.timeout_ms)
        self._arrays = ArraysOfDevice(self.cuda_index)

    @staticmethod
    def query_memory(group: Group, **options: Any) -> MemoryInfo:
        """What an exchange with these options would take on each rank. Not collective; allocates nothing."""
        kind, index = _device(options.pop("device", None))
        for name, enum_type in (("on_timeout", _c.TimeoutPolicy), ("mode", _c.Mode)):
            if name in options:
                options[name] = choice(enum_type, options[name])
        asked = _c.ExchangeOptions(device=kind, device_index=index, **options)
        info = _c.MemoryInfo()
        check(lib.tern_exchange_query_memory(group._handle, ctypes.byref(asked), ctypes.byref(info)))
        return MemoryInfo(info.control_bytes, info.staging_bytes, info.window_bytes, info.total_bytes)

    @property
    def is_cuda(self) -> bool:
        return self.cuda_index is not None

    def plan(self, **options: Any) -> Plan:
        """Room for the routing of one batch; the arguments are those of Plan."""
        from .plan import Plan

        return Plan(self, **options)

    def count_routing(
        self, topk_idx: Array, num_experts: int, *, wanted: Sequence[str] | None = None, stream: Any = None
    ) -> RoutingCounts:
        """What a routing says by itself. Nothing is communicated, and on a GPU the host waits for nothing.

        topk_idx: int64 or int32 [num_tokens, num_topk] global experts, -1: none. wanted: names of fields of RoutingCounts; default: all.
        On a GPU what is no expert counts as -1; on a CPU it is an InvalidArgumentError.
        """
        if stream is not None and self._arrays.is_elsewhere(stream):
            return self._arrays.call_on_stream(Exchange.count_routing, locals())
        arrays = self._arrays.of(topk_idx)
        if len(topk_idx.shape) != 2:
            raise InvalidArgumentError(f"topk_idx has shape {list(topk_idx.shape)}; it must be [num_tokens, num_topk]")
        num_topk, num_ranks = topk_idx.shape[1], self.group.num_ranks
        if num_topk == 0:
            raise InvalidArgumentError("topk_idx has no columns; a token needs at least one")
        topk_idx, num_tokens = arrays.matrix(topk_idx, "topk_idx", num_topk)
        shapes = {
            "tokens_per_rank": ((num_ranks,), arrays.int32),
            "tokens_per_node": ((self.group.num_nodes,), arrays.int32),
            "tokens_per_expert": ((num_experts,), arrays.int32),
            "token_in_rank": ((num_tokens, num_ranks), arrays.bool),
        }
        made = {name: arrays.empty(*shapes[name]) for name in (shapes if wanted is None else wanted)}
        routing = _c.Routing(
            topk_idx=arrays.pointer(topk_idx), topk_idx_type=arrays.index_type(topk_idx), num_tokens=num_tokens
        )
        counts = _c.RoutingCounts(**{name: arrays.pointer(array) for name, array in made.items()})
        launch = _c.Launch(stream=arrays.current_stream() if stream is None else raw_stream(stream))
        check(
            lib.tern_count_routing(
                self._native.handle,
                ctypes.byref(routing),
                num_experts,
                num_topk,
                ctypes.byref(launch),
                ctypes.byref(counts),
            )
        )
        return RoutingCounts(**made)

    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        """An array in this rank's window, uninitialised: other ranks use it in place (zero copy).

        A torch tensor for a torch dtype, else a NumPy array. CPU ranks profit where dispatch writes to it and combine reads from it;
        GPU ranks where dispatch reads tokens and scales from it and combine reads rows from it, and in rank_major also where dispatch writes
        to it what other ranks have in theirs. Not collective. The memory goes back
        when the last array on it is dropped; on a GPU, operations that use it must have ended then.
        """
        arrays = self._arrays.of_dtype(dtype)
        num_bytes = math.prod(shape) * arrays.dtype_bytes(dtype)
        pointer = ctypes.c_void_p()
        native = self._native
        check(lib.tern_window_alloc(native.handle, num_bytes, ctypes.byref(pointer)))
        assert pointer.value is not None
        owner = memory_at(pointer.value, num_bytes, self.is_cuda)
        weakref.finalize(owner, _free_window, native, pointer.value)
        return arrays.from_memory(owner, shape, dtype)

    def state(self) -> State:
        """Health, generation, masked ranks and the last failure. Waits for nothing; any thread, also while an operation runs."""
        state = _c.ExchangeState()
        check(lib.tern_exchange_get_state(self._native.handle, ctypes.byref(state)))
        f = state.failure
        failure = None
        if f.status != 0:
            failure = Failure(
                _c.Status(f.status),
                f.waiter,
                f.awaited,
                f.lane,
                _c.Operation(f.operation),
                f.expected_epoch,
                f.seen_epoch,
            )
        masked = [rank for rank in range(self.group.num_ranks) if state.masked[rank]]
        return State(_c.Health(state.health), state.generation, masked, failure)

    def metrics(self) -> dict[str, int]:
        """Counters since creation: tern.h, tern_metrics."""
        metrics = _c.Metrics()
        check(lib.tern_exchange_get_metrics(self._native.handle, ctypes.byref(metrics)))
        return {name: int(getattr(metrics, name)) for name, *_ in metrics._fields_[1:]}

    def recover(
        self, *, mask: Iterable[int] = (), allow_mask: bool = False, readmit: bool = False, timeout_ms: int = 0
    ) -> None:
        """Starts a new generation without the ranks in `mask`, and with allow_mask without those that do not answer in time.

        readmit: ranks that are masked out, and call this with readmit too, are let in again; each is waited for until the timeout.

        Collective among those who go on, with no operation of this rank running. Plans must be routed again.
        """
        masked = (ctypes.c_uint8 * self.group.num_ranks)()
        for rank in mask:
            masked[rank] = 1
        options = _c.RecoverOptions(
            mask=masked, allow_mask=int(allow_mask), readmit=int(readmit), timeout_ms=timeout_ms
        )
        check(lib.tern_exchange_recover(self._native.handle, ctypes.byref(options)))

    def destroy(self) -> None:
        """Gives the memory back once the plans and window arrays of this exchange are gone too. Never collective."""
        self._native = NativeExchange(None)

    def __enter__(self) -> Exchange:
        return self

    def __exit__(self, *_: Any) -> None:
        self.destroy()


class NativeExchange:
    """The C handle. Plans and window arrays hold it too, so it is destroyed behind the last of them."""

    def __init__(self, handle: ctypes.c_void_p | None) -> None:
        self.handle = handle
        if handle is not None:
            weakref.finalize(self, lib.tern_exchange_destroy, handle)


def _free_window(native: NativeExchange, pointer: int) -> None:
    lib.tern_window_free(native.handle, pointer)


def _device(given: Any) -> tuple[_c.DeviceType, int]:
    """tern_device_type and index; -1: the rank's index on its host."""
    if given is None:
        return _c.DeviceType.AUTO, -1
    kind, _, index = str(given).partition(":")
    if kind == "cpu":
        return _c.DeviceType.CPU, 0
    if kind == "cuda":
        return _c.DeviceType.CUDA, int(index) if index else _current_cuda_index()
    raise InvalidArgumentError(
        f"device is {given!r}; it must be 'cpu', 'cuda', 'cuda:N', or None for the best there is"
    )


def _current_cuda_index() -> int:
    """torch's current device if torch uses CUDA in this process already; else -1, the rank's index on its host."""
    torch = sys.modules.get("torch")
    return int(torch.cuda.current_device()) if torch is not None and torch.cuda.is_initialized() else -1
