# SPDX-License-Identifier: Apache-2.0
"""Exceptions with the library's text: what was asked, what was found, what to do. One class for each tern_status."""

from __future__ import annotations

import builtins
from typing import Any

from ._c import Status


class Error(RuntimeError):
    """Anything that Tern reports. `status` tells what kind; the subclasses do too."""

    status: Status = Status.INTERNAL_ERROR


class InvalidArgumentError(Error, ValueError):
    """A size, shape or dtype that cannot be. Nothing was done."""

    status = Status.INVALID_ARGUMENT


class InvalidStateError(Error):
    """Right arguments, wrong moment: a plan that is not routed, a receive without its send."""

    status = Status.INVALID_STATE


class OutOfMemoryError(Error, MemoryError):
    """The window is too small for what is asked (the text says what is needed), or the system has none."""

    status = Status.OUT_OF_MEMORY


class UnsupportedError(Error):
    """Valid, but not available on this machine or in this build."""

    status = Status.UNSUPPORTED


class TimeoutError(Error, builtins.TimeoutError):
    """This rank waited for another one until the deadline; the text names it."""

    status = Status.TIMEOUT


class AbortedError(Error):
    """Another rank failed and told this one."""

    status = Status.ABORTED


class MismatchError(Error):
    """Ranks called different operations, shapes or versions."""

    status = Status.MISMATCH


class StalePlanError(Error):
    """The plan was routed before the last recovery: route it again."""

    status = Status.STALE_PLAN


class MaskedOutError(Error):
    """The other ranks went on without this one."""

    status = Status.MASKED_OUT


class CapacityExceededError(Error):
    """More rows arrived than the outputs have room for. The operation is complete without them; `result` is what it would have returned."""

    status = Status.CAPACITY_EXCEEDED
    result: Any = None


class SystemError(Error, builtins.SystemError):
    """The operating system or a driver refused a call."""

    status = Status.SYSTEM_ERROR


class InternalError(Error):
    """A defect in Tern."""

    status = Status.INTERNAL_ERROR


# Statuses behind which a plan is routed anew; behind any other of an operation that routes, it is as before, or not at all.
HAS_ROUTED = (int(Status.OK), int(Status.CAPACITY_EXCEEDED))

_CLASSES = {c.status: c for c in Error.__subclasses__()}


def check(status: int, result: Any = None) -> None:
    """Raises what the calling thread's last call into the library reported.

    result: what the operation would have returned, for the error that says that it is complete but for some rows.
    """
    if status == 0:
        return
    from ._library import lib

    text = (lib.tern_last_error() or b"").decode(errors="replace")
    error = _CLASSES.get(Status(status), Error)(text)
    if isinstance(error, CapacityExceededError):
        error.result = result
    try:
        raise error
    finally:
        del error  # or it would hold itself, by its traceback, and with it all that its callers have
