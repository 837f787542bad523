# SPDX-License-Identifier: Apache-2.0
"""What the rest asks of arrays, for torch tensors and NumPy arrays. Anything else that speaks DLPack becomes one of the two.

Neither torch nor NumPy is imported unless the caller's arrays are theirs.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import sys
from collections.abc import Sequence
from typing import Any, Callable, NamedTuple, TypeVar

from ._c import DType, IndexType
from .errors import InvalidArgumentError, UnsupportedError

Result = TypeVar("Result")
Array = Any  # torch.Tensor or numpy.ndarray

_DTYPES = {
    "bfloat16": DType.BF16,
    "float16": DType.FP16,
    "float32": DType.FP32,
    "float8_e4m3fn": DType.FP8_E4M3,
}
_INDEX_TYPES = {"int64": IndexType.INT64, "int32": IndexType.INT32}


class ArrayKind(NamedTuple):
    """Of a fresh array. transposed: dense but for the last two dimensions, which lie in memory the other way round."""

    shape: tuple[int, ...]
    dtype: Any
    transposed: bool = False


class TorchArrays:
    """torch tensors on one device. Fresh ones come from torch's allocator and belong to the current stream."""

    def __init__(self, cuda_index: int | None) -> None:
        import torch

        self._torch = torch
        self._cuda_index = cuda_index
        self.device = torch.device("cpu") if cuda_index is None else torch.device("cuda", cuda_index)
        self._device_number = -1 if cuda_index is None else cuda_index  # as Tensor.get_device says it
        self._tensor = torch.Tensor
        self._empty, self._empty_like = torch.empty, torch.empty_like
        self._dtypes = {getattr(torch, name): dtype for name, dtype in _DTYPES.items() if hasattr(torch, name)}
        self._index_types = {getattr(torch, name): kind for name, kind in _INDEX_TYPES.items()}
        self.int32, self.int64, self.float32, self.bool = torch.int32, torch.int64, torch.float32, torch.bool
        self.float8 = getattr(torch, "float8_e4m3fn", torch.uint8)
        # Methods of tensors themselves: a call less.
        self.pointer: Callable[[Array], int] = torch.Tensor.data_ptr
        self.dense: Callable[[Array], Array] = torch.Tensor.contiguous
        self.is_dense: Callable[[Array], bool] = torch.Tensor.is_contiguous
        self._guards = tensor_guards(torch)
        self._empty_strided = strided_maker(torch, "cpu" if cuda_index is None else "cuda")
        # The current stream as torch.cuda.current_stream asks for it, without making an object of it.
        self.current_stream: Callable[[], int] = self._current_stream
        raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
        if cuda_index is None:
            self.current_stream = int  # which is 0
        elif raw_stream is not None:
            self.current_stream = functools.partial(raw_stream, cuda_index)

    def owns(self, array: Any) -> bool:
        return isinstance(array, self._tensor)

    def adopt(self, array: Any, name: str) -> Array:
        """The array as a tensor, if it is on this device."""
        if not isinstance(array, self._tensor):
            array = self._torch.utils.dlpack.from_dlpack(array)
        if array.get_device() != self._device_number:
            raise InvalidArgumentError(
                f"{name} is on {array.device}, but the exchange is on {self.device}; move it there"
            )
        return array

    def matrix(self, array: Any, name: str, width: int) -> tuple[Array, int]:
        """Dense, [any, width], and its number of rows."""
        array = self.adopt(array, name).contiguous()
        shape = array.shape  # each look at a tensor costs as much as several lines of Python
        if len(shape) != 2 or shape[1] != width:
            raise InvalidArgumentError(f"{name} has shape {list(shape)}; it must be [num_tokens, {width}]")
        return array, shape[0]

    def rows(self, array: Any, name: str) -> tuple[Array, tuple[int, ...], int]:
        """[any, any], each row dense; its shape; its stride in elements, 0 where that does not matter. Rows that have memory in common are
        copied: C refuses them, and a stride of 0 means dense there."""
        array = self.adopt(array, name)
        shape = array.shape
        if len(shape) != 2:
            raise InvalidArgumentError(f"{name} has shape {list(shape)}; it must be [num_tokens, hidden]")
        stride, step = array.stride()
        if step != 1 or stride < shape[1]:
            array = array.contiguous()
            stride = array.stride()[0]
        return array, shape, stride if shape[0] > 1 else 0

    def strided(self, array: Any, name: str) -> Array:
        """With strides that C takes, which are not 0."""
        array = self.adopt(array, name)
        return array.contiguous() if 0 in array.stride() else array

    def strides(self, array: Array) -> tuple[int, ...]:
        return tuple(array.stride())

    def int32_vector(self, array: Any, name: str, size: int) -> Array:
        array = self.adopt(array, name).contiguous()
        if array.dtype != self.int32 or array.numel() != size:
            raise InvalidArgumentError(
                f"{name} is {array.dtype} of shape {list(array.shape)}; it must be int32 with {size} elements"
            )
        return array

    def element_type(self, dtype: Any) -> tuple[DType, int]:
        return element_type(self._dtypes.get(dtype), self.dtype_bytes(dtype))

    def index_type(self, array: Array) -> IndexType:
        kind = self._index_types.get(array.dtype)
        return refuse_index(array) if kind is None else kind

    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        return self._empty(shape, dtype=dtype, device=self.device)

    def fits(self, array: Any, kind: ArrayKind) -> bool:
        """Whether it can be written to in place of a fresh array."""
        return (
            isinstance(array, self._tensor)
            and array.shape == kind.shape
            and array.dtype == kind.dtype
            and array.device == self.device
            and (array.swapaxes(-1, -2) if kind.transposed else array).is_contiguous()
        )

    def plain(self, kinds: Sequence[ArrayKind | None]) -> Callable[[], list[Array]]:
        """Makes an array of each kind, and None for None."""
        return lambda: [_made(self.empty, kind) for kind in kinds]

    def patterns(self, kinds: Sequence[ArrayKind | None]) -> Callable[[], list[Array]]:
        """`plain` for many times, in a fraction of its time. Takes no memory itself."""
        like_these: list[Array] = []  # tensors without memory of their own
        empty_like = self._empty_like

        def make_like() -> list[Array]:
            if not like_these:
                like_these.extend(self.plain(kinds)())
                for like in like_these:
                    if like is not None:
                        like.untyped_storage().resize_(0)
            return [None if like is None else empty_like(like) for like in like_these]

        make_strided, index = self._empty_strided, self._cuda_index
        if make_strided is None:
            return make_like
        on_meta = functools.partial(self._torch.empty, device="meta")
        made = [_made(lambda shape, dtype: on_meta(shape, dtype=dtype), kind) for kind in kinds]
        described = [None if like is None else (tuple(like.shape), like.stride(), like.dtype) for like in made]
        if index is None:
            return lambda: [None if one is None else make_strided(*one) for one in described]
        current_device = getattr(self._torch._C, "_cuda_getDevice", self._torch.cuda.current_device)

        def make_on_current_device() -> list[Array]:
            if current_device() != index:
                return make_like()
            return [None if one is None else make_strided(*one) for one in described]

        return make_on_current_device

    def dtype_bytes(self, dtype: Any) -> int:
        return int(dtype.itemsize)

    def from_memory(self, owner: Any, shape: Sequence[int], dtype: Any) -> Array:
        torch = self._torch
        if self._cuda_index is None:
            flat = torch.frombuffer(owner, dtype=torch.uint8)
        else:
            flat = torch.as_tensor(owner, device=self.device)
        return flat.view(dtype).view(tuple(shape))

    def _current_stream(self) -> int:
        return int(self._torch.cuda.current_stream(self._cuda_index).cuda_stream)

    def on_stream(self, stream: Any) -> Any:
        """A context in which it is the current one."""
        cuda, handle = self._torch.cuda, raw_stream(stream)
        if not isinstance(stream, cuda.Stream):
            # An ExternalStream of 0 would be any other one.
            stream = cuda.ExternalStream(handle, self.device) if handle else cuda.default_stream(self.device)
        return cuda.stream(stream)

    def alike(self, arrays: Sequence[Array]) -> Callable[..., bool]:
        """Tells of other arrays whether they are like these: types, shapes, strides, dtypes and devices. It keeps none of them. What is no
        array is not alike, nor is an array that comes twice."""
        if self._guards is None:
            return _alike(arrays, _tensor_look)
        check: Callable[..., bool] = self._guards(*arrays, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        return check


class NumpyArrays:
    """NumPy arrays, for CPU ranks. bf16 and fp8 are those of ml_dtypes; without it fp8 comes out as uint8."""

    device = "cpu"

    def __init__(self) -> None:
        import numpy

        self._numpy = numpy
        self.int32, self.int64, self.float32 = numpy.dtype("int32"), numpy.dtype("int64"), numpy.dtype("float32")
        self.bool = numpy.dtype("bool")
        try:
            import ml_dtypes  # type: ignore[import-not-found]

            self.float8 = numpy.dtype(ml_dtypes.float8_e4m3fn)
        except ImportError:
            self.float8 = numpy.dtype("uint8")

    def owns(self, array: Any) -> bool:
        return isinstance(array, self._numpy.ndarray)

    def adopt(self, array: Any, name: str) -> Array:
        if not isinstance(array, self._numpy.ndarray):
            try:
                array = self._numpy.from_dlpack(array)
            except (AttributeError, BufferError, TypeError, RuntimeError) as error:
                raise InvalidArgumentError(f"{name} is not an array in this process's memory: {error}") from error
        if not array.dtype.isnative:
            raise InvalidArgumentError(
                f"{name} has elements of type {array.dtype.str!r}, whose bytes are in another order than this machine's; give "
                'array.astype(array.dtype.newbyteorder("="))'
            )
        return array

    def matrix(self, array: Any, name: str, width: int) -> tuple[Array, int]:
        array = self.dense(self.adopt(array, name))
        if array.ndim != 2 or array.shape[1] != width:
            raise InvalidArgumentError(f"{name} has shape {list(array.shape)}; it must be [num_tokens, {width}]")
        return array, array.shape[0]

    def rows(self, array: Any, name: str) -> tuple[Array, tuple[int, ...], int]:
        array = self.adopt(array, name)
        if array.ndim != 2:
            raise InvalidArgumentError(f"{name} has shape {list(array.shape)}; it must be [num_tokens, hidden]")
        stride, step = array.strides
        apart = (
            stride >= array.shape[1] * step and stride % array.itemsize == 0
        )  # in a record it may be any number of bytes
        if step != array.itemsize or not (apart and array.flags.aligned):
            array = self.dense(array)
        return array, array.shape, array.strides[0] // array.itemsize if array.shape[0] > 1 else 0

    def strided(self, array: Any, name: str) -> Array:
        array = self.adopt(array, name)
        taken = all(stride > 0 and stride % array.itemsize == 0 for stride in array.strides) and array.flags.aligned
        return array if taken else self.dense(array)

    def strides(self, array: Array) -> tuple[int, ...]:
        return tuple(stride // array.itemsize for stride in array.strides)

    def int32_vector(self, array: Any, name: str, size: int) -> Array:
        array = self.dense(self.adopt(array, name))
        if array.dtype != self.int32 or array.size != size:
            raise InvalidArgumentError(
                f"{name} is {array.dtype} of shape {list(array.shape)}; it must be int32 with {size} elements"
            )
        return array

    def pointer(self, array: Array) -> int:
        return int(array.ctypes.data) if array.size else 0

    def dense(self, array: Array) -> Array:
        flags = array.flags
        return array if flags.c_contiguous and flags.aligned else self._numpy.array(array, order="C")

    def is_dense(self, array: Array) -> bool:
        return bool(array.flags.c_contiguous)

    def element_type(self, dtype: Any) -> tuple[DType, int]:
        return element_type(_DTYPES.get(dtype.name), dtype.itemsize)

    def index_type(self, array: Array) -> IndexType:
        kind = _INDEX_TYPES.get(array.dtype.name)
        return refuse_index(array) if kind is None else kind

    def empty(self, shape: Sequence[int], dtype: Any) -> Array:
        return self._numpy.empty(shape, dtype=dtype)

    def fits(self, array: Any, kind: ArrayKind) -> bool:
        return (
            isinstance(array, self._numpy.ndarray)
            and array.shape == kind.shape
            and array.dtype == kind.dtype
            and array.flags.writeable
            and bool((array.swapaxes(-1, -2) if kind.transposed else array).flags.c_contiguous)
        )

    def plain(self, kinds: Sequence[ArrayKind | None]) -> Callable[[], list[Array]]:
        return lambda: [_made(self.empty, kind) for kind in kinds]

    patterns = plain

    def alike(self, arrays: Sequence[Array]) -> Callable[..., bool]:
        return _alike(arrays, operator.attrgetter("shape", "strides", "dtype", "flags.writeable"))

    def dtype_bytes(self, dtype: Any) -> int:
        return int(self._numpy.dtype(dtype).itemsize)

    def from_memory(self, owner: Any, shape: Sequence[int], dtype: Any) -> Array:
        return self._numpy.frombuffer(owner, dtype=self._numpy.uint8).view(dtype).reshape(tuple(shape))

    def current_stream(self) -> int:
        return 0


Arrays = Any  # TorchArrays or NumpyArrays


def require_fit(arrays: Arrays, array: Any, kind: ArrayKind, name: str) -> None:
    """Of an array that is written to: it is what a fresh one would be."""
    if arrays.fits(array, kind):
        return
    found = f"a {type(array).__name__}"
    if hasattr(array, "shape") and hasattr(array, "dtype"):
        found = f"{array.dtype} of shape {list(array.shape)}, {getattr(array, 'device', 'in host memory')}"
        if arrays.owns(array):
            found += f", strides {list(arrays.strides(array))}"
    lies = "by columns" if kind.transposed else "dense"
    raise InvalidArgumentError(
        f"{name} is {found}; it must be {kind.dtype} of shape {list(kind.shape)}, {lies}, writable, and where the exchange is: "
        f"{arrays.device}"
    )


def _made(empty: Callable[[Sequence[int], Any], Array], kind: ArrayKind | None) -> Array | None:
    if kind is None:
        return None
    if not kind.transposed:
        return empty(kind.shape, kind.dtype)
    *outer, rows, columns = kind.shape
    return empty((*outer, columns, rows), kind.dtype).swapaxes(-1, -2)


def _alike(arrays: Sequence[Array], look: Callable[[Array], Any]) -> Callable[..., bool]:
    types, looks = [*map(type, arrays)], [*map(look, arrays)]
    return lambda *others: [*map(type, others)] == types and [*map(look, others)] == looks


def _tensor_look(tensor: Any) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


# What torch.compile uses is no public interface: so it is tried first, and None says that it is not there, or is not as known.


def tensor_guards(torch: Any) -> Any:
    """What compares tensors with others: all of them in one call, in a third of the time that Python takes."""
    options: dict[str, Any] = {"device": "cpu", "dtype": torch.int32}
    one = torch.empty((2, 4), **options)
    others = [
        one.view(torch.float32),
        one[:, :2],
        one.reshape(4, 2),
        one.reshape(2, 4, 1),
        one.reshape(4, 2).t(),
        torch.empty_strided((2, 4), (8, 1), **options),
        torch.empty((2, 4), device="meta", dtype=torch.int32),
        None,
    ]
    try:
        guards = torch._C._dynamo.guards.TensorGuards
        check = guards(one, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
        return guards if check(one) and check(one.clone()) and not any(map(check, others)) else None
    except Exception:  # noqa: BLE001, whatever it is, it is not as known
        return None


def strided_maker(torch: Any, kind: str) -> Any:
    """What makes a tensor of a shape, strides and a dtype without torch's dispatcher: in half the time. On GPUs it knows the current device
    alone; it is tried on the CPU."""
    try:
        guards = torch._C._dynamo.guards
        one = guards._empty_strided_cpu((2, 3), (1, 2), torch.int16)
        as_known = _tensor_look(one) == ((2, 3), (1, 2), torch.int16, torch.device("cpu"))
        return getattr(guards, f"_empty_strided_{kind}") if as_known else None
    except Exception:  # noqa: BLE001
        return None


def element_type(dtype: DType | None, item_bytes: int) -> tuple[DType, int]:
    """The tern_dtype, and how many of its units an element is: types that Tern does not know travel as bytes."""
    return (DType.BYTES, item_bytes) if dtype is None else (dtype, 1)


def refuse_index(array: Array) -> IndexType:
    raise InvalidArgumentError(f"topk_idx has elements of type {array.dtype}; they must be int64 or int32")


class ArraysOfDevice:
    """Chooses between the two for what a caller gives, on the device of one exchange."""

    def __init__(self, cuda_index: int | None) -> None:
        self._cuda_index = cuda_index
        self._torch: TorchArrays | None = None
        self._numpy: NumpyArrays | None = None

    def of(self, array: Any) -> Arrays:
        torch_arrays = self._torch
        if torch_arrays is not None and torch_arrays.owns(array):
            return torch_arrays
        if type(array).__module__.partition(".")[0] == "numpy":
            return self.numpy()
        if "torch" in sys.modules or self._cuda_index is not None:
            return self.torch()
        if hasattr(array, "__dlpack__"):
            return self.numpy()
        raise InvalidArgumentError(
            f"{type(array).__name__} is no array: give a torch tensor, a NumPy array, or one with __dlpack__"
        )

    def is_elsewhere(self, stream: Any) -> bool:
        """Whether `stream` is not torch's current one."""
        return self._cuda_index is not None and raw_stream(stream) != self.torch().current_stream()

    def call_on_stream(self, method: Callable[..., Result], given: dict[str, Any]) -> Result:
        """Calls it where given["stream"] is torch's current one: what it makes and copies belongs to that. given: locals() of the method."""
        stream = given.pop("stream")
        given.update(given.pop("arguments", {}))
        with self.torch().on_stream(stream):
            return method(**given)

    def of_dtype(self, dtype: Any) -> Arrays:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(dtype, torch.dtype):
            return self.torch()
        return self.numpy()

    def torch(self) -> TorchArrays:
        if self._torch is None:
            self._torch = TorchArrays(self._cuda_index)
        return self._torch

    def numpy(self) -> NumpyArrays:
        if self._cuda_index is not None:
            raise UnsupportedError("NumPy arrays are in host memory, but this exchange is on a GPU; give torch tensors")
        if self._numpy is None:
            self._numpy = NumpyArrays()
        return self._numpy


def raw_stream(stream: Any) -> int:
    """Of a torch.cuda.Stream, or the handle itself."""
    return int(getattr(stream, "cuda_stream", stream))


class GpuMemory:
    """Bytes in a window on a GPU, for torch to make a tensor of."""

    def __init__(self, pointer: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


def memory_at(pointer: int, num_bytes: int, on_gpu: bool) -> Any:
    """An object that torch and NumPy make arrays of. It lives as long as the last of them, and has a weak reference to tell when."""
    if on_gpu:
        return GpuMemory(pointer, num_bytes)
    kind: Any = type("HostMemory", (ctypes.c_uint8 * num_bytes,), {})
    return kind.from_address(pointer)
