"""Turbo in a vision encoder as slow loops, from the formulas of the paper and its released code."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

NORMS = (("layer_norm1", "layernorm_before"), ("layer_norm2", "layernorm_after"))


def attend(x_NC: Tensor, sizes: list[int], attn: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    """Proportional attention of one image: its output, keys averaged over heads, attention (H, N, N)."""
    normed = norm(x_NC)
    heads, width = attn.num_heads, x_NC.shape[1] // attn.num_heads
    if hasattr(attn, "qkv"):
        q, k, v = attn.qkv(normed).chunk(3, -1)
        out = attn.projection
    else:
        q, k, v = attn.q_proj(normed), attn.k_proj(normed), attn.v_proj(normed)
        out = attn.out_proj if hasattr(attn, "out_proj") else attn.projection_layer
    mixed, maps = [], []
    for head in range(heads):
        place = slice(head * width, (head + 1) * width)
        logits = q[:, place] @ k[:, place].T / math.sqrt(width) + torch.tensor(sizes).log()[None]
        maps.append(logits.softmax(-1))
        mixed.append(maps[-1] @ v[:, place])
    keys = torch.stack([k[:, h * width : (h + 1) * width] for h in range(heads)]).mean(0)
    return out(torch.cat(mixed, -1)), keys, torch.stack(maps)


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
    x_NC: Tensor, blocks: list[nn.Module], leading: int, removed: int, weight: float, used: int | None = None
) -> tuple[Tensor, list[int], list[list[int]]]:
    """Runs blocks on one image (N, C), of which the first `used` merge.

    Gives the tokens left, their sizes, and which tokens each stands for.
    """
    sizes, members = [1] * len(x_NC), [[index] for index in range(len(x_NC))]
    for index, block in enumerate(blocks):
        attn = block.self_attn if hasattr(block, "self_attn") else block.attention
        norms = [getattr(block, a) if hasattr(block, a) else getattr(block, b) for a, b in NORMS]
        attended, keys, maps = attend(x_NC, sizes, attn, norms[0])
        x_NC = x_NC + getattr(block, "lambda_1", 1) * attended
        value = maps[:, 0].mean(0) if leading else maps.mean((0, 1))
        now = removed if used is None or index < used else 0
        stays, pairs = merge_block(keys, value, leading, now, weight)
        sums = [x_NC[token] * sizes[token] for token in range(len(x_NC))]
        for i, j in pairs:
            sums[j] = sums[j] + sums[i]
            sizes[j] += sizes[i]
            members[j] = members[j] + members[i]
        x_NC = torch.stack([sums[token] / sizes[token] for token in stays])
        sizes, members = [sizes[token] for token in stays], [members[token] for token in stays]
        x_NC = x_NC + getattr(block, "lambda_2", 1) * block.mlp(norms[1](x_NC))
    return x_NC, sizes, members
