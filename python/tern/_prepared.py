# SPDX-License-Identifier: Apache-2.0
"""Operations that are not over when their call returns: those in two phases, and those that are prepared to be run later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence, TypeVar

from . import _c
from ._arrays import Arrays, raw_stream
from ._calls import CombineCall, DispatchCall
from .errors import HAS_ROUTED, InvalidArgumentError, InvalidStateError, check
from .results import Pending, Prepared

if TYPE_CHECKING:
    from .plan import Plan

Result = TypeVar("Result")


def sent(plan: Plan, function: Any, call: DispatchCall | CombineCall, result: Result, inputs: Any) -> Pending[Result]:
    """The first phase of an operation, done here; `inputs` and the plan stay alive until the second."""
    structs = plan._structs(call, _c.Phase.SEND)
    launch, arguments = structs.launch, (plan._pointer, *structs.pointers)
    status = function(*arguments)
    if structs.routes and status in HAS_ROUTED:
        plan._num_tokens = plan._next_tokens = structs.routing.num_tokens
    check(status)

    def receive(stream: Any) -> None:
        launch.phase = _c.Phase.RECEIVE
        launch.stream = call.arrays.current_stream() if stream is None else raw_stream(stream)
        check(function(*arguments), result)

    return Pending(result, receive, (inputs, plan))


def prepared(
    plan: Plan, function: Any, call: DispatchCall | CombineCall, result: Result, inputs: Any
) -> Prepared[Result]:
    structs = plan._structs(call)
    launch, routes = structs.launch, structs.routes
    handle, (args_pointer, launch_pointer) = plan._pointer, structs.pointers
    current_stream = call.arrays.current_stream
    num_tokens, num_rows = plan._next_tokens, plan._num_rows

    def run(stream: Any) -> None:
        if not routes and (plan._num_tokens != num_tokens or plan._num_rows != num_rows):
            raise InvalidStateError(
                f"prepared for {num_tokens} tokens and {num_rows} rows, but {plan._num_tokens} tokens were routed, with "
                f"{plan._num_rows} rows; prepare it anew"
            )
        launch.stream = current_stream() if stream is None else raw_stream(stream)
        status = function(handle, args_pointer, launch_pointer)
        if routes and status in HAS_ROUTED:
            plan._num_tokens = plan._next_tokens = num_tokens
        if status != 0:
            check(status, result)

    return Prepared(result, run, inputs)


def refuse_copies(arrays: Arrays, given: Sequence[Any], used: Sequence[int | None]) -> None:
    """A copy would hold what an array held when the operation was prepared."""
    for array in given:
        if array is None:
            continue
        adopted = arrays.adopt(array, "an array")
        if (arrays.pointer(adopted) or None) not in (*used, None):
            raise InvalidArgumentError(
                f"an array of shape {list(adopted.shape)} and strides {list(arrays.strides(adopted))} would be copied at every run; a "
                "prepared operation needs dense ones"
            )
