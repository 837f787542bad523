# SPDX-License-Identifier: Apache-2.0
"""The argument structs of dispatch and combine, kept for calls of the same kind.

What distinguishes kinds of calls (dtypes, hidden size, choices, which outputs are wanted) is looked at once and filled into a struct;
a further call of that kind sets the pointers and makes the outputs. That is most of what a call costs on the host.
"""

from __future__ import annotations

import ctypes
import functools
import math
import operator
import struct
from typing import Any, Callable, NamedTuple, Sequence

from . import _c
from ._arrays import Array, Arrays
from .errors import InvalidArgumentError
from .results import Dispatched

CHANNELS_PER_SCALE = 128  # of the casts to fp8
DEFAULT_OUTPUTS = {
    _c.Layout.RANK_MAJOR: ("topk_idx", "topk_weights", "expert_counts"),
    _c.Layout.EXPERT_MAJOR: ("topk_weights", "row_expert", "expert_offsets", "expert_counts"),
    _c.Layout.EXPERT_PADDED: ("topk_weights", "expert_counts"),
}
# The fields of Dispatched, and their addresses in the struct, which follow each other in the same order.
OUT_NAMES = tuple(Dispatched.__dataclass_fields__)
_OUT_ADDRESSES = struct.Struct(f"{len(OUT_NAMES)}Q")
_OUT_OFFSET = _c.DispatchArgs.out_tokens.offset
_out_arrays = operator.attrgetter(*OUT_NAMES)


class Shape(NamedTuple):
    """Of a plan's outputs."""

    layout: _c.Layout
    num_ranks: int
    num_local_experts: int
    max_tokens: int
    num_topk: int

    def rows(self, num_rows: int) -> tuple[int, ...]:
        if self.layout == _c.Layout.EXPERT_PADDED:
            return (self.num_local_experts, self.num_ranks * self.max_tokens)
        return (num_rows,)


class DispatchKind(NamedTuple):
    """What calls that share a struct have in common."""

    dtype: Any
    hidden: int
    encoding: _c.Encoding
    scale_order: _c.ScaleOrder
    scale_dtype: Any  # None: no scales
    num_scales: int
    carries_weights: bool
    given: bool  # outputs are the caller's: use_outputs; else make_outputs
    outputs: Sequence[str] | None


