# SPDX-License-Identifier: Apache-2.0
"""Tern: expert-parallel communication for Mixture-of-Experts models.

    group = tern.Group.from_torch()                       # or from_env, from_mpi, local
    exchange = tern.Exchange(group, max_tokens=4096, max_row_bytes=2 * hidden, max_topk=8, max_experts=256)
    plan = exchange.plan(max_tokens=4096, num_experts=256, num_topk=8, layout="expert_major")

    plan.route(topk_idx)                                  # where every token goes
    arrived = plan.dispatch(x, topk_weights=weights)      # tokens to the ranks of their experts
    rows = experts(arrived.tokens, arrived.expert_offsets)
    y = plan.combine(rows, weighting="dispatch").tokens   # results back, summed

On CPU ranks a call returns when it is done; on GPU ranks it runs on torch's current stream. What goes wrong raises tern.Error, with a
text that says what was asked, what was found and what to do; no wait is without a deadline.
"""

from ._c import (
    Awaited,
    CombineMode,
    Encoding,
    Extent,
    Health,
    Layout,
    Mode,
    Operation,
    Phase,
    ScaleOrder,
    SpanKind,
    Status,
    TimeoutPolicy,
    Weighting,
    Wire,
)
from ._library import lib as _lib
from .errors import (
    AbortedError,
    CapacityExceededError,
    Error,
    InternalError,
    InvalidArgumentError,
    InvalidStateError,
    MaskedOutError,
    MismatchError,
    OutOfMemoryError,
    StalePlanError,
    SystemError,
    TimeoutError,
    UnsupportedError,
)
from .exchange import Exchange, Failure, MemoryInfo, State
from .group import Group
from .plan import Plan
from .profile import Profile, Span, merge_traces, profile
from .results import Combined, Dispatched, Pending, PlanInfo, Prepared, RoutingCounts

__version__ = f"{_lib.tern_version() // 10000}.{_lib.tern_version() // 100 % 100}.{_lib.tern_version() % 100}"

__all__ = [
    "AbortedError",
    "Awaited",
    "CapacityExceededError",
    "CombineMode",
    "Combined",
    "Dispatched",
    "Encoding",
    "Error",
    "Exchange",
    "Extent",
    "Failure",
    "Group",
    "Health",
    "InternalError",
    "InvalidArgumentError",
    "InvalidStateError",
    "Layout",
    "MaskedOutError",
    "MemoryInfo",
    "MismatchError",
    "Mode",
    "Operation",
    "OutOfMemoryError",
    "Pending",
    "Phase",
    "Plan",
    "PlanInfo",
    "Prepared",
    "Profile",
    "RoutingCounts",
    "ScaleOrder",
    "Span",
    "SpanKind",
    "StalePlanError",
    "State",
    "Status",
    "SystemError",
    "TimeoutError",
    "TimeoutPolicy",
    "UnsupportedError",
    "Weighting",
    "Wire",
    "__version__",
    "merge_traces",
    "profile",
]
