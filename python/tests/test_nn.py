# SPDX-License-Identifier: Apache-2.0
"""tern.nn against a plain torch model in one process that does the same without any exchange."""

from __future__ import annotations

import gc
import itertools
import threading
from typing import Any

import pytest
import tern
from ranks import as_processes, as_threads

torch: Any = pytest.importorskip("torch", reason="torch is not installed")

from tern import nn  # noqa: E402, needs torch
from tern.nn import plans as nn_plans  # noqa: E402

RANKS, TOKENS, HIDDEN, FFN, EXPERTS, TOPK = 3, 12, 32, 24, 6, 2
LOCAL = EXPERTS // RANKS
checkpoint = pytest.importorskip("torch.utils.checkpoint").checkpoint
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
]


@pytest.fixture(autouse=True)
def _every_plan_goes_back() -> Any:
    """Whatever a test does, its plans are back in their pools when its tensors are gone."""
    yield
    gc.collect()
    assert not nn_plans._leases


@pytest.fixture
def undefined_is_nan() -> Any:
    """Memory that nobody wrote reads as NaN: what depends on it shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def pool_of(group: tern.Group, device: str = "cpu", **options: Any) -> nn.PlanPool:
    exchange = tern.Exchange(
        group, device=device, max_tokens=TOKENS, max_row_bytes=4 * HIDDEN, max_topk=TOPK, max_experts=EXPERTS
    )
    return nn.PlanPool(exchange, max_tokens=TOKENS, num_experts=EXPERTS, num_topk=TOPK, **options)


def num_tokens_of(rank: int) -> int:
    return 0 if rank == 1 else TOKENS - rank  # one rank has none


def integers(rank: int, shape: tuple[int, ...], what: int) -> Any:
    """Small whole numbers: their products and sums are exact in bf16 and fp32, whatever the order."""
    seed = torch.Generator().manual_seed(1000 * what + rank)
    return torch.randint(-2, 3, shape, generator=seed).float()


def choose(rank: int) -> Any:
    seed = torch.Generator().manual_seed(7 + rank)
    return torch.randint(-1, EXPERTS, (num_tokens_of(rank), TOPK), generator=seed)


def inputs_of(rank: int, dtype: Any, device: str = "cpu") -> tuple[Any, ...]:
    """tokens, topk_idx, weights, the gradient of the result."""
    tokens = integers(rank, (num_tokens_of(rank), HIDDEN), 1).to(device, dtype).requires_grad_()
    weights = integers(rank, (num_tokens_of(rank), TOPK), 2).to(device).requires_grad_()
    grad = integers(rank, (num_tokens_of(rank), HIDDEN), 3).to(device, dtype)
    return tokens, choose(rank).to(device), weights, grad


def scale_of(expert: int) -> float:
    """The experts multiply by a number each."""
    return float(1 + expert % 3)


def dense(tokens: Any, idx: Any, weights: Any) -> Any:
    """What an exchange with experts that multiply by scale_of amounts to."""
    scales = torch.tensor([*(scale_of(e) for e in range(EXPERTS)), 0.0], device=tokens.device)
    return ((weights * scales[idx]).sum(dim=1, keepdim=True) * tokens.float()).to(tokens.dtype)


def exchanged(pool: nn.PlanPool, tokens: Any, idx: Any, weights: Any) -> Any:
    routing = pool.route(idx)
    arrived = nn.moe_dispatch(tokens, routing, weights)
    own = range(pool.first_local_expert, pool.first_local_expert + pool.num_local_experts)
    scales = torch.tensor([*(scale_of(e) for e in own), 0.0], device=tokens.device)
    if pool.layout == tern.Layout.EXPERT_MAJOR:
        factors = arrived.row_weights * scales[arrived.row_expert.long()]
    else:
        factors = (arrived.row_weights * scales[arrived.topk_idx.long()]).sum(dim=1)
    return nn.moe_combine((arrived.rows * factors[:, None]).to(tokens.dtype), routing)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("layout", "extent", "alignment"),
    [
        ("expert_major", "exact", 1),
        ("expert_major", "exact", 8),
        ("expert_major", "worst", 1),
        ("expert_major", "worst", 8),
        ("rank_major", "exact", 1),
        ("rank_major", "worst", 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_of_tokens_and_weights_are_exact(
    device: str, layout: str, extent: str, alignment: int, dtype: Any, undefined_is_nan: None
) -> None:
    def body(group: tern.Group) -> None:
        pool = pool_of(group, device, layout=layout, extent=extent, expert_alignment=alignment)
        tokens, idx, weights, grad = inputs_of(group.rank, dtype, device)
        y = exchanged(pool, tokens, idx, weights)
        y.backward(grad)
        found = [y, tokens.grad, weights.grad]
        tokens.grad = weights.grad = None
        expected_y = dense(tokens, idx, weights)
        expected_y.backward(grad)
        for one, other in zip(found, [expected_y, tokens.grad, weights.grad]):
            assert torch.equal(one, other)

    def alone_first(group: tern.Group) -> None:
        # At their first use torch's kernels are loaded, which may wait for all that is on a GPU: nothing must wait for another rank then.
        if device == "cuda":
            body(tern.Group.local(1)[0])
        body(group)

    as_threads(RANKS, alone_first, device)


def test_expanded_gradients_and_rows_of_any_stride() -> None:
    def body(group: tern.Group) -> None:
        pool = pool_of(group)
        tokens, idx, weights, _ = inputs_of(group.rank, torch.float32)
        # The gradient of a sum over tokens is one row, expanded: a stride of zero.
        exchanged(pool, tokens.t().contiguous().t(), idx, weights).sum(dim=0).dot(
            torch.arange(HIDDEN).float()
        ).backward()
        found = [tokens.grad, weights.grad]
        tokens.grad = weights.grad = None
        dense(tokens, idx, weights).sum(dim=0).dot(torch.arange(HIDDEN).float()).backward()
        assert torch.equal(found[0], tokens.grad)
        assert torch.equal(found[1], weights.grad)

    as_threads(RANKS, body)


@pytest.mark.parametrize("layout", ["expert_major", "rank_major"])
@pytest.mark.parametrize("alignment", [1, 8])
@pytest.mark.parametrize("extent", ["exact", "worst"])
def test_rows_that_nothing_arrived_for_poison_no_gradient(
    layout: str, alignment: int, extent: str, undefined_is_nan: None
) -> None:
    """One matrix for all rows: its gradient sums over unused rows too, in both factors."""

    def body(group: tern.Group) -> Any:
        alignments: Any = {"expert_alignment": alignment} if layout == "expert_major" else {}
        pool = pool_of(group, layout=layout, extent=extent, **alignments)
        tokens, idx, weights, grad = inputs_of(group.rank, torch.float32)
        matrix = integers(0, (HIDDEN, HIDDEN), 4).requires_grad_()
        routing = pool.route(idx)
        arrived = nn.moe_dispatch(tokens, routing, weights)
        factors = arrived.row_weights.reshape(arrived.rows.shape[0], -1).sum(dim=1, keepdim=True)
        y: Any = nn.moe_combine((arrived.rows * factors) @ matrix, routing)
        y.backward(grad)
        scale = (weights * (idx >= 0)).sum(dim=1, keepdim=True)
        return matrix.grad, (tokens * scale).T @ grad

    results = as_threads(RANKS, body)
    assert torch.equal(sum(found for found, _ in results), sum(expected for _, expected in results))


@pytest.mark.parametrize("layout", ["expert_major", "rank_major"])
def test_the_gradient_has_a_gradient(layout: str) -> None:
    def second(compute: Any, rank: int) -> list[Any]:
        tokens, idx, weights, grad = inputs_of(rank, torch.float32)
        y = compute(tokens, idx, weights)
        first = torch.autograd.grad(y, (tokens, weights), grad, create_graph=True)
        return list(torch.autograd.grad((first[0].square().sum() + first[1].square().sum()), (tokens, weights)))

    def body(group: tern.Group) -> None:
        pool = pool_of(group, layout=layout)
        found = second(lambda *given: exchanged(pool, *given), group.rank)
        for one, other in zip(found, second(dense, group.rank)):
            assert torch.equal(one, other)

    as_threads(RANKS, body)


# ------------------------------------------------------------------------------------------------------------- the layer


def layer_of(pool: nn.PlanPool, dtype: Any = torch.float32, **options: Any) -> nn.MoELayer:
    options = {"hidden": HIDDEN, "ffn_hidden": FFN, "balance_loss": 0.1, **options}
    # Ranks are threads, which share torch's generator.
    with _drawing:
        torch.manual_seed(3)
        return nn.MoELayer(pool, dtype=dtype, **options)


_drawing = threading.Lock()


def batch_of(rank: int, dtype: Any = torch.float32, step: int = 0) -> tuple[Any, Any]:
    seed = torch.Generator().manual_seed(50 + rank + 10 * step)
    shape = (num_tokens_of(rank), HIDDEN)
    return torch.randn(shape, generator=seed).to(dtype), torch.randn(shape, generator=seed).to(dtype)


class DenseLayer(torch.nn.Module):  # type: ignore[misc]
    """The weights of all experts on one rank, and no exchange."""

    def __init__(self, router: Any, experts: Any, coefficient: float) -> None:
        super().__init__()
        self.router, self.experts, self.coefficient = router, experts, coefficient

    def forward(self, x: Any) -> tuple[Any, Any]:
        routed = self.router(x)
        y = torch.zeros_like(x)
        for expert, k in itertools.product(range(EXPERTS), range(TOPK)):
            chosen = (routed.topk_idx[:, k] == expert).nonzero()[:, 0]
            inner = x[chosen] @ self.experts.w_in[expert]
            if self.experts.activation == "swiglu":
                gate, up = inner.chunk(2, dim=-1)
                inner = torch.nn.functional.silu(gate) * up
            else:
                inner = torch.nn.functional.gelu(inner)
            rows = (inner @ self.experts.w_out[expert]) * routed.topk_weights[chosen, k, None]
            y = y.index_add(0, chosen, rows.to(x.dtype))
        return y, self.coefficient * nn.load_balancing_loss(routed.probabilities, routed.topk_idx)


def loss_of(layer: Any, x: Any, grad: Any) -> Any:
    y, balance_loss = layer(x)
    return (y.float() * grad.float()).sum() + balance_loss


def dense_gradients(dtype: Any, use: Any, **options: Any) -> tuple[Any, list[Any]]:
    """The dense layer with its gradients over the batches of all ranks, and those of the ranks' x."""
    (pool,) = [pool_of(group) for group in tern.Group.local(1)]
    whole = layer_of(pool, dtype, **options)
    layer, grads = DenseLayer(whole.router, whole.experts, 0.1), []
    for rank in range(RANKS):
        x, grad = batch_of(rank, dtype)
        x.requires_grad_()
        use(layer, x, grad)
        grads.append(x.grad)
    return layer, grads


