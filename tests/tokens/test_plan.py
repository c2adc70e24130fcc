"""The algebra of the reduction plan."""

from __future__ import annotations

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_names import OpNames

from gen_turbo.tokens.token_map import TokenMap

# A mean of up to a dozen float32 numbers of order 1 is off by a few units in the last place.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def random_plan(batch: int, num_tokens: int, num_slots: int, seed: int) -> TokenMap:
    """A plan whose rows differ, without touching the global generator."""
    generator = torch.Generator().manual_seed(seed)
    destination = torch.empty(batch, num_tokens, dtype=torch.int64)
    for row in destination:
        stays = torch.randperm(num_tokens, generator=generator)[:num_slots]
        row.copy_(stays[torch.randint(num_slots, (num_tokens,), generator=generator)])
        row[stays] = stays
    return TokenMap.from_destinations(destination)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers of a private generator."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def plans(draw: st.DrawFn) -> TokenMap:
    """Plans of one to three rows and up to 24 tokens."""
    num_tokens = draw(st.integers(1, 24))
    num_slots = draw(st.integers(1, num_tokens))
    return random_plan(draw(st.integers(1, 3)), num_tokens, num_slots, draw(st.integers(0, 999)))


@PROPERTY
@given(plans(), st.integers(1, 3), st.booleans())
def test_merge_equals_the_loop(plan: TokenMap, repeats: int, is_weighted: bool) -> None:
    """Catches offsets that ignore the batch row, and weights applied in token instead of slot order."""
    batch = plan.slot_BN.shape[0] * repeats
    x = values(batch, plan.num_tokens, 3)
    weight = values(batch, plan.num_tokens, seed=1).abs() + 0.1
    merged = plan.merge(x, weight if is_weighted else None)
    for b in range(batch):
        slots = plan.slot_BN[b % plan.slot_BN.shape[0]].tolist()
        weights = weight[b].tolist() if is_weighted else [1.0] * len(slots)
        expected = oracles.merge(slots, plan.num_slots, x[b].tolist(), weights)
        torch.testing.assert_close(merged[b], torch.tensor(expected), **ROUNDING)


def test_weights_of_the_plan_rows_are_tiled_like_the_plan() -> None:
    """Catches weights tiled by repeat_interleave, which pairs them with the wrong rows."""
    plan = random_plan(2, 9, 4, 0)
    x, weight = values(4, 9, 3), values(2, 9, seed=1).abs() + 0.1
    assert torch.equal(plan.merge(x, weight), plan.merge(x, torch.cat([weight, weight])))


def test_warm_verbs_are_one_kernel_each() -> None:
    """Catches sorting or counting again in every call, and a mean made of several passes over the tokens."""
    plan = random_plan(2, 9, 4, 0).warm(4)
    x = values(4, 9, 3)
    views = {"view", "_unsafe_view", "slice", "detach"}
    for verb, argument, kernel in [
        (plan.merge, x, "_embedding_bag_forward_only"),
        (plan.unmerge, x[:, :4].contiguous(), "index_select"),
        (plan.select, x, "index_select"),
    ]:
        with OpNames() as ops:
            verb(argument)
        assert [name for name in ops.names if name not in views] == [kernel]


@PROPERTY
@given(plans(), st.integers(1, 3))
def test_unmerge_and_select_copy_rows_exactly(plan: TokenMap, repeats: int) -> None:
    """Catches tiling by repeat_interleave, which pairs rows with the wrong plan row."""
    rows = plan.slot_BN.shape[0]
    x = values(rows * repeats, plan.num_tokens, 2, 2)
    y = values(rows * repeats, plan.num_slots, 2, 2)
    for b in range(len(x)):
        assert torch.equal(plan.unmerge(y)[b], y[b][plan.slot_BN[b % rows]])
        assert torch.equal(plan.select(x)[b], x[b][plan.anchor_BM[b % rows]])


@PROPERTY
@given(plans())
def test_anchors_ascend_and_keep_their_own_slot(plan: TokenMap) -> None:
    """Catches the order [kept sources, destinations], which breaks raster order."""
    assert (plan.anchor_BM.diff(dim=1) > 0).all()
    assert torch.equal(plan.slot_BN.gather(1, plan.anchor_BM), torch.arange(plan.num_slots).expand_as(plan.anchor_BM))
    assert plan.sizes().sum(1).tolist() == [plan.num_tokens] * len(plan.slot_BN)


