# SPDX-License-Identifier: Apache-2.0
"""Events, by which other streams wait for an operation. On CPU ranks an operation is done when its call returns, and so
are its events."""

from __future__ import annotations

from typing import Any, Optional

import torch


class EventHandle:
    """A point on torch's current CUDA stream (or on `stream`). Complete at once in a process that does not use CUDA."""

    def __init__(self, stream: Any = None) -> None:
        cuda: Any = torch.cuda
        self.event: Any = None
        if cuda.is_initialized():
            self.event = cuda.Event()
            self.event.record(cuda.current_stream() if stream is None else stream)

    def current_stream_wait(self) -> None:
        """What is put on torch's current stream from now on runs behind the event."""
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class EventOverlap:
    """An event with the tensors that must live until it; also a context manager, that waits at its end.

    event: None where the caller's stream is ordered after the operation already; waiting for it is nothing then.
    """

    def __init__(
        self, event: Optional[EventHandle] = None, extra_tensors: Optional[tuple[torch.Tensor, ...]] = None
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        if self.event is not None:
            self.event.current_stream_wait()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(self, *_: Any) -> None:
        self.current_stream_wait()