def check_layer(dtype: Any, use: Any, tolerance: float, pool_options: Any = (), **options: Any) -> None:
    """Uses the layer on all ranks, and the dense one for each rank's batch, and compares every gradient."""
    layer, x_grads = dense_gradients(dtype, use, **options)

    def body(group: tern.Group) -> Any:
        spread = layer_of(pool_of(group, **dict(pool_options)), dtype, **options)
        x, grad = batch_of(group.rank, dtype)
        x.requires_grad_()
        use(spread, x, grad)
        torch.testing.assert_close(x.grad, x_grads[group.rank], atol=tolerance, rtol=tolerance)
        own = slice(group.rank * LOCAL, (group.rank + 1) * LOCAL)
        for name in ("w_in", "w_out"):
            expected = getattr(layer.experts, name).grad[own]
            torch.testing.assert_close(getattr(spread.experts, name).grad, expected, atol=tolerance, rtol=tolerance)
        return spread.router.linear.weight.grad

    router_grads = as_threads(RANKS, body)
    expected = layer.router.linear.weight.grad
    torch.testing.assert_close(sum(router_grads), expected, atol=tolerance, rtol=tolerance)


def once(layer: Any, x: Any, grad: Any) -> None:
    loss_of(layer, x, grad).backward()


@pytest.mark.parametrize("extent", ["exact", "worst"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_layer_equals_the_dense_one(extent: str, activation: str, undefined_is_nan: None) -> None:
    # FP32: products of the same rows, but in groups of other sizes, and sums in another order.
    check_layer(torch.float32, once, 2e-5, {"extent": extent}, activation=activation)


def test_layer_in_bf16() -> None:
    # A row is rounded to 8 bits after each product, and sums of two rows once more.
    check_layer(torch.bfloat16, once, 4e-2, {"expert_alignment": 8})


def test_one_layer_used_twice_and_gradients_accumulated() -> None:
    def twice(layer: Any, x: Any, grad: Any) -> None:
        for _ in range(2):
            y, balance_loss = layer(layer(x)[0] + x)
            ((y * grad).sum() + balance_loss).backward()

    check_layer(torch.float32, twice, 1e-4)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved_tensor_hooks", "reentrant"])
def test_activation_checkpoints(reentrant: bool) -> None:
    """Forwards run again in the backward, on all ranks alike."""

    def use(layer: Any, x: Any, grad: Any) -> None:
        y, first = checkpoint(layer, x, use_reentrant=reentrant)
        y, second = checkpoint(layer, y + x, use_reentrant=reentrant)
        ((y * grad).sum() + first + second).backward()

    check_layer(torch.float32, use, 1e-4)


def test_backward_of_several_losses_of_one_forward() -> None:
    def use(layer: Any, x: Any, grad: Any) -> None:
        y, balance_loss = layer(x)
        (y * grad).sum().backward(retain_graph=True)
        (y.square().sum() + balance_loss).backward()

    check_layer(torch.float32, use, 1e-4)


def test_inference_takes_one_plan_and_gives_it_back() -> None:
    def body(group: tern.Group) -> None:
        pool = pool_of(group)
        layer = layer_of(pool)
        x, _ = batch_of(group.rank)
        expected = layer(x)[0].detach()
        with torch.no_grad():
            results = [layer(x)[0] for _ in range(4)]
        assert all(torch.equal(result, expected) for result in results)
        assert len(pool._free) == 1
        outputs = [layer(x)[0] for _ in range(3)]  # three graphs of autograd: three plans, one of them the first
        assert len(pool._free) == 0
        torch.stack(outputs).sum().backward()
        del outputs
        gc.collect()
        assert len(pool._free) == 3

    as_threads(RANKS, body)


def test_a_backward_outlives_the_pool() -> None:
    def body(group: tern.Group) -> None:
        def forward() -> Any:
            return exchanged(pool_of(group), tokens, idx, weights)

        tokens, idx, weights, grad = inputs_of(group.rank, torch.float32)
        y = forward()
        gc.collect()
        y.backward(grad)
        found = tokens.grad
        tokens.grad = None
        dense(tokens, idx, weights).backward(grad)
        assert torch.equal(found, tokens.grad)

    as_threads(RANKS, body)


def test_a_plan_that_went_back_is_not_used() -> None:
    (group,) = tern.Group.local(1)
    pool = pool_of(group)
    idx = torch.zeros((2, TOPK), dtype=torch.int64)
    routing = pool.route(idx)
    copied = routing._replace(plan=routing.plan.clone())
    tokens = torch.ones(2, HIDDEN)
    assert nn.moe_dispatch(tokens, copied).rows.shape == (2 * TOPK, HIDDEN)  # as long as there is the first
    del routing
    with pytest.raises(tern.InvalidStateError, match="went back to its pool"):
        nn.moe_dispatch(tokens, copied)


def test_wrong_arguments() -> None:
    (group,) = tern.Group.local(1)
    with pytest.raises(tern.UnsupportedError, match="expert_padded"):
        pool_of(group, layout="expert_padded")
    with pytest.raises(tern.UnsupportedError, match="rank_major"):
        nn.MoELayer(pool_of(group, layout="rank_major"), hidden=HIDDEN, ffn_hidden=FFN)
    with pytest.raises(ValueError, match="'relu'"):
        nn.GroupedMLP(HIDDEN, FFN, 2, activation="relu")


def test_expert_parameters_are_those_of_the_experts() -> None:
    (group,) = tern.Group.local(1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), layer_of(pool_of(group)))
    assert [name for name, _ in nn.expert_parameters(model)] == ["1.experts.w_in", "1.experts.w_out"]


def test_balance_loss_of_known_loads() -> None:
    even = torch.full((8, 4), 0.25)
    spread = torch.arange(8).remainder(4)[:, None]
    assert nn.load_balancing_loss(even, spread).item() == pytest.approx(1)
    one_hot = torch.nn.functional.one_hot(torch.zeros(8, dtype=torch.int64), 4).float()
    assert nn.load_balancing_loss(one_hot, torch.zeros((8, 1), dtype=torch.int64)).item() == pytest.approx(4)
    assert nn.load_balancing_loss(torch.empty(0, 4), torch.empty((0, 1), dtype=torch.int64)).item() == 0


# ------------------------------------------------------------------------------------------------------------ grouped_mm


@pytest.mark.parametrize("device", DEVICES)
def test_grouped_mm(device: str) -> None:
    seed = torch.Generator().manual_seed(0)
    rows = torch.randn(10, 16, generator=seed).to(device).requires_grad_()
    weights = torch.randn(3, 16, 8, generator=seed).to(device).requires_grad_()
    offsets = torch.tensor([0, 4, 4, 9], device=device)
    y: Any = nn.grouped_mm(rows, weights, offsets)
    grad = torch.randn(y.shape, generator=seed).to(device)
    y.backward(grad)
    group_of = torch.tensor([0] * 4 + [2] * 5 + [0], device=device)
    used = (torch.arange(10, device=device) < 9)[:, None]
    found = [y, rows.grad, weights.grad]
    rows.grad = weights.grad = None
    expected = torch.einsum("nk,nkm->nm", rows, weights[group_of]) * used
    expected.backward(grad)
    for one, other in zip(found, [expected, rows.grad, weights.grad]):
        torch.testing.assert_close(one, other)


def test_grouped_mm_of_the_second_order() -> None:
    offsets = torch.tensor([0, 2, 2, 5])
    rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda r, w: nn.grouped_mm(r, w, offsets), (rows, weights))


