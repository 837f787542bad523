# SPDX-License-Identifier: Apache-2.0
"""Operations that come again: structs of their own, and calls that look like the one before.

Most calls look like the one before: the same choices, and arrays of the same shapes, strides and dtypes. A plan keeps what it found when it
looked at such a call, and the next one compares, sets addresses, and is in C. Nothing is taken on trust: every array is compared and its
address read at every call, since a tensor's memory and shape may change (`set_`, `resize_`, `t_`, `.data`). A call that differs in
anything is looked at as a whole, which is also where the errors are raised. No array is kept alive.
"""

from __future__ import annotations

import collections
import ctypes
import functools
from typing import Any, Callable, Generic, Sequence, TypeVar

from . import _c
from ._arrays import Array, Arrays, raw_stream
from ._calls import CombineCall, DispatchCall, out_addresses, set_outputs
from ._library import tern_combine, tern_dispatch
from .errors import InvalidArgumentError, check
from .results import Combined, Dispatched, Pending

Result = TypeVar("Result")
AnyRepeat = TypeVar("AnyRepeat")

NUM_KEPT = 4  # repeats of an operation

# What Combined(...) does, in half the time.
_combined: Callable[[tuple[Array, None]], Combined] = functools.partial(tuple.__new__, Combined)


class Structs:
    """Copies of what describes an operation: those of its plan are filled in anew by whatever the plan is used for next."""

    def __init__(self, args: Any, handle: ctypes.c_void_p, launch: _c.Launch, routing: _c.Routing) -> None:
        self.args, self.launch = type(args).from_buffer_copy(args), _c.Launch.from_buffer_copy(launch)
        self.routes = isinstance(args, _c.DispatchArgs) and bool(args.routing)
        self.routing = _c.Routing.from_buffer_copy(routing)
        if self.routes:
            self.args.routing = ctypes.pointer(self.routing)
        # Of the C function, as ctypes passes them on without a look.
        plan = ctypes.c_void_p.from_param(handle.value)
        self.arguments = plan, ctypes.byref(self.args), ctypes.byref(self.launch)


def sent(
    function: Any, call: DispatchCall | CombineCall, structs: Structs, result: Result, inputs: Any
) -> Pending[Result]:
    """The first phase of an operation, done here; `inputs` stay alive until the second."""
    launch = structs.launch
    launch.phase = _c.Phase.SEND
    check(function(*structs.arguments))

    def receive(stream: Any) -> None:
        launch.phase = _c.Phase.RECEIVE
        launch.stream = call.arrays.current_stream() if stream is None else raw_stream(stream)
        check(function(*structs.arguments), result)

    return Pending(result, receive, inputs)


class Repeat:
    """The choices of a call, what its arrays looked like, and its structs."""

    def __init__(
        self, call: DispatchCall | CombineCall, structs: Structs, choices: Any, given: Sequence[Array]
    ) -> None:
        self.choices = choices
        self.alike = call.arrays.alike(given)
        self._structs, self._arguments = structs, structs.arguments
        self._pointer, self._current_stream = call.arrays.pointer, call.arrays.current_stream
        self._make = call.maker.make_again
        self._inputs: Any = None  # addresses that are set
        self._outputs: Any = None
        self._stream = structs.launch.stream or 0
        self.num_tokens = structs.routing.num_tokens  # if the operation routes


class RepeatedDispatch(Repeat):
    def run(self, given: Sequence[Array], out: Dispatched | None, stream: Any) -> Dispatched:
        """Of arrays that are alike."""
        tokens, topk_idx, scales, topk_weights = given
        pointer, structs = self._pointer, self._structs
        inputs = (
            pointer(tokens),
            0 if topk_idx is None else pointer(topk_idx),
            0 if scales is None else pointer(scales),
            0 if topk_weights is None else pointer(topk_weights),
        )
        if inputs != self._inputs:
            self._inputs = inputs
            args = structs.args
            args.tokens, structs.routing.topk_idx, args.scales, args.topk_weights = inputs
        if out is None:
            out = Dispatched(*self._make())
        outputs = out_addresses(out, pointer)
        if outputs != self._outputs:
            self._outputs = outputs
            set_outputs(structs.args, outputs)
        stream = self._current_stream() if stream is None else raw_stream(stream)
        if stream != self._stream:
            self._structs.launch.stream = self._stream = stream
        status = tern_dispatch(*self._arguments)
        if status != 0:
            check(status, out)
        return out


class RepeatedCombine(Repeat):
    def run(self, given: Sequence[Array], stream: Any) -> Combined:
        """Of arrays that are alike."""
        rows, topk_weights, out = given
        pointer = self._pointer
        if out is None:
            (out,) = self._make()
        addresses = (pointer(rows), 0 if topk_weights is None else pointer(topk_weights), pointer(out))
        if addresses != self._inputs:
            self._inputs = addresses
            args = self._structs.args
            args.rows, args.topk_weights, args.out_tokens = addresses
        stream = self._current_stream() if stream is None else raw_stream(stream)
        if stream != self._stream:
            self._structs.launch.stream = self._stream = stream
        status = tern_combine(*self._arguments)
        if status != 0:
            check(status)
        return _combined((out, None))


class Repeats(Generic[AnyRepeat]):
    """The last repeats of an operation of a plan. One is made when a call comes a second time: it takes as long to make as several calls."""

    def __init__(self, make: Callable[..., AnyRepeat], *plan: Any) -> None:
        """plan: the handle and the structs that all its calls fill in."""
        self._make, self._plan = make, plan
        self.kept: collections.deque[AnyRepeat] = collections.deque(maxlen=NUM_KEPT)
        self._seen: collections.deque[Any] = collections.deque(maxlen=NUM_KEPT)

    def see(self, call: DispatchCall | CombineCall, choices: Any, given: Sequence[Array], used: Sequence[Any]) -> None:
        """A call that was looked at as a whole and is done. used: the arrays that C got, the first of them as the first of those given; copies
        are among them."""
        seen = call, choices, tuple(used[0].shape)
        if seen not in self._seen:
            self._seen.append(seen)
            return
        self._seen.remove(seen)
        if {*map(id, given)} <= {*map(id, used)}:
            self.kept.appendleft(self._make(call, Structs(call.args, *self._plan), choices, given))


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
