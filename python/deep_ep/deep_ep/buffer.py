# SPDX-License-Identifier: Apache-2.0
"""Buffer, the object that frameworks hold: it checks what it is asked and hands it to one of its two modes."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Optional, Sequence, Union

import tern
import torch

from . import sizes
from .arguments import Cast, Finish, Hook, Stats
from .config import Config
from .events import EventHandle, EventOverlap
from .handles import Handle, LowLatencyHandle, Shape
from .layout import dispatch_layout
from .low_latency import LowLatencyMode
from .nodes import Nodes
from .normal import Batch, NormalMode, Rows
from .streams import LOCAL, CudaStreams, HostStreams, Order

topk_idx_t = torch.int64

DEVICE_VARIABLE = "TERN_DEEP_EP_DEVICE"
# Unless TERN_TIMEOUT_MS says otherwise: ranks of a framework may be far apart when they start.
_TIMEOUT_MS = 100_000


class Buffer:
    """Dispatch and combine for the ranks of a group, over Tern. R ranks, T tokens of this rank, E experts, E_l = E / R,
    K top-k, H hidden.

    group: a torch ProcessGroup of any backend; or None, with comm, an mpi4py-like communicator.
    num_nvl_bytes: memory for normal mode (0: none); Config.get_nvl_buffer_size_hint. Equal on all ranks.
    num_rdma_bytes: with low_latency_mode, memory for that mode; get_low_latency_rdma_size_hint. Without it, memory of
        normal mode for what crosses the network; Config.get_rdma_buffer_size_hint. Where there is none for it, half of
        num_nvl_bytes is for the network. Equal on all ranks.
    explicitly_destroy: `destroy` may be called; otherwise memory goes back with the object and its last handle.
    enable_shrink: in low-latency mode a rank that does not come is left out instead of raising.
    num_qps_per_rank, allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric: accepted; they mean nothing here.

    Making a Buffer is collective; dropping one never is. Ranks are on GPUs if torch has any (torch's current device),
    else on CPUs; TERN_DEEP_EP_DEVICE ("cuda" or "cpu") says otherwise. A host is a node, unless TERN_RANKS_PER_NODE
    says how many ranks are one. Tensors are on the Buffer's device. Errors are RuntimeErrors. Every wait ends at a
    deadline: TERN_TIMEOUT_MS.

    In normal mode one thread at a time calls; in low-latency mode two threads may, if dispatches come in the same order
    on all ranks. On GPUs each of the two has a current stream of its own: on one stream, ranks whose threads take turns
    in another order would wait for each other; so they would on streams that share a queue of the GPU, of which there
    are enough with CUDA_DEVICE_MAX_CONNECTIONS=32.
    """

    num_sms: ClassVar[int] = 20

    def __init__(
        self,
        group: Any,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        if group is None and comm is None:
            raise tern.InvalidArgumentError(
                "Buffer: give a ProcessGroup as group, or an mpi4py-like communicator as comm"
            )
        if enable_shrink and not low_latency_mode:
            raise tern.InvalidArgumentError("Buffer: enable_shrink needs low_latency_mode=True")
        self.group = group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.explicitly_destroy = low_latency_mode, explicitly_destroy
        self.enable_shrink = enable_shrink
        timeout_ms = 0 if os.environ.get("TERN_TIMEOUT_MS") else _TIMEOUT_MS
        if group is None:
            ranks = tern.Group.from_mpi(comm, timeout_ms=timeout_ms)
        else:
            ranks = tern.Group.from_torch(group, timeout_ms=timeout_ms)
        self.rank, self.group_size = ranks.rank, ranks.num_ranks
        self._nodes = Nodes.of_group(ranks)
        kind = _device_kind()
        self._device = torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device("cpu")
        self._streams: Any = HostStreams() if self._device.type == "cpu" else CudaStreams(self._device, num_lanes=2)
        self._normal: Optional[NormalMode] = None
        self._low_latency: Optional[LowLatencyMode] = None
        if num_nvl_bytes > 0:
            num_network_bytes = 0 if low_latency_mode else num_rdma_bytes
            self._normal = NormalMode(
                ranks, self._streams, self._device, num_nvl_bytes, timeout_ms, num_network_bytes=num_network_bytes
            )
        if low_latency_mode and num_rdma_bytes > 0:
            self._low_latency = LowLatencyMode(
                ranks, self._streams, self._device, num_rdma_bytes, timeout_ms, masks=enable_shrink
            )
        self._local: dict[bool, torch.Tensor] = {}
        self._is_destroyed = False

    def destroy(self) -> None:
        """Gives the memory back, once handles and zero-copy buffers are gone too. Not collective; a second call does
        nothing."""
        if not self.explicitly_destroy:
            raise tern.InvalidStateError(
                "destroy: the Buffer was made without explicitly_destroy=True; drop it instead"
            )
        self._normal = self._low_latency = None
        self._local.clear()
        self._is_destroyed = True

    # ---------------------------------------------------------------------------------------------------------- static

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """SMs of operations in normal mode whose Config does not say; even."""
        if new_num_sms <= 0 or new_num_sms % 2 != 0:
            raise tern.InvalidArgumentError(f"set_num_sms: {new_num_sms} is given; it must be positive and even")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Nothing is left out of this build: the features that this stands for elsewhere are there on every GPU, and on
        CPUs."""
        return True

    @staticmethod
    def capture() -> EventOverlap:
        """An event on torch's current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes for num_rdma_bytes, with which these shapes fit, hooks and zero-copy included; with as many nodes as
        Config's hints take for granted."""
        nodes = Nodes.expected(num_ranks)
        return sizes.low_latency_hint(num_max_dispatch_tokens_per_rank, hidden, nodes, num_experts)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """For any number of ranks the same: nothing here depends on it."""
        return Config(num_sms=Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        return Config(num_sms=Buffer.num_sms)

    # ---------------------------------------------------------------------------------------------------------- memory

    def get_comm_stream(self) -> Any:
        """The torch.cuda.Stream of operations in normal mode; on CPU ranks a torch.cpu.Stream, which means nothing."""
        return self._streams.comm_stream

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: Optional[Sequence[int]] = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> torch.Tensor:
        """Memory of num_nvl_bytes (or num_rdma_bytes) from byte `offset` on, flat or of shape `size`, for the caller to
        use or zero.

        Nothing of an operation ever lies in it. It is allocated at the first call, and stays until the Buffer goes.
        """
        self._require_alive()
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        name = "num_rdma_bytes" if use_rdma_buffer else "num_nvl_bytes"
        shape = None if size is None else (size,) if isinstance(size, int) else tuple(size)
        item_bytes = dtype.itemsize
        count = (num_bytes - offset) // item_bytes if shape is None else torch.Size(shape).numel()
        if offset < 0 or offset % item_bytes != 0 or offset + count * item_bytes > num_bytes or offset > num_bytes:
            raise tern.InvalidArgumentError(
                f"get_local_buffer_tensor: {count} elements of {dtype} at byte {offset} do not lie, aligned, in {name} "
                f"= {num_bytes} bytes"
            )
        if use_rdma_buffer not in self._local:
            self._local[use_rdma_buffer] = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        flat = self._local[use_rdma_buffer][offset : offset + count * item_bytes].view(dtype)
        return flat if shape is None else flat.view(shape)

    # ----------------------------------------------------------------------------------------------------- normal mode

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor, torch.Tensor, EventOverlap]:
        """Counts of a routing, without any communication.

        Returns num_tokens_per_rank i32 [R], num_tokens_per_rdma_rank i32 [nodes] (tokens that go to any rank of a node;
        None inside one node), num_tokens_per_expert i32 [E], is_token_in_rank bool [T, R], event.
        """
        self._require_alive()
        mode = self._normal or self._low_latency
        if mode is None:
            raise tern.InvalidStateError(
                "get_dispatch_layout: the Buffer has neither num_nvl_bytes nor a low-latency mode"
            )
        if topk_idx.device != self._device:
            raise tern.InvalidArgumentError(
                f"get_dispatch_layout: topk_idx is on {topk_idx.device}, but the Buffer is on {self._device}; move it "
                f"there, or set {DEVICE_VARIABLE}"
            )
        with self._streams.run(Order(previous_event, async_finish, allocate_on_comm_stream), LOCAL) as work:
            counts: Any = dispatch_layout(mode.exchange, topk_idx, num_experts)
            work.inputs.append(topk_idx)
            work.outputs += counts
        return (
            counts.tokens_per_rank,
            counts.tokens_per_node,
            counts.tokens_per_expert,
            counts.token_in_rank,
            work.overlap(),
        )

    def dispatch(
        self,
        x: Rows,
        handle: Optional[tuple[Any, ...]] = None,
        num_tokens_per_rank: Optional[torch.Tensor] = None,
        num_tokens_per_rdma_rank: Optional[torch.Tensor] = None,
        is_token_in_rank: Optional[torch.Tensor] = None,
        num_tokens_per_expert: Optional[torch.Tensor] = None,
        topk_idx: Optional[torch.Tensor] = None,
        topk_weights: Optional[torch.Tensor] = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Optional[Config] = None,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[
        Rows, Optional[torch.Tensor], Optional[torch.Tensor], Optional[list[int]], Optional[Handle], EventOverlap
    ]:
        """Sends tokens to the ranks of their experts, one row for each token and rank. Collective.

        x: [T, H], rows multiples of 16 bytes, or (rows, scales [T, any number] of any strides).
        handle: routes as the dispatch that returned it; then nothing else about the routing is given.
        num_tokens_per_expert: i32 [E], always given without a handle. topk_idx [T, K] and topk_weights f32 [T, K], or
            is_token_in_rank
            alone, say where tokens go. num_tokens_per_rank and num_tokens_per_rdma_rank follow from them and are not
            looked at.
        num_worst_tokens: outputs have that many rows and the host waits for nothing (it can be captured in a CUDA
            graph).

        Returns recv_x, recv_topk_idx i64 [N, K] (local experts, -1 where there is none), recv_topk_weights f32 [N, K],
        num_recv_tokens_per_expert_list (rounded up to expert_alignment; empty with num_worst_tokens), handle, event.
        The handle has 6 elements inside one node and 10 between nodes; handles.py says what they are.
        """
        normal = self._require_normal("dispatch")
        order = Order(previous_event, async_finish, allocate_on_comm_stream)
        num_sms = (config or Config(num_sms=Buffer.num_sms)).num_sms
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise tern.InvalidArgumentError(
                    "dispatch: a handle and topk_idx or topk_weights are given; the handle has the routing already"
                )
            return normal.dispatch_again(x, handle, order, num_sms)
        batch = Batch(
            topk_idx,
            topk_weights,
            is_token_in_rank,
            num_tokens_per_expert,
            expert_alignment,
            num_worst_tokens,
            num_tokens_per_rdma_rank,
        )
        return normal.dispatch(x, batch, order, num_sms)

    def combine(
        self,
        x: torch.Tensor,
        handle: tuple[Any, ...],
        topk_weights: Optional[torch.Tensor] = None,
        bias: Union[torch.Tensor, tuple[torch.Tensor, ...], None] = None,
        config: Optional[Config] = None,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, Optional[torch.Tensor], EventOverlap]:
        """The sum of each token's rows, not weighted, after `bias` (one [T, H] or two). Collective.

        x: bf16 (or fp16, fp32) [N, H], rows as the dispatch brought them. topk_weights f32 [N, K] are summed back to
            [T, K].
        Returns combined_x [T, H], combined_topk_weights or None, event.
        """
        normal = self._require_normal("combine")
        order = Order(previous_event, async_finish, allocate_on_comm_stream)
        num_sms = (config or Config(num_sms=Buffer.num_sms)).num_sms
        return normal.combine(x, handle, topk_weights, bias, order, num_sms)

    # ----------------------------------------------------------------------------------------------------- low latency

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Nothing needs cleaning: flags only ever grow, and no mode uses the other's memory."""
        self._require_low_latency("clean_low_latency_buffer")

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: Optional[torch.Tensor] = None,
        dispatch_wait_recv_cost_stats: Optional[torch.Tensor] = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[
        Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]],
        torch.Tensor,
        LowLatencyHandle,
        EventOverlap,
        Optional[Hook],
    ]:
        """Sends tokens [T, H] to their experts. Collective; nothing waits on the host of a GPU rank.

        Returns recv_x [E_l, R * max, H], bf16 or (fp8, scales: last two dimensions column-major), recv_count i32 [E_l],
        handle, event, hook. With return_recv_hook, what is returned holds once hook() has run, on the stream that is
        current now. At most two results may be alive. cumulative_local_expert_recv_stats i32 [E_l] has recv_count added,
        dispatch_wait_recv_cost_stats i64 [R] the nanoseconds waited for each rank.
        """
        mode = self._low_latency or self._require_low_latency("low_latency_dispatch")
        has_stats = cumulative_local_expert_recv_stats is not None or dispatch_wait_recv_cost_stats is not None
        choices = (
            num_max_dispatch_tokens_per_rank,
            num_experts,
            use_fp8,
            round_scale,
            use_ue8m0,
            async_finish,
            return_recv_hook,
            has_stats,
        )
        repeated: Any = mode.dispatch_again(choices, x, topk_idx)
        if repeated is not None:
            return repeated  # type: ignore[no-any-return]
        arrived = mode.dispatch(
            x,
            topk_idx,
            Shape(num_max_dispatch_tokens_per_rank, x.shape[-1], num_experts),
            Cast(use_fp8, round_scale, use_ue8m0),
            Finish(async_finish, return_recv_hook),
            Stats(cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats),
        )
        mode.see_dispatch(choices, x, topk_idx, arrived)
        return arrived[:]

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: LowLatencyHandle,
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Optional[torch.Tensor] = None,
        combine_wait_recv_cost_stats: Optional[torch.Tensor] = None,
    ) -> tuple[torch.Tensor, EventOverlap, Optional[Hook]]:
        """The weighted sum of the experts' rows [E_l, R * max, H], bf16. Collective.

        topk_idx, topk_weights f32 [T, K]: of this rank's tokens, as dispatched. zero_copy: the rows are those in
        get_next_low_latency_combine_buffer(handle). use_logfmt: rows travel as 10-bit logarithms.
        combine_wait_recv_cost_stats i64 [R] has the nanoseconds waited for each rank added.
        TERN_DEEP_EP_COMBINE: "hierarchical" sums on the experts' ranks first, which need the weights before they send;
            "exact" sends
        every expert's row; "auto" (default) is exact with a hook where that fits the buffer, else hierarchical.

        Returns combined_x bf16 [T, H] (`out` if given), event, hook.
        """
        mode = self._low_latency or self._require_low_latency("low_latency_combine")
        has_stats = combine_wait_recv_cost_stats is not None
        choices = (use_logfmt, zero_copy, async_finish, return_recv_hook, out is not None, has_stats)
        tensors = (x, topk_idx, topk_weights) if out is None else (x, topk_idx, topk_weights, out)
        repeated: Any = mode.combine_again(choices, tensors, handle)
        if repeated is not None:
            return repeated  # type: ignore[no-any-return]
        if use_logfmt and zero_copy:
            raise tern.InvalidArgumentError(
                "low_latency_combine: use_logfmt and zero_copy exclude each other; both are set"
            )
        combined = mode.combine(
            x,
            topk_idx,
            topk_weights,
            handle,
            Finish(async_finish, return_recv_hook),
            zero_copy=zero_copy,
            use_logfmt=use_logfmt,
            out=out,
            wait_stats=combine_wait_recv_cost_stats,
        )
        mode.see_combine(choices, tensors, handle, combined)
        return combined[:]

    def get_next_low_latency_combine_buffer(self, handle: LowLatencyHandle) -> torch.Tensor:
        """bf16 [E_l, R * max, H], shared memory to write the experts' output into before
        low_latency_combine(zero_copy=True)."""
        return self._require_low_latency("get_next_low_latency_combine_buffer").next_combine_buffer(handle)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leaves a rank out, from the next low_latency_dispatch on; all ranks that go on say so before it. With
        mask=False for a rank that is left out already: as low_latency_clean_mask_buffer."""
        self._require_low_latency("low_latency_update_mask_buffer").update_mask(rank_to_mask, mask)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Writes 1 for each rank that is left out, 0 for the others, to i32 [R]."""
        self._require_low_latency("low_latency_query_mask_buffer").query_mask(mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Forgets ranks that were to be masked. If some are masked already, the next low_latency_dispatch lets those of them in
        again that call this and dispatch too; it waits for them, and goes on without those that do not come in time.
        All ranks that go on call it before the same dispatch."""
        self._require_low_latency("low_latency_clean_mask_buffer").clean_mask()

    # ---------------------------------------------------------------------------------------------------------- common

    def _require_alive(self) -> None:
        if self._is_destroyed:
            raise tern.InvalidStateError("the Buffer is destroyed")

    def _require_normal(self, operation: str) -> NormalMode:
        self._require_alive()
        if self._normal is None:
            raise tern.InvalidStateError(
                f"{operation}: the Buffer has num_nvl_bytes = 0; make it with what Config.get_nvl_buffer_size_hint says"
            )
        return self._normal

    def _require_low_latency(self, operation: str) -> LowLatencyMode:
        self._require_alive()
        if self._low_latency is None:
            raise tern.InvalidStateError(
                f"{operation}: the Buffer has low_latency_mode = {self.low_latency_mode} and num_rdma_bytes = "
                f"{self.num_rdma_bytes}; make it "
                "with low_latency_mode=True and what Buffer.get_low_latency_rdma_size_hint says"
            )
        return self._low_latency


def _device_kind() -> str:
    kind = os.environ.get(DEVICE_VARIABLE) or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cuda", "cpu"):
        raise tern.InvalidArgumentError(f"{DEVICE_VARIABLE} is {kind!r}; it must be 'cuda' or 'cpu'")
    return kind
