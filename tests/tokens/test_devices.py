"""Tensors are made where the tokens are: a default device of another kind changes nothing."""

from __future__ import annotations

import pytest
import torch

import gen_turbo.methods  # noqa: F401  registers the methods
from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.eadaprune import EAdaPruneProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens import bags, farthest, frames, group, match, partition, score, select, tables, weighted
from gen_turbo.tokens.alternating import alternating_soft_matching
from gen_turbo.tokens.token_map import TokenMap

TURBO = METHODS["turbo"]
CPU = torch.device("cpu")
SEED = torch.Generator().manual_seed(0)
X = torch.randn(2, 64, 8, generator=SEED)
VALUE = torch.rand(2, 64, generator=SEED)
HEADS = torch.randn(2, 2, 64, 4, generator=SEED)
WIDE = select.keep_highest(VALUE, 10)
ROW = select.keep_spaced(64, 20, CPU)
EVEN = torch.arange(0, 64, 2)
WORDS = torch.ones(2, 64, dtype=torch.bool)


def planned(name, grid):
    """A plan where there is every semantic value, before the language model or where else the method works."""
    method = METHODS[name](0.5)
    site = {"resize": "input", "pyramiddrop": "decoder", "fastv": "decoder"}.get(name, "pre_llm")
    return method.plan(X, LayerInfo(site, 0.5, grid, semantic=lambda kind: VALUE), StepInfo(1, 1))


MADE = {
    **{f"{name} on a grid": lambda name=name: planned(name, (8, 8)) for name in METHODS.names()},
    **{f"{name} in a line": lambda name=name: planned(name, None) for name in METHODS.names() if name != "resize"},
    "odd grid": lambda: TURBO(0.5).plan(X[:, :63], LayerInfo("x", 0.5, (7, 9)), StepInfo()),
    "whole image": lambda: TURBO(0.5, tile=0).plan(X, LayerInfo("x", 0.5, (8, 8)), StepInfo()),
    "nothing": lambda: METHODS["divprune"](0.0).plan(X, LayerInfo("x", 0.0), StepInfo()),
    "identity": lambda: TokenMap.identity(2, 8, CPU),
    "no matching": lambda: match.bipartite_soft_matching(X, EVEN, 0),
    "nobody to receive": lambda: match.bipartite_soft_matching(X, EVEN[:0], 0),
    "from destinations": lambda: TokenMap.from_destinations(EVEN.repeat_interleave(2)[None]),
    "bipartite": lambda: match.bipartite_soft_matching(X, EVEN, 9, VALUE),
    "alternating": lambda: alternating_soft_matching(X, 9, VALUE),
    "farthest": lambda: farthest.farthest_point_plan(X, 9),
    "groups": lambda: group.group_tokens(X, (8, 8), 20, 3, 1, 5),
    "as many groups": lambda: group.group_tokens(X, (8, 8), 64),
    "spaced": lambda: select.keep_spaced(64, 9, CPU),
    "pooled": lambda: select.pool_cells((8, 8), 9, CPU),
    "shrunk": lambda: select.shrink_cells((8, 8), (3, 4), CPU),
    "destinations": lambda: partition.grid_destinations((7, 9), (2, 2), 3),
    "corners": lambda: partition.grid_destinations((7, 9), (2, 2), "corner"),
    "column mean": lambda: score.attention_column_mean(HEADS, HEADS, VALUE),
    "text attention": lambda: score.text_attention(HEADS, HEADS, WORDS),
    "penalty": lambda: score.information_penalty(VALUE, 0.5),
    "weighed keys": lambda: weighted.weigh_keys(HEADS, HEADS, VALUE[:1], 0.5)[1],
    "merge": lambda: TokenMap(WIDE.slot_BN, WIDE.anchor_BM).merge(X),
    "weighted merge": lambda: TokenMap(WIDE.slot_BN, WIDE.anchor_BM).merge(X.repeat(2, 1, 1), VALUE),
    "unmerge": lambda: TokenMap(ROW.slot_BN, ROW.anchor_BM).unmerge(X[:, :20]),
    "select": lambda: TokenMap(ROW.slot_BN, ROW.anchor_BM).select(X),
    "between": lambda: TokenMap(WIDE.slot_BN, WIDE.anchor_BM).between(2, 3),
    "then": lambda: ROW.then(select.keep_spaced(20, 4, CPU)),
    "sizes": lambda: ROW.sizes(),
    "frames": lambda: frames.one_sequence(WIDE, 2),
    "one frame for all": lambda: frames.one_sequence(ROW, 2),
    "side by side": lambda: frames.side_by_side([WIDE, ROW]),
    "flat rows": lambda: bags.flat_rows(WIDE.slot_BN, 10),
    "bags": lambda: bags.sorted_bags(WIDE.slot_BN.reshape(-1), WIDE.sizes().reshape(-1), torch.float32).offsets,
    "budgets": lambda: torch.tensor(EAdaPruneProcessor(0.9).budgets(X), device=CPU),
}


@pytest.mark.parametrize("what", MADE)
def test_tensors_are_made_where_the_tokens_are(what):
    """Catches a new tensor on the default device, which on an accelerator stops the run or copies to the host."""
    # What is kept for each grid is made once, before the default device is another.
    before = MADE[what]()
    with torch.device("meta"):
        made = MADE[what]()
    pairs = [(before, made)] if torch.is_tensor(made) else zip(parts(before), parts(made), strict=True)
    for first, second in pairs:
        assert second.device == CPU and torch.equal(first, second)


def parts(plan: TokenMap) -> list[torch.Tensor]:
    """Both index tensors of a plan."""
    return [plan.slot_BN, plan.anchor_BM]


def test_a_plan_shows_and_takes_its_two_tensors_alone():
    """Catches what a plan keeps printed with it, or given by who makes it."""
    plan = TokenMap(ROW.slot_BN, ROW.anchor_BM)
    plan.merge(X), plan.between(1, 1)
    assert repr(plan) == f"TokenMap(slot_BN={ROW.slot_BN!r}, anchor_BM={ROW.anchor_BM!r})"
    for number in (1, 2, 3):
        with pytest.raises(TypeError):
            TokenMap(ROW.slot_BN, ROW.anchor_BM, *[{}] * number)
    assert not TokenMap(ROW.slot_BN, ROW.anchor_BM)._wide_cache


def test_what_a_graph_reads_is_its_own(monkeypatch):
    """Catches a table that is kept for eager calls but lies in a graph's memory, or one that a graph reads and that
    is forgotten with later shapes.
    """
    kept = tables.counting(2, 7, CPU)
    assert tables.counting(2, 7, CPU) is kept
    monkeypatch.setattr(tables, "is_capturing", lambda: True)
    captured = tables.counting(2, 7, CPU)
    assert captured is not kept
    assert torch.equal(captured, kept)
    monkeypatch.undo()
    assert tables.counting(2, 7, CPU) is kept
