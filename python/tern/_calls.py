# SPDX-License-Identifier: Apache-2.0
"""The argument structs of dispatch and combine, kept for calls of the same kind.

What distinguishes kinds of calls (dtypes, hidden size, choices, which outputs are wanted) is looked at once and filled into a struct;
a further call of that kind sets the pointers and makes the outputs. Calls that look the same altogether take a way that is shorter still:
_repeats.py.
"""

from __future__ import annotations

import ctypes
import math
import operator
import struct
from typing import Any, Callable, NamedTuple, Sequence

from . import _c
from ._arrays import Array, ArrayKind, Arrays, require_fit
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
OUT_ADDRESSES = struct.Struct(f"{len(OUT_NAMES)}Q")
OUT_OFFSET = _c.DispatchArgs.out_tokens.offset


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


class OutputMaker:
    """Makes arrays: by patterns from the second time in a row on that a size wants them, since those take time to make, and sizes may
    change with every batch."""

    def __init__(self, arrays: Arrays) -> None:
        self._arrays = arrays
        self._size, self._has_patterns = -1, False
        self.make_again: Callable[[], list[Array]] = list  # of the last size

    def make(self, size: int, kinds: Callable[[int], list[ArrayKind | None]]) -> list[Array]:
        """Of the kinds that the size wants; None stays None."""
        if size != self._size or not self._has_patterns:
            self._size, self._has_patterns = size, size == self._size
            make = self._arrays.patterns if self._has_patterns else self._arrays.plain
            self.make_again = make(kinds(size))
        return self.make_again()


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
        self._scales = self._arriving_scales()
        self._of_rows, self._fixed = self._all_outputs()
        self._wanted = self._made_outputs(DEFAULT_OUTPUTS[shape.layout] if kind.outputs is None else kind.outputs)
        self.maker = OutputMaker(arrays)
        self._given_kinds: tuple[int, list[ArrayKind | None]] = (-1, [])  # of the last number of rows

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

    def _all_outputs(self) -> tuple[dict[str, tuple[tuple[int, ...], Any]], dict[str, tuple[tuple[int, ...], Any]]]:
        """Of the fields of Dispatched but scales: the shape behind the rows' and the dtype; shape and dtype of those that are not of rows."""
        arrays, shape = self.arrays, self.shape
        by_expert = shape.layout != _c.Layout.RANK_MAJOR
        casts = self.kind.encoding != _c.Encoding.AS_GIVEN
        of_rows: dict[str, tuple[tuple[int, ...], Any]] = {
            "tokens": ((self.kind.hidden,), arrays.float8 if casts else self.kind.dtype),
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
        return of_rows, fixed

    def _made_outputs(self, wanted: Sequence[str]) -> set[str]:
        """The fields that make_outputs makes."""
        lacking = {"topk_idx"} if self.shape.num_topk == 0 else set()
        lacking |= set() if self.kind.carries_weights else {"topk_weights"}
        for name in wanted:
            if name not in OUT_NAMES:
                raise InvalidArgumentError(f"outputs names {name!r}, which is no field of Dispatched")
        return {"tokens", "scales", *wanted} - lacking

    def make_outputs(self, num_rows: int) -> Dispatched:
        """Fresh arrays, and their addresses in the struct."""
        made = Dispatched(*self.maker.make(num_rows, self._kinds))
        set_outputs(self.args, out_addresses(made, self.arrays.pointer))
        return made

    def _kinds(self, num_rows: int) -> list[ArrayKind | None]:
        """Of all fields of Dispatched; None: stays None."""
        return [kind if name in self._wanted else None for name, kind in zip(OUT_NAMES, self._all_kinds(num_rows))]

    def _all_kinds(self, num_rows: int) -> list[ArrayKind | None]:
        """Of all fields of Dispatched; None: scales that do not arrive."""
        rows = self.shape.rows(num_rows)
        kinds = {name: ArrayKind(rows + tail, dtype) for name, (tail, dtype) in self._of_rows.items()}
        kinds.update({name: ArrayKind(*whole) for name, whole in self._fixed.items()})
        num_scales, dtype = self._scales
        if dtype is not None:
            by_column = self.kind.scale_order != _c.ScaleOrder.ROW_MAJOR
            kinds["scales"] = ArrayKind((*rows, num_scales), dtype, transposed=by_column)
        return [kinds.get(name) for name in OUT_NAMES]

    def use_outputs(self, out: Dispatched, num_rows: int) -> None:
        """The caller's arrays; those that are None are not written."""
        if self._given_kinds[0] != num_rows:
            self._given_kinds = num_rows, self._all_kinds(num_rows)
        for name, array, kind in zip(OUT_NAMES, out_arrays(out), self._given_kinds[1]):
            if array is not None and kind is not None:
                require_fit(self.arrays, array, kind, f"out.{name}")
        set_outputs(self.args, out_addresses(out, self.arrays.pointer))


def set_outputs(args: _c.DispatchArgs, addresses: Sequence[int]) -> None:
    OUT_ADDRESSES.pack_into(args, OUT_OFFSET, *addresses)


out_arrays: Callable[[Dispatched], tuple[Array | None, ...]] = operator.attrgetter(*OUT_NAMES)


def out_addresses(out: Dispatched, address: Callable[[Array], int]) -> tuple[int, ...]:
    """In the order of OUT_NAMES. Written out: a loop over the names takes twice as long, and this is done at every call."""
    tokens, scales, topk_idx, topk_weights = out.tokens, out.scales, out.topk_idx, out.topk_weights
    source_token, source_rank, row_expert = out.source_token, out.source_rank, out.row_expert
    offsets, counts = out.expert_offsets, out.expert_counts
    rank_counts, ranges = out.rank_counts, out.expert_rank_ranges
    return (
        0 if tokens is None else address(tokens),
        0 if scales is None else address(scales),
        0 if topk_idx is None else address(topk_idx),
        0 if topk_weights is None else address(topk_weights),
        0 if source_token is None else address(source_token),
        0 if source_rank is None else address(source_rank),
        0 if row_expert is None else address(row_expert),
        0 if offsets is None else address(offsets),
        0 if counts is None else address(counts),
        0 if rank_counts is None else address(rank_counts),
        0 if ranges is None else address(ranges),
    )


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
        self.maker = OutputMaker(arrays)

    def check_rows(self, given: tuple[int, ...], num_rows: int) -> None:
        """The shape of the rows."""
        if num_rows != self._num_rows:
            rows, hidden = self.shape.rows(num_rows), self.kind.hidden
            self._shapes_of_rows, self._num_rows = ((*rows, hidden), (math.prod(rows), hidden)), num_rows
        if given not in self._shapes_of_rows:
            raise InvalidArgumentError(f"rows has shape {list(given)}; it must be {list(self._shapes_of_rows[0])}")

    def make_result(self, num_tokens: int) -> Array:
        return self.maker.make(num_tokens, self._kinds)[0]

    def use_result(self, out: Array, num_tokens: int) -> Array:
        """The caller's array."""
        require_fit(self.arrays, out, ArrayKind((num_tokens, self.kind.hidden), self.kind.dtype), "out")
        return out

    def _kinds(self, num_tokens: int) -> list[ArrayKind | None]:
        return [ArrayKind((num_tokens, self.kind.hidden), self.kind.dtype)]

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