# --------------------------------------------------------------------------------------------------------- torch.compile


IS_TORCH_2_4 = torch.__version__.startswith("2.4.")  # it cannot compile backwards whose sizes depend on data


def check_compiled(group: tern.Group, backend: str, extent: str) -> None:
    """One graph, for batches of several sizes, that gives what eager mode gives."""
    layer: Any = layer_of(pool_of(group, extent=extent))
    # Sizes that depend on data had to be asked for then.
    torch._dynamo.config.capture_dynamic_output_shape_ops = IS_TORCH_2_4
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=True)
    for num_tokens in (6, 11, 7):
        x = torch.randn(num_tokens - group.rank, HIDDEN)
        results = []
        for module in (layer, compiled):
            own = x.clone().requires_grad_()
            y, balance_loss = module(own)
            (y.square().sum() + balance_loss).backward()
            results.append((y.detach(), own.grad, layer.experts.w_in.grad, layer.router.linear.weight.grad))
            layer.zero_grad(set_to_none=True)
        for one, other in zip(*results):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("extent", ["exact", "worst"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_to_one_graph(backend: str, extent: str) -> None:
    if IS_TORCH_2_4 and (backend, extent) == ("aot_eager", "exact"):
        pytest.skip("torch 2.4 cannot compile backwards whose sizes depend on data")
    torch._dynamo.reset()
    (group,) = tern.Group.local(1)
    check_compiled(group, backend, extent)
    torch._dynamo.reset()


def compile_on_rank(_rank: int) -> str:
    check_compiled(tern.Group.from_torch(), "aot_eager", "worst" if IS_TORCH_2_4 else "exact")
    return "done"


def test_compiles_on_ranks_that_are_processes() -> None:
    assert as_processes(2, compile_on_rank) == ["done", "done"]


def test_custom_ops_keep_their_promises() -> None:
    """torch's own checks of schemas, fake implementations and autograd."""
    (group,) = tern.Group.local(1)
    for layout in ("expert_major", "rank_major"):
        pool = pool_of(group, layout=layout)
        idx = torch.tensor([[0, 1], [2, 2], [5, -1]])
        routing = pool.route(idx)
        tokens = torch.randn(3, HIDDEN, requires_grad=True)
        weights = torch.rand(3, TOPK, requires_grad=True)
        num_rows = routing.rows.shape[0]
        checks = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
        ops = torch.ops.tern
        given: Any = (tokens, weights, routing.plan, pool.id, num_rows, True)
        torch.library.opcheck(ops.dispatch.default, given, test_utils=checks)
        rows = torch.randn(num_rows, HIDDEN, requires_grad=True)
        torch.library.opcheck(ops.combine.default, (rows, None, routing.plan, pool.id, 3), test_utils=checks)
    mm = (torch.randn(6, 4, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True), torch.tensor([0, 2, 5]))
    torch.library.opcheck(torch.ops.tern.grouped_mm.default, mm)
    outer = (torch.randn(6, 4, requires_grad=True), torch.randn(6, 3, requires_grad=True), torch.tensor([0, 2, 5]))
    torch.library.opcheck(torch.ops.tern.grouped_outer.default, outer)