@PROPERTY
@given(plans())
def test_merge_undoes_unmerge_and_unmerge_of_merge_is_idempotent(plan: TokenMap) -> None:
    """Catches a mean that leaves the destination itself out."""
    x, y = values(len(plan.slot_BN), plan.num_tokens, 4), values(len(plan.slot_BN), plan.num_slots, 4)
    torch.testing.assert_close(plan.merge(plan.unmerge(y)), y, **ROUNDING)
    once = plan.unmerge(plan.merge(x))
    torch.testing.assert_close(plan.unmerge(plan.merge(once)), once, **ROUNDING)


@PROPERTY
@given(plans())
def test_sizes_conserve_the_sum(plan: TokenMap) -> None:
    """Catches sizes counted over the whole batch instead of each row."""
    x = values(len(plan.slot_BN), plan.num_tokens, 4)
    merged_sum = (plan.sizes()[..., None] * plan.merge(x)).sum(1)
    torch.testing.assert_close(merged_sum, x.sum(1), rtol=1e-5, atol=1e-5)


@PROPERTY
@given(plans(), st.data())
def test_then_equals_doing_both(first: TokenMap, data: st.DataObject) -> None:
    """Catches a mean of means without sizes, and anchors of the later plan read as tokens."""
    num_slots = data.draw(st.integers(1, first.num_slots))
    later = random_plan(1, first.num_slots, num_slots, seed=data.draw(st.integers(0, 99)))
    both = first.then(later)
    x, y = values(len(first.slot_BN), first.num_tokens, 3), values(len(first.slot_BN), num_slots, 3)
    step_by_step = later.merge(first.merge(x), weight=first.sizes())
    torch.testing.assert_close(both.merge(x), step_by_step, **ROUNDING)
    assert torch.equal(both.unmerge(y), first.unmerge(later.unmerge(y)))
    assert torch.equal(both.select(x), later.select(first.select(x)))


def test_then_broadcasts_a_first_plan_of_one_row() -> None:
    """Catches a gather that stops at the first plan's single row."""
    first, later = random_plan(1, 8, 6, 0), random_plan(2, 6, 3, 1)
    y = values(2, 3, 2)
    assert torch.equal(first.then(later).unmerge(y), first.unmerge(later.unmerge(y)))


def test_identity_is_bitwise_identity() -> None:
    """Catches dividing by one in a lower precision on the way."""
    plan = TokenMap.identity(1, 5, "cpu")
    x = values(3, 5, 2).half()
    assert plan.is_identity
    assert all(torch.equal(verb(x), x) for verb in (plan.merge, plan.unmerge, plan.select))
    assert torch.equal(plan.sizes(), torch.ones(1, 5, dtype=torch.int64))


def test_an_unmerged_token_is_copied_bitwise() -> None:
    """Catches scaling single tokens by a rounded share."""
    plan = random_plan(2, 16, 9, 3)
    x = values(2, 16, 4)
    alone = plan.sizes() == 1
    assert alone.any()
    assert torch.equal(plan.merge(x)[alone], plan.select(x)[alone])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_and_layout_are_kept(dtype: torch.dtype) -> None:
    """Catches a float32 result for half types, and views that fail on non-contiguous tokens."""
    plan = random_plan(2, 6, 3, 0)
    x = values(4, 3, 6, 2).to(dtype).transpose(1, 2)
    assert plan.merge(x).dtype == plan.unmerge(plan.merge(x)).dtype == dtype
    assert plan.merge(x).shape == (4, 3, 3, 2)
    assert torch.equal(plan.merge(x), plan.merge(x.contiguous()))


def test_double_tokens_are_averaged_in_double() -> None:
    """Catches a share of 1/3 that was rounded to float32."""
    plan = TokenMap.from_destinations(torch.zeros(1, 3, dtype=torch.int64))
    x = torch.ones(1, 3, 1, dtype=torch.float64)
    assert abs(plan.merge(x).item() - 1) < 1e-15


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_half_types_sum_in_float32(dtype: torch.dtype, is_weighted: bool) -> None:
    """Catches sums in the tokens' own type: 3,000 in ones stop growing, 60,000 four times is infinite."""
    plan = TokenMap.from_destinations(torch.zeros(1, 3000, dtype=torch.int64))
    weight = torch.ones(1, 3000) if is_weighted else None
    for value in (1.0, 60000.0):
        x = torch.full((1, 3000, 1), value, dtype=dtype)
        assert plan.merge(x, weight).item() == x[0, 0, 0].item()


