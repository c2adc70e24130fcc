"""Semantic value of tokens from attention, and the penalty that it puts on leaving.

Shape names: B batch, H heads, S queries, N tokens (keys), T text tokens, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_LOGITS, _MOST_ON_CPU = 2**24, 2**18
"""Logits of attention held at once; on a CPU as many as its caches hold."""


def attention_column_mean(q_BHSD: Tensor, k_BHND: Tensor, log_size_BN: Tensor | None = None) -> Tensor:
    """Averages over heads and queries the attention that each token receives.

    The semantic value of Turbo (Ju et al., 2023, arXiv 2312.07408) where there is no class token: the column mean
    of `softmax(q k^T / sqrt(D))`. A strided subset of queries is enough. Heads are taken together,
    as many as have 2^24 logits, on a CPU 2^18, at least one.

    Args:
        q_BHSD: Queries, of all tokens or of a few.
        k_BHND: Keys of all tokens.
        log_size_BN: Added to the logits of each key, for tokens that stand for several (proportional attention).

    Returns:
        (B, N), at least float32, every row summing to one.
    """
    dtype = torch.promote_types(q_BHSD.dtype, torch.float32)
    batch, num_heads, num_queries, dim = q_BHSD.shape
    most = _MOST_ON_CPU if q_BHSD.device.type == "cpu" else _MOST_LOGITS
    at_once = max(1, most // max(1, batch * num_queries * k_BHND.shape[2]))
    total = torch.zeros(1, dtype=dtype, device=q_BHSD.device)
    for q, k in zip(torch.split(q_BHSD, at_once, 1), torch.split(k_BHND, at_once, 1), strict=True):
        logits = ((q * dim**-0.5) @ k.mT).to(dtype)
        if log_size_BN is not None:
            logits = logits + log_size_BN[:, None, None, :]
        total = total + logits.softmax(-1).mean(2).sum(1)
    return total / num_heads


def text_attention(q_BHND: Tensor, k_BHTD: Tensor, is_word_BT: Tensor) -> Tensor:
    """Averages over heads the share of its attention to text that each image token gives to words.

    The semantic value of Turbo (arXiv 2312.07408) as the text sees it, `A_i = mean_h sum_(words t) P[h, i, t]` with
    `P = softmax(q k^T / sqrt(D))` over all text tokens, as in the cross-attention that it is read from: a token that
    belongs to nothing in the text rests on what is no word, such as the beginning of the text.

    Args:
        q_BHND: Cross-attention queries of the image tokens.
        k_BHTD: Cross-attention keys of the text tokens.
        is_word_BT: Which text tokens count.

    Returns:
        (B, N) in [0, 1], at least float32. Costs N * T products per head and holds one head at a time.
    """
    dtype = torch.promote_types(q_BHND.dtype, torch.float32)
    weight_BT1 = is_word_BT[..., None].to(dtype)
    total = torch.zeros(1, dtype=dtype, device=q_BHND.device)
    for q_BND, k_BTD in zip(q_BHND.unbind(1), k_BHTD.unbind(1), strict=True):
        logits = (q_BND * q_BND.shape[-1] ** -0.5) @ k_BTD.mT
        total = total + (logits.to(dtype).softmax(-1) @ weight_BT1)[..., 0]
    return total / q_BHND.shape[1]


def mean_one(value_BN: Tensor) -> Tensor:
    """Scales each row of non-negative values to mean 1, so that weights mean the same at every number of tokens."""
    total = value_BN.sum(1, keepdim=True).clamp_min(torch.finfo(value_BN.dtype).tiny)
    return value_BN / total * value_BN.shape[1]


def information_penalty(value_BN: Tensor, value_weight: float) -> Tensor:
    """Gives what a token's semantic value takes off its redundancy: `value_weight * N * A`, with `A` summing to one.

    The linear fusion of Turbo (arXiv 2312.07408), `E = R - lambda * N * A`: tokens of high `E`, that is of low
    information degree, leave first.

    Args:
        value_BN: Semantic value, non-negative, on any scale.
        value_weight: `lambda`. Raising it protects attended tokens more; an average token is taken off exactly this.

    Differs from the paper: the released weight `30 * alpha` is divided by N, so it means the same at every size.
    """
    return value_weight * mean_one(value_BN)
