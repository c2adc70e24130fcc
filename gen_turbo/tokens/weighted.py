"""Attention in which a key may stand for several tokens, without a mask.

Shape names: B batch, H heads, S queries, N keys, D channels of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weigh_keys(q_BHSD: Tensor, k_BHND: Tensor, log_size_BN: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Appends two channels to queries and keys that add the logarithm of each key's size to its logits.

    A key of size s then takes part in the softmax as s equal keys would (proportional attention, Bolya et al., 2022,
    arXiv 2210.09461, Section 3), and as there is no mask, every attention kernel can compute it.

    Args:
        q_BHSD: Queries; the new channels are 1.
        k_BHND: Keys; the new channels are `log_size / scale` and what their type rounds off of it, which in bfloat16 is
            up to 2 % of a large key's weight.
        log_size_BN: Logarithm of the number of tokens that each key stands for; zero for a single token. A batch of
            one, or one that divides the keys' batch, serves any.
        scale: What the attention multiplies its logits by; give it to the attention call too, for the default would
            follow the new number of channels.

    Returns:
        Queries (B, H, S, D + p) and keys (B, H, N, D + p), padded with zero channels to a multiple of 8, which fast
        kernels want.
    """
    channels = q_BHSD.shape[-1]
    num_new = -(-(channels + 2) // 8) * 8 - channels
    exact = (log_size_BN.float() / scale).repeat(k_BHND.shape[0] // len(log_size_BN), 1)
    bias = exact.to(k_BHND.dtype)
    q_new = q_BHSD.new_zeros(*q_BHSD.shape[:-1], num_new)
    q_new[..., :2] = 1
    k_new = k_BHND.new_zeros(*k_BHND.shape[:-1], num_new)
    k_new[..., 0] = bias[:, None, :]
    k_new[..., 1] = (exact - bias.float()).to(k_BHND.dtype)[:, None, :]
    return torch.cat([q_BHSD, q_new], -1), torch.cat([k_BHND, k_new], -1)


def default_scale(q_BHSD: Tensor) -> float:
    """One over the square root of the channels of a head, as attention scales its logits."""
    return 1 / math.sqrt(q_BHSD.shape[-1])
