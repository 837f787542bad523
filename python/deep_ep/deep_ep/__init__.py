# SPDX-License-Identifier: Apache-2.0
"""The interface of `deep_ep` (version 1), over Tern: on GPUs, and on CPUs too. docs/from_deepep.md says what
differs."""

from tern import __version__

from .buffer import Buffer, topk_idx_t
from .config import Config
from .events import EventHandle, EventOverlap

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "__version__", "topk_idx_t"]
