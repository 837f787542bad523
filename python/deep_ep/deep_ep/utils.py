# SPDX-License-Identifier: Apache-2.0
"""Where some callers import the events from."""

from .events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
