# SPDX-License-Identifier: Apache-2.0
"""Who the ranks are."""

from __future__ import annotations

import ctypes
import weakref
from typing import Any, Callable

from . import _c
from ._library import lib
from .errors import Error, InvalidArgumentError, InvalidStateError, check

Allgather = Callable[[bytes], "list[bytes]"]


class Group:
    """The ranks of a job. Made by one of the `from_` functions, which are collective, or by `local`.

    Creation waits at most `timeout_ms` (0: TERN_TIMEOUT_MS of the environment, else 30 s) for ranks that do not come, and names
    them. `name` tells groups of one job apart; `node` declares which node this rank is on, `ranks_per_node` that rank r is on
    node r // ranks_per_node (default: TERN_RANKS_PER_NODE, else found out). A group may be dropped while its exchanges are in use.
    """

    def __init__(self, handle: int, keep: Any = None) -> None:
        self._handle = ctypes.c_void_p(handle)
        self._keep = keep  # the callback lives as long as the group
        self._finalizer = weakref.finalize(self, _destroy, handle, keep)
        self._info = _c.GroupInfo()
        check(lib.tern_group_get_info(self._handle, ctypes.byref(self._info)))

    @classmethod
    def from_env(cls, *, name: str = "", node: str = "", ranks_per_node: int = 0, timeout_ms: int = 0) -> Group:
        """From the launcher's environment: torchrun, Open MPI or Slurm; with none of them, a group of one rank."""
        handle = ctypes.c_void_p()
        options = _options(name, node, ranks_per_node, timeout_ms)
        check(lib.tern_group_create_from_env(ctypes.byref(options), ctypes.byref(handle)))
        return cls(_value(handle))

    @classmethod
    def from_allgather(
        cls,
        rank: int,
        num_ranks: int,
        allgather: Allgather,
        *,
        name: str = "",
        node: str = "",
        ranks_per_node: int = 0,
        timeout_ms: int = 0,
    ) -> Group:
        """From a function that takes this rank's bytes and returns those of all ranks, in order of ranks.

        It is called from this function and from the creation of exchanges, on the calling thread; what it raises, they raise.
        """
        callback = _AllgatherCallback(num_ranks, allgather)
        handle = ctypes.c_void_p()
        options = _options(name, node, ranks_per_node, timeout_ms)
        status = lib.tern_group_create_from_allgather(
            ctypes.byref(options), rank, num_ranks, callback.function, None, ctypes.byref(handle)
        )
        callback.check(status)
        return cls(_value(handle), callback)

    @classmethod
    def from_torch(
        cls,
        process_group: Any = None,
        *,
        name: str = "",
        node: str = "",
        ranks_per_node: int = 0,
        timeout_ms: int = 0,
    ) -> Group:
        """From a torch.distributed ProcessGroup of any backend (None: the default group), by its all_gather_object.

        Exchanges are made before the ProcessGroup is destroyed. The group does not keep it alive: its threads, which
        destroy_process_group ends, must not run on while the interpreter ends.
        """
        import torch.distributed as dist

        if process_group is None:
            process_group = dist.group.WORLD
        if process_group is None:
            raise InvalidArgumentError(
                "torch.distributed is not initialised: call init_process_group first, or give a ProcessGroup"
            )
        while_it_lives = weakref.ref(process_group)

        def allgather(own: bytes) -> list[bytes]:
            living = while_it_lives()
            if living is None:
                raise InvalidStateError("the ProcessGroup has been destroyed: make exchanges before that")
            gathered: list[Any] = [None] * living.size()
            dist.all_gather_object(gathered, own, group=living)
            return gathered

        return cls.from_allgather(
            process_group.rank(),
            process_group.size(),
            allgather,
            name=name,
            node=node,
            ranks_per_node=ranks_per_node,
            timeout_ms=timeout_ms,
        )

    @classmethod
    def from_mpi(
        cls, communicator: Any, *, name: str = "", node: str = "", ranks_per_node: int = 0, timeout_ms: int = 0
    ) -> Group:
        """From an mpi4py communicator, or anything with Get_rank, Get_size and allgather."""
        return cls.from_allgather(
            communicator.Get_rank(),
            communicator.Get_size(),
            communicator.allgather,
            name=name,
            node=node,
            ranks_per_node=ranks_per_node,
            timeout_ms=timeout_ms,
        )

    @classmethod
    def local(cls, num_ranks: int, *, name: str = "", ranks_per_node: int = 0, timeout_ms: int = 0) -> list[Group]:
        """Ranks in this process: element r is for the thread that plays rank r. Not collective: one call makes all of them."""
        handles = (ctypes.c_void_p * max(num_ranks, 1))()
        options = _options(name, "", ranks_per_node, timeout_ms)
        check(lib.tern_group_create_local(ctypes.byref(options), num_ranks, handles))
        return [cls(_value(ctypes.c_void_p(handle))) for handle in handles]

    @property
    def rank(self) -> int:
        return int(self._info.rank)

    @property
    def num_ranks(self) -> int:
        return int(self._info.num_ranks)

    @property
    def node(self) -> int:
        """Index of this rank's node."""
        return int(self._info.node)

    @property
    def num_nodes(self) -> int:
        return int(self._info.num_nodes)

    @property
    def rank_in_node(self) -> int:
        return int(self._info.rank_in_node)

    @property
    def ranks_in_node(self) -> int:
        return int(self._info.ranks_in_node)

    def __repr__(self) -> str:
        return f"tern.Group(rank {self.rank} of {self.num_ranks}, node {self.node} of {self.num_nodes})"

    def call_collective(self, function: Callable[..., int], *arguments: Any) -> None:
        """Calls a C function that may call the group's all-gather, and raises what that raised rather than what C made of it."""
        status = function(*arguments)
        if self._keep is not None:
            self._keep.check(status)
        check(status)


class _AllgatherCallback:
    """A Python all-gather as a C function. An exception must not pass through C: it is kept, and raised behind the call."""

    def __init__(self, num_ranks: int, allgather: Allgather) -> None:
        self._num_ranks = num_ranks
        self._allgather = allgather
        self._error: BaseException | None = None
        self.function = _c.AllgatherFn(self._call)

    def _call(self, _context: Any, send: int, receive: int, num_bytes: int) -> int:
        try:
            gathered = self._allgather(ctypes.string_at(send, num_bytes))
            if len(gathered) != self._num_ranks or any(len(piece) != num_bytes for piece in gathered):
                raise Error(
                    f"the all-gather returned pieces of {[len(piece) for piece in gathered]} bytes; "
                    f"{self._num_ranks} of {num_bytes} bytes were expected, one for each rank"
                )
            ctypes.memmove(receive, b"".join(gathered), num_bytes * self._num_ranks)
        except BaseException as error:  # noqa: BLE001, raised again by check
            self._error = error
            return 1
        return 0

    def check(self, status: int) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
        check(status)


def _options(name: str, node: str, ranks_per_node: int, timeout_ms: int) -> _c.GroupOptions:
    return _c.GroupOptions(
        name=name.encode() or None, node=node.encode() or None, ranks_per_node=ranks_per_node, timeout_ms=timeout_ms
    )


def _value(handle: ctypes.c_void_p) -> int:
    assert handle.value is not None
    return handle.value


def _destroy(handle: int, _keep: Any) -> None:
    lib.tern_group_destroy(handle)
