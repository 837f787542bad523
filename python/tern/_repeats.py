# SPDX-License-Identifier: Apache-2.0
"""Operations that come again: calls that look like the one before.

Most calls look like the one before: the same choices, and arrays of the same shapes, strides, dtypes and devices. A plan keeps what it found
when it looked at such a call, and the next one compares, sets addresses, and is in C. Nothing is taken on trust: every array, outputs that are
given too, is compared and its address read at every call, since a tensor's memory and shape may change (`set_`, `resize_`, `t_`, `.data`). A call that differs in
anything is looked at as a whole, which is also where the errors are raised. No array is kept alive.
"""

from __future__ import annotations

import collections
import functools
import operator
from typing import TYPE_CHECKING, Any, Callable, Generic, Sequence, TypeVar

from ._arrays import Array, raw_stream
from ._calls import OUT_NAMES, CombineCall, DispatchCall, out_addresses, out_arrays
from .addressed import AddressedCombine, AddressedDispatch, Structs
from .errors import check
from .results import Combined, Dispatched

if TYPE_CHECKING:
    from .plan import Plan

AnyRepeat = TypeVar("AnyRepeat")

NUM_KEPT = 4  # repeats of an operation

# What Combined(...) does, in half the time.
_combined: Callable[[tuple[Array, None]], Combined] = functools.partial(tuple.__new__, Combined)


class Repeat:
    """The choices of a call, what its arrays looked like, and how its outputs are made."""

    def __init__(self, call: DispatchCall | CombineCall, choices: Any, given: Sequence[Array]) -> None:
        self.choices = choices
        self.alike = call.arrays.alike(given)
        self._pointer, self._current_stream = call.arrays.pointer, call.arrays.current_stream
        self._make = call.maker.make_again


def _several(names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """Takes attributes of these names."""
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda given: tuple(getattr(given, name) for name in names)


class RepeatedDispatch(Repeat):
    def __init__(
        self, call: DispatchCall, structs: Structs, choices: Any, given: Sequence[Array], out: Dispatched | None
    ) -> None:
        arrays = dict(zip(OUT_NAMES, (None,) * len(OUT_NAMES) if out is None else out_arrays(out)))
        absent = [name for name in OUT_NAMES if arrays[name] is None]
        self._outputs = _several([name for name in OUT_NAMES if arrays[name] is not None])
        self._no_outputs, self._nones = _several(absent), (None,) * len(absent)
        super().__init__(call, choices, given if out is None else [*given, *self._outputs(out)])
        self._run = AddressedDispatch(structs).run

    def run(
        self, plan: Plan, given: Sequence[Array], inputs_given: Sequence[Array], out: Dispatched | None, stream: Any
    ) -> Dispatched | None:
        """inputs_given: those of `given` by what they are: tokens, topk_idx, scales, topk_weights. None: arrays are not alike."""
        if out is None:
            if not self.alike(*given):
                return None
            out = Dispatched(*self._make())
        else:
            try:
                if self._no_outputs(out) != self._nones or not self.alike(*given, *self._outputs(out)):
                    return None
            except ValueError:  # NumPy compares each element of an array with None
                return None
        pointer = self._pointer
        tokens, topk_idx, scales, topk_weights = inputs_given
        inputs = (
            pointer(tokens),
            0 if topk_idx is None else pointer(topk_idx),
            0 if scales is None else pointer(scales),
            0 if topk_weights is None else pointer(topk_weights),
        )
        stream = self._current_stream() if stream is None else raw_stream(stream)
        status = self._run(plan, inputs, out_addresses(out, pointer), stream)
        if status != 0:
            check(status, out)
        return out


class RepeatedCombine(Repeat):
    def __init__(self, call: CombineCall, structs: Structs, choices: Any, given: Sequence[Array]) -> None:
        super().__init__(call, choices, given)
        self._run = AddressedCombine(structs).run

    def run(self, plan: Plan, given: Sequence[Array], stream: Any) -> Combined:
        """Of arrays that are alike."""
        rows, topk_weights, out = given
        pointer = self._pointer
        if out is None:
            (out,) = self._make()
        addresses = (pointer(rows), 0 if topk_weights is None else pointer(topk_weights), pointer(out))
        stream = self._current_stream() if stream is None else raw_stream(stream)
        status = self._run(plan, addresses, stream)
        if status != 0:
            check(status)
        return _combined((out, None))


class Repeats(Generic[AnyRepeat]):
    """The last repeats of an operation of a plan. One is made when a call comes a second time: it takes as long to make as several calls."""

    def __init__(self, make: Callable[..., AnyRepeat], *plan: Any) -> None:
        """plan: the structs that all its calls fill in."""
        self._make, self._plan = make, plan
        self.kept: collections.deque[AnyRepeat] = collections.deque(maxlen=NUM_KEPT)
        self._seen: collections.deque[Any] = collections.deque(maxlen=NUM_KEPT)

    def see(
        self, call: DispatchCall | CombineCall, choices: Any, given: Sequence[Array], used: Sequence[Any], *out: Any
    ) -> None:
        """A call that was looked at as a whole and is done. used: the arrays that C got, the first of them as the first of those given; copies
        are among them. out: the outputs of a dispatch, None where it makes them."""
        seen = call, choices, tuple(used[0].shape)
        if seen not in self._seen:
            self._seen.append(seen)
            return
        self._seen.remove(seen)
        if {*map(id, given)} <= {*map(id, used)}:
            self.kept.appendleft(self._make(call, Structs(call.args, *self._plan), choices, given, *out))
