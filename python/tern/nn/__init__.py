# SPDX-License-Identifier: Apache-2.0
"""Dispatch and combine for training: differentiable, and custom ops that torch.compile traces through.

    plans = tern.nn.PlanPool(exchange, max_tokens=4096, num_experts=64, num_topk=2)
    layer = tern.nn.MoELayer(plans, hidden=1024, ffn_hidden=2048)      # router, this rank's experts, dispatch, combine
    y, balance_loss = layer(x)

or, with experts of your own:

    routing = plans.route(topk_idx)
    arrived = tern.nn.moe_dispatch(tokens, routing, topk_weights)
    rows = experts(arrived.rows, arrived.expert_offsets) * arrived.row_weights[:, None]
    y = tern.nn.moe_combine(rows, routing)

Dispatch is linear in the tokens and their weights, and combine is its transpose: the backward of one is the other, along the same plan.
So what holds for forwards holds for backwards too: every rank does the same, in the same order. Rows that are combined must come out of
those that were dispatched on every rank, also where none arrive; otherwise autograd leaves that rank's part of the backward out, and the
others wait for it until their deadline.

torch.compile traces through without a graph break (fullgraph=True), with exact extents as sizes that depend on data. torch 2.4 must be told
so (torch._dynamo.config.capture_dynamic_output_shape_ops = True), and cannot compile backwards of that kind; those with extent "worst" it
can. Operations that depend on each other keep their order in a compiled graph; of those that do not, as in two MoE layers side
by side, a compiler may choose another, and must choose the same on every rank: compile such layers one by one.
"""

from .experts import GroupedMLP, expert_parameters, grouped_mm
from .layer import MoELayer, MoEOutput, Router, load_balancing_loss
from .ops import Arrived, moe_combine, moe_dispatch
from .plans import PlanPool, Routing

__all__ = [
    "Arrived",
    "GroupedMLP",
    "MoELayer",
    "MoEOutput",
    "PlanPool",
    "Router",
    "Routing",
    "expert_parameters",
    "grouped_mm",
    "load_balancing_loss",
    "moe_combine",
    "moe_dispatch",
]
