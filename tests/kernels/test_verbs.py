"""The verbs on flat index tensors, in torch's form."""

from __future__ import annotations

import pytest
import torch
from flat_maps import FlatMap, flat_map, merged, random_map, terms, unmerge, values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gen_turbo.tokens.token_map import TokenMap

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


@st.composite
def maps(draw: st.DrawFn) -> FlatMap:
    """Maps of one to three rows and up to 24 tokens."""
    num_tokens = draw(st.integers(1, 24))
    return random_map(draw(st.integers(1, 3)), num_tokens, draw(st.integers(1, num_tokens)), draw(st.integers(0, 999)))


def restored(y: Tensor, flat: FlatMap, given: dict[str, Tensor]) -> Tensor:
    """The sum that `restore` stands for, with plain indexing."""
    change = y - given["minus"] if "minus" in given else y
    total = torch.stack([row[slot] for row, slot in zip(change, flat.slot_BN, strict=True)])
    total = total + given["base"] if "base" in given else total
    for term, weight in zip(given.get("detail", ()), (1, 3), strict=False):
        total = total + term * weight
    return total


def token_map(flat: FlatMap) -> TokenMap:
    """The package's own map with the same slots; anchors do not matter to the verbs."""
    return TokenMap(flat.slot_BN, torch.zeros(len(flat.slot_BN), flat.num_slots, dtype=torch.int64))


@PROPERTY
@given(maps())
def test_both_are_bit_equal_to_the_token_map(flat: FlatMap) -> None:
    """Catches another order of summation, a mean taken by division, and slots numbered without the batch row."""
    batch, num_tokens = flat.slot_BN.shape
    x, y = values(batch, num_tokens, 5), values(batch, flat.num_slots, 5)
    assert torch.equal(merged(x, flat), token_map(flat).merge(x)) or flat.num_slots == num_tokens
    assert torch.equal(unmerge(y, flat.slot), token_map(flat).unmerge(y)) or flat.num_slots == num_tokens


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    """Catches sums in half precision, which lose the small terms of a large slot."""
    flat = flat_map(torch.zeros(1, 3000, dtype=torch.int64), 1)
    x = values(1, 3000, 4, dtype=dtype) + 10
    exact = x.double().mean(1, keepdim=True)
    assert torch.equal(merged(x, flat), exact.to(dtype))


def test_float64_stays_float64() -> None:
    """Catches a fallback that narrows what it cannot pass to a kernel."""
    flat = random_map(2, 12, 5, 0, torch.float64)
    x = values(2, 12, 3).double() * (1 + 1e-12)
    expected = torch.stack([x[0][flat.slot_BN[0] == slot].mean(0) for slot in range(5)])
    torch.testing.assert_close(merged(x, flat)[0], expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(unmerge(merged(x, flat), flat.slot), restored(merged(x, flat), flat, {}))


def test_an_empty_slot_gives_zeros() -> None:
    """Catches a division by its size."""
    flat = flat_map(torch.tensor([[0, 2, 2]]), 4)
    assert merged(values(1, 3, 2), flat)[0, [1, 3]].eq(0).all()


@PROPERTY
@given(maps(), st.sets(st.sampled_from(["base", "minus", "detail"])), st.integers(1, 2), st.booleans())
def test_every_combination_is_added(flat: FlatMap, names: set[str], num_terms: int, is_recorded: bool) -> None:
    """Catches a term left out, taken from the wrong rows or subtracted after the copy, and inputs overwritten."""
    given = {name: term for name, term in terms(flat, 4).items() if name in names | {"weights"}}
    if "detail" in given:
        given["detail"] = given["detail"][:num_terms]
    y = values(len(flat.slot_BN), flat.num_slots, 4, seed=9).requires_grad_(is_recorded)
    before = {name: term.clone() for name, term in given.items()}
    torch.testing.assert_close(unmerge(y, flat.slot, **given), restored(y, flat, given), **ROUNDING)
    assert all(torch.equal(term, before[name]) for name, term in given.items())


def test_terms_are_added_in_the_order_of_the_engine() -> None:
    """Catches a sum that differs in the last bit from adding base, residual and the slope's steps one by one."""
    flat = random_map(2, 24, 7, 0)
    given, y = terms(flat, 4), values(2, 7, 4)
    expected = given["base"] + token_map(flat).unmerge(y - given["minus"])
    expected.add_(given["detail"][0]).add_(given["detail"][1], alpha=3)
    assert torch.equal(unmerge(y, flat.slot, **given), expected)


def test_strides_do_not_matter() -> None:
    """Catches rows read as if the tensor were contiguous: a part of a sequence, of the channels, a transposed one."""
    flat = random_map(2, 12, 5, 0)
    whole = values(2, 15, 8)
    for x in (whole[:, 3:], whole[:, 1:13, 2:6], values(2, 6, 12).transpose(1, 2), whole[:1, :12].expand(2, -1, -1)):
        assert torch.equal(merged(x, flat), merged(x.contiguous(), flat))
        y, given = x[:, :5], {"base": x, "minus": x[:, 5:10]}
        packed = {name: term.contiguous() for name, term in given.items()}
        assert torch.equal(unmerge(y, flat.slot, **given), unmerge(y.contiguous(), flat.slot, **packed))


def test_a_map_of_another_size_is_refused() -> None:
    """Catches an image of a new size merged by the map of the last one."""
    with pytest.raises(ValueError, match="24 entries for 2 x 11 tokens; make a map for this size"):
        merged(values(2, 11, 3), random_map(2, 12, 5, 0))


def test_gradients_pass_through_every_term() -> None:
    """Catches an addition in place that cuts the graph, and a kernel without a backward."""
    flat = random_map(2, 6, 3, 0, torch.float64)
    double = {name: term.double().requires_grad_(name != "weights") for name, term in terms(flat, 2).items()}
    x, y = values(2, 6, 2).double().requires_grad_(), values(2, 3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: merged(x, flat), (x,))
    restored = lambda y, *given: unmerge(y, flat.slot, **dict(zip(double, given, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(restored, (y, *double.values()))
