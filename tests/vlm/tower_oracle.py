"""Turbo in a vision encoder as slow loops, from the formulas of the paper and its released code."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def attend(x_NC: Tensor, sizes: list[int], attn: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Proportional attention of one picture: the residual sum, keys averaged over heads, attention (H, N, N)."""
    normed = norm(x_NC)
    heads, width = attn.num_heads, x_NC.shape[1] // attn.num_heads
    if hasattr(attn, "qkv"):
        q, k, v = attn.qkv(normed).chunk(3, -1)
        out = attn.projection
    else:
        q, k, v, out = attn.q_proj(normed), attn.k_proj(normed), attn.v_proj(normed), attn.out_proj
    mixed, maps = [], []
    for head in range(heads):
        place = slice(head * width, (head + 1) * width)
        logits = q[:, place] @ k[:, place].T / math.sqrt(width) + torch.tensor(sizes).log()[None]
        maps.append(logits.softmax(-1))
        mixed.append(maps[-1] @ v[:, place])
    keys = torch.stack([k[:, h * width : (h + 1) * width] for h in range(heads)]).mean(0)
    return x_NC + out(torch.cat(mixed, -1)), keys, torch.stack(maps)


def merge_block(
    keys_ND: Tensor, value_N: Tensor, leading: int, removed: int, weight: float
) -> tuple[list[int], list[tuple[int, int]]]:
    """Who stays and who merges into whom: E_ij = R_ij - weight * A_i over an alternating split."""
    patches = list(range(leading, len(keys_ND)))
    destinations, sources = patches[0::2], patches[1::2]
    best = []
    for i in sources:
        cosines = [float(torch.cosine_similarity(keys_ND[i], keys_ND[j], dim=0)) for j in destinations]
        nearest = max(range(len(destinations)), key=lambda j: cosines[j])
        best.append((cosines[nearest] - weight * float(value_N[i]), i, destinations[nearest]))
    pairs = [(i, j) for _, i, j in sorted(best, key=lambda entry: -entry[0])[:removed]]
    gone = {i for i, _ in pairs}
    return [token for token in range(len(keys_ND)) if token not in gone], pairs


@torch.no_grad()
def encode(
    x_NC: Tensor, blocks: list[nn.Module], leading: int, removed: int, weight: float
) -> tuple[Tensor, list[int], list[list[int]]]:
    """Runs blocks on one picture (N, C); gives the tokens left, their sizes, and which patches each stands for."""
    sizes, members = [1] * len(x_NC), [[index] for index in range(len(x_NC))]
    for block in blocks:
        x_NC, keys, maps = attend(x_NC, sizes, block.self_attn, block.layer_norm1)
        value = maps[:, 0].mean(0) if leading else maps.mean((0, 1))
        stays, pairs = merge_block(keys, value, leading, removed, weight)
        sums = [x_NC[token] * sizes[token] for token in range(len(x_NC))]
        for i, j in pairs:
            sums[j] = sums[j] + sums[i]
            sizes[j] += sizes[i]
            members[j] = members[j] + members[i]
        x_NC = torch.stack([sums[token] / sizes[token] for token in stays])
        sizes, members = [sizes[token] for token in stays], [members[token] for token in stays]
        x_NC = x_NC + block.mlp(block.layer_norm2(x_NC))
    return x_NC, sizes, members
