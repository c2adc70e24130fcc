"""Semantic value and the penalty made of it."""

from __future__ import annotations

from typing import Any

import oracles
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gen_turbo.tokens import score
from gen_turbo.tokens.score import attention_column_mean, information_penalty, mean_one, text_attention

# Softmax in float32 against Python's float64.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


def attention_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries of 3 and keys of 6 tokens in 2 rows, 2 heads, 4 channels, and a log size per key."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, 4, generator=generator), torch.randn(2, 2, 6, 4, generator=generator)
    return 2 * q, 2 * k, torch.rand(2, 6, generator=generator)


@pytest.mark.parametrize("is_sized", [False, True])
def test_column_mean_equals_the_loop(is_sized: bool) -> None:
    """Catches a softmax over queries, a missing scale, and log sizes added to the wrong axis."""
    q, k, log_size = attention_inputs()
    value = attention_column_mean(q, k, log_size if is_sized else None)
    for b in range(2):
        biases = log_size[b].tolist() if is_sized else [0.0] * 6
        expected = oracles.attention_column_mean(q[b].tolist(), k[b].tolist(), biases)
        torch.testing.assert_close(value[b], torch.tensor(expected), **ROUNDING)


def test_column_mean_of_heads_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches heads left out, or parts of another number of heads that count as much, where memory parts them."""
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 5, 3, 4, generator=generator), torch.randn(2, 5, 6, 4, generator=generator)
    whole = attention_column_mean(q, k)
    for most in (1, 2 * 3 * 6 * 2, 2 * 3 * 6 * 4):
        monkeypatch.setattr(score, "_MOST_ON_CPU", most)
        torch.testing.assert_close(attention_column_mean(q, k), whole, **ROUNDING)
    for row in range(2):
        expected = oracles.attention_column_mean(q[row].tolist(), k[row].tolist(), [0.0] * 6)
        torch.testing.assert_close(whole[row], torch.tensor(expected), **ROUNDING)


class _Counted(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_operators_do_not_grow_with_heads() -> None:
    """Catches a loop over heads in Python: on an accelerator every operator is a launch."""
    counts = []
    for heads in (1, 16):
        q, k = (torch.empty(1, heads, count, 8, device="meta") for count in (64, 256))
        with _Counted() as counted:
            attention_column_mean(q, k)
        counts.append(counted.count)
    assert counts[0] == counts[1]


def test_half_attention_is_summed_in_float32() -> None:
    """Catches a column mean in half precision, where a value of 1/N of many tokens loses its digits."""
    q, k, _ = attention_inputs()
    value = attention_column_mean(q.half(), k.half())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.sum(1), torch.ones(2), **ROUNDING)


def test_penalty_has_the_weight_as_its_mean_on_any_scale() -> None:
    """Catches a penalty that shrinks with the number of tokens or with the scale of the value."""
    value = torch.rand(2, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mean_one(value).mean(1), torch.ones(2), **ROUNDING)
    share = value / value.sum(1, keepdim=True)
    torch.testing.assert_close(information_penalty(1000 * value, 0.26), 0.26 * 7 * share, **ROUNDING)


def test_no_value_anywhere_gives_no_penalty() -> None:
    """Catches a division by zero."""
    assert torch.equal(information_penalty(torch.zeros(1, 4), 0.5), torch.zeros(1, 4))


class _Logits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "softmax" in str(func):
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "most", "keys"), [("cpu", 2**18, 1024), ("meta", 2**24, 65536)])
def test_logits_are_held_as_documented(device: str, most: int, keys: int) -> None:
    """Catches more logits at once than the memory meant for them, fewer than there is room for, and none."""
    for heads, queries, expected in [
        (6, 64, [most // 4 * 4, most // 4 * 2]),
        (3, 256, [most] * 3),
        (2, 512, [2 * most] * 2),
        (2, 1, [keys * 2]),
    ]:
        q, k = (torch.zeros(1, heads, count, 2, device=device) for count in (queries, keys))
        with _Logits() as logits:
            attention_column_mean(q, k)
        assert logits.sizes == expected


def test_heads_of_other_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches heads without a partner that are left out in silence."""
    monkeypatch.setattr(score, "_MOST_ON_CPU", 1)
    q, k = torch.zeros(1, 2, 3, 4), torch.zeros(1, 3, 6, 4)
    for value in (lambda: attention_column_mean(q, k), lambda: text_attention(q, k, torch.ones(1, 6))):
        with pytest.raises(ValueError, match="shorter|longer"):
            value()