class DispatchCall:
    """The struct of one kind of dispatch, and what outputs it makes: name, field, shape behind the rows' or whole, dtype."""

    def __init__(self, arrays: Arrays, shape: Shape, kind: DispatchKind) -> None:
        self.arrays, self.shape, self.kind = arrays, shape, kind
        dtype, units = arrays.element_type(kind.dtype)
        self.args = _c.DispatchArgs(
            dtype=dtype,
            encoding=kind.encoding,
            hidden=kind.hidden * units,
            carry_weights=int(kind.carries_weights),
            out_scale_order=kind.scale_order,
        )
        if kind.scale_dtype is not None:
            item = arrays.dtype_bytes(kind.scale_dtype)
            self.args.scale_bytes, self.args.scale_element_bytes = kind.num_scales * item, item
        self.pointer = ctypes.byref(self.args)
        self.token_item = arrays.dtype_bytes(kind.dtype)
        self._of_rows: list[tuple[str, tuple[int, ...], Any]] = []
        self._fixed: list[tuple[str, tuple[int, ...], Any]] = []
        self._scales = self._arriving_scales()
        self._makers: list[tuple[int, Callable[[], Array]]] = []  # position in OUT_NAMES, and what makes that array
        self._makers_rows, self._has_patterns = -1, False
        wanted = DEFAULT_OUTPUTS[shape.layout] if kind.outputs is None else kind.outputs
        self._add_outputs([name for name in wanted if name not in ("tokens", "scales")])

    def _arriving_scales(self) -> tuple[int, Any]:
        """Number and dtype; dtype None: none arrive."""
        kind, arrays = self.kind, self.arrays
        if kind.encoding == _c.Encoding.AS_GIVEN:
            return kind.num_scales, kind.scale_dtype
        num_scales = -(-kind.hidden // CHANNELS_PER_SCALE)
        return (
            (-(-num_scales // 4), arrays.int32)
            if kind.encoding == _c.Encoding.FP8_UE8M0
            else (num_scales, arrays.float32)
        )

    def _add_outputs(self, wanted: Sequence[str]) -> None:
        arrays, shape = self.arrays, self.shape
        by_expert = shape.layout != _c.Layout.RANK_MAJOR
        casts = self.kind.encoding != _c.Encoding.AS_GIVEN
        self._of_rows.append(("tokens", (self.kind.hidden,), arrays.float8 if casts else self.kind.dtype))
        of_rows: dict[str, tuple[tuple[int, ...], Any]] = {
            "topk_idx": ((shape.num_topk,), arrays.int32),
            "topk_weights": (() if by_expert else (shape.num_topk,), arrays.float32),
            "source_token": ((), arrays.int32),
            "source_rank": ((), arrays.int32),
            "row_expert": ((), arrays.int32),
        }
        fixed: dict[str, tuple[tuple[int, ...], Any]] = {
            "expert_offsets": ((shape.num_local_experts + 1,), arrays.int64),
            "expert_counts": ((shape.num_local_experts,), arrays.int32),
            "rank_counts": ((shape.num_ranks,), arrays.int32),
            "expert_rank_ranges": ((shape.num_local_experts, shape.num_ranks), arrays.int64),
        }
        for name in wanted:
            if name not in of_rows and name not in fixed:
                raise InvalidArgumentError(f"outputs names {name!r}, which is no field of Dispatched")
            if (name == "topk_idx" and shape.num_topk == 0) or (
                name == "topk_weights" and not self.kind.carries_weights
            ):
                continue
            group, table = (self._of_rows, of_rows) if name in of_rows else (self._fixed, fixed)
            group.append((name, *table[name]))

    def make_outputs(self, num_rows: int) -> Dispatched:
        """Fresh arrays, and their addresses in the struct."""
        if num_rows != self._makers_rows or not self._has_patterns:
            self._set_makers(num_rows)
        pointer = self.arrays.pointer
        made: list[Array] = [None] * len(OUT_NAMES)
        addresses = [0] * len(OUT_NAMES)
        for position, make in self._makers:
            made[position] = array = make()
            addresses[position] = pointer(array)
        _OUT_ADDRESSES.pack_into(self.args, _OUT_OFFSET, *addresses)
        return Dispatched(*made)

    def _set_makers(self, num_rows: int) -> None:
        """By patterns from the second call on that has as many rows: making those takes time, and rows may change with every batch."""
        arrays = self.arrays
        self._has_patterns, self._makers_rows = num_rows == self._makers_rows, num_rows
        maker = arrays.pattern if self._has_patterns else functools.partial(functools.partial, arrays.empty)
        rows = self.shape.rows(num_rows)
        shapes = [(name, rows + tail, dtype) for name, tail, dtype in self._of_rows] + self._fixed
        self._makers = [(OUT_NAMES.index(name), maker(shape, dtype)) for name, shape, dtype in shapes]
        num_scales, dtype = self._scales
        if dtype is None:
            return
        if self.kind.scale_order == _c.ScaleOrder.ROW_MAJOR:
            make = maker((*rows, num_scales), dtype)
        else:
            make_transposed = maker((*rows[:-1], num_scales, rows[-1]), dtype)

            def make() -> Array:
                return arrays.transpose(make_transposed())

        self._makers.append((OUT_NAMES.index("scales"), make))

    def use_outputs(self, out: Dispatched) -> None:
        """The caller's arrays; those that are None are not written."""
        pointer = self.arrays.pointer
        addresses = [0 if array is None else pointer(array) for array in _out_arrays(out)]
        _OUT_ADDRESSES.pack_into(self.args, _OUT_OFFSET, *addresses)


# Of a combine, as they follow each other in the struct: topk_weights, row_weights, bias[2], out_tokens, out_topk_weights.
_Addresses = tuple[int, int, int, int, int, int]
_COMBINE_ADDRESSES = struct.Struct("6Q")
_COMBINE_OFFSET = _c.CombineArgs.topk_weights.offset


class CombineKind(NamedTuple):
    dtype: Any
    hidden: int
    mode: _c.CombineMode
    weighting: _c.Weighting
    wire: _c.Wire
    hands_back: bool


class CombineCall:
    """The struct of one kind of combine."""

    def __init__(self, arrays: Arrays, shape: Shape, kind: CombineKind) -> None:
        self.arrays, self.shape, self.kind = arrays, shape, kind
        dtype, units = arrays.element_type(kind.dtype)
        self.args = _c.CombineArgs(
            dtype=dtype,
            mode=kind.mode,
            hidden=kind.hidden * units,
            weighting=kind.weighting,
            wire=kind.wire,
            carry_weights=int(kind.hands_back),
        )
        self.pointer = ctypes.byref(self.args)
        self._num_rows = -1
        self._shapes_of_rows: tuple[tuple[int, ...], ...] = ()  # of as many
        self._num_tokens = -1
        self._make_result: Callable[[], Array] | None = None  # for as many tokens

    def check_rows(self, given: tuple[int, ...], num_rows: int) -> None:
        """The shape of the rows."""
        if num_rows != self._num_rows:
            rows, hidden = self.shape.rows(num_rows), self.kind.hidden
            self._shapes_of_rows, self._num_rows = ((*rows, hidden), (math.prod(rows), hidden)), num_rows
        if given not in self._shapes_of_rows:
            raise InvalidArgumentError(f"rows has shape {list(given)}; it must be {list(self._shapes_of_rows[0])}")

    def make_result(self, num_tokens: int) -> Array:
        """A fresh array; by a pattern, as DispatchCall's."""
        if num_tokens != self._num_tokens:
            self._num_tokens, self._make_result = num_tokens, None
            return self.arrays.empty((num_tokens, self.kind.hidden), self.kind.dtype)
        if self._make_result is None:
            self._make_result = self.arrays.pattern((num_tokens, self.kind.hidden), self.kind.dtype)
        return self._make_result()

    def set_addresses(self, addresses: _Addresses) -> None:
        _COMBINE_ADDRESSES.pack_into(self.args, _COMBINE_OFFSET, *addresses)

    def row_weights(self, given: Any, num_rows: int) -> Array:
        size = math.prod(self.shape.rows(num_rows))
        if self.shape.layout == _c.Layout.RANK_MAJOR:
            size *= self.shape.num_topk
        weights = self.arrays.dense(self.arrays.adopt(given, "row_weights"))
        if weights.dtype != self.arrays.float32 or math.prod(weights.shape) != size:
            raise InvalidArgumentError(
                f"row_weights is {weights.dtype} of shape {list(weights.shape)}; "
                f"it must be float32 with {size} elements, as they came"
            )
        return weights

    def biases(self, given: Any, shape: tuple[int, int]) -> list[Array]:
        several = list(given) if isinstance(given, (tuple, list)) else [given]
        if len(several) > 2:
            raise InvalidArgumentError(f"{len(several)} biases are given; there can be two")
        biases = [self.arrays.dense(self.arrays.adopt(one, "bias")) for one in several if one is not None]
        for one in biases:
            if tuple(one.shape) != shape or one.dtype != self.kind.dtype:
                raise InvalidArgumentError(
                    f"bias is {one.dtype} of shape {list(one.shape)}; it must be {self.kind.dtype} of {list(shape)}"
                )
        return biases