def test_select_and_unmerge_take_any_dtype_but_merge_does_not() -> None:
    """Catches positions and masks that are averaged or turned into floats."""
    plan = random_plan(1, 6, 3, 0)
    positions = torch.arange(6)[None]
    assert torch.equal(plan.select(positions), plan.anchor_BM)
    assert plan.unmerge(plan.select(positions) > 2).dtype == torch.bool
    with pytest.raises(TypeError, match="use `select`"):
        plan.merge(positions)


def test_gradients_flow_through_both_verbs() -> None:
    """Catches kernels without a backward, and gradients that are not divided by the size."""
    plan = random_plan(2, 7, 4, 0)
    x = values(4, 7, 2).double().requires_grad_()
    weight = values(4, 7).double().abs().add(0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: plan.unmerge(plan.merge(x)), x)
    assert torch.autograd.gradcheck(plan.merge, (x, weight))


def test_compiles_as_one_graph_and_serves_a_new_plan_without_another() -> None:
    """Catches caches built with data-dependent code inside the graph, and guards on the plan's contents."""
    torch._dynamo.reset()
    num_compiled = 0

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        nonlocal num_compiled
        num_compiled += 1
        return graph

    def layer(plan: TokenMap, x: torch.Tensor) -> torch.Tensor:
        return plan.unmerge(plan.merge(x).sin()) + x

    compiled = torch.compile(layer, fullgraph=True, backend=count)
    x = values(4, 6, 2)
    for seed in range(3):
        plan = random_plan(2, 6, 3, seed).warm(4)
        assert torch.equal(compiled(plan, x), layer(plan, x))
    assert num_compiled == 1


def test_compiles_with_a_plan_from_the_closure() -> None:
    """Catches cached tensors that the eager backend cannot lift out of a closed-over plan."""
    torch._dynamo.reset()
    plan = random_plan(1, 6, 3, 0).warm(2)
    compiled = torch.compile(lambda x: plan.unmerge(plan.merge(x)), fullgraph=True, backend="eager")
    x = values(2, 6, 2)
    assert torch.equal(compiled(x), plan.unmerge(plan.merge(x)))


def test_known_number_of_slots_gives_the_same_plan() -> None:
    """Catches the spare column leaking into the anchors."""
    plan = random_plan(2, 9, 4, 0)
    destination = plan.anchor_BM.gather(1, plan.slot_BN)
    known = TokenMap.from_destinations(destination, 4)
    assert torch.equal(known.slot_BN, plan.slot_BN) and torch.equal(known.anchor_BM, plan.anchor_BM)


@pytest.mark.parametrize(
    ("destination", "message"),
    [([[1, 2, 2]], "does not stay"), ([[1, 0, 2]], "does not stay"), ([[0, 0, 2], [0, 0, 0]], r"rows keep \[2, 1\]")],
)
def test_impossible_destinations_raise(destination: list[list[int]], message: str) -> None:
    """Catches chains, cycles and ragged rows that would make a wrong plan in silence."""
    with pytest.raises(ValueError, match=message):
        TokenMap.from_destinations(torch.tensor(destination))


def test_wrong_shapes_raise_with_the_numbers() -> None:
    """Catches reshapes that happily mix tokens of different rows."""
    plan = random_plan(2, 6, 3, 0)
    for verb, shape, message in [
        (plan.merge, (2, 5, 1), r"6 tokens, \.\.\.\), got \(2, 5, 1\)"),
        (plan.unmerge, (2, 6, 1), "3 slots"),
        (plan.select, (3, 6, 1), "batch of 3 is no multiple of the plan's 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            verb(torch.zeros(shape))
    with pytest.raises(ValueError, match="weight"):
        plan.merge(torch.zeros(2, 6, 1), torch.ones(2, 5))
    with pytest.raises(ValueError, match="has 3 slots"):
        plan.then(plan)


@pytest.mark.parametrize(
    ("slot", "anchor", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), "batch axis"),
        (torch.zeros(3, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64), "batch axis"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), "batch axis"),
        (torch.zeros(2, 3, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64), "batch axis"),
        (torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int64), "int64"),
        (torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64), "2 slots for 1 tokens"),
    ],
)
def test_malformed_plans_raise(slot: torch.Tensor, anchor: torch.Tensor, message: str) -> None:
    """Catches errors that would surface only in a later kernel."""
    with pytest.raises(ValueError, match=message):
        TokenMap(slot, anchor)
