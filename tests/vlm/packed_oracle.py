"""Turbo in Qwen's vision towers as slow loops over one image's units of 2 x 2 patches, from the formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

PATCHES = 4


@dataclass
class Unit:
    """A unit: its patches (4, C), its rotary tables (4, D) each, its window, and which units of the image it is."""

    x: Tensor
    rotary: tuple[Tensor, Tensor]
    window: tuple[int, int]
    members: list[int]


def begin(tower: Any, pixels: Tensor, height: int, width: int) -> list[Unit]:
    """The units of one image of height x width patches, in the tower's order: window by window."""
    grid = torch.tensor([[1, height, width]])
    x = tower.patch_embed(pixels)
    if hasattr(tower, "pos_embed"):
        index, weight = get_vision_interpolation_indices_and_weights(
            grid, num_grid_per_side=tower.num_grid_per_side, mode="bilinear", align_corners=True, spatial_merge_size=2
        )
        x = x + (tower.pos_embed(index) * weight[:, :, None]).sum(1)
    cos, sin = tower.rotary_pos_emb(x, get_vision_position_ids(grid, 2))
    side = tower.window_size // 2 // tower.patch_size if hasattr(tower, "window_size") else 10**6
    units = []
    for index in range(height * width // PATCHES):
        place = slice(PATCHES * index, PATCHES * (index + 1))
        row, column = divmod(index, width // 2)
        units.append(Unit(x[place], (cos[place], sin[place]), (row // side, column // side), [index]))
    return sorted(units, key=lambda unit: unit.window)


def turn(x_SD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the channels of one head."""
    half = x_SD.shape[1] // 2
    return x_SD * cos + torch.cat([-x_SD[:, half:], x_SD[:, :half]], 1) * sin


def attend(units: list[Unit], block: Any, is_full: bool) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Per unit: what attention adds, its keys without positions as one row, and the attention it receives."""
    attn, added, keys = block.attn, [], []
    received = [0.0] * len(units)
    for unit in units:
        seen = [other for other in range(len(units)) if is_full or units[other].window == unit.window]
        x = torch.cat([units[other].x for other in seen])
        query, own, _ = attn.qkv(block.norm1(unit.x)).chunk(3, -1)
        _, key, value = attn.qkv(block.norm1(x)).chunk(3, -1)
        cos, sin = (torch.cat([units[other].rotary[table] for other in seen]) for table in range(2))
        size = torch.tensor([float(len(units[other].members)) for other in seen for _ in range(PATCHES)])
        width, mixed = query.shape[1] // attn.num_heads, []
        for head in range(attn.num_heads):
            part = slice(head * width, (head + 1) * width)
            logits = turn(query[:, part], *unit.rotary) @ turn(key[:, part], cos, sin).T / math.sqrt(width)
            chances = (logits + size.log()).softmax(-1)
            mixed.append(chances @ value[:, part])
            for place, other in enumerate(seen):
                got = chances[:, PATCHES * place : PATCHES * (place + 1)].sum()
                received[other] += float(got) / attn.num_heads / (PATCHES * len(units))
        added.append(attn.proj(torch.cat(mixed, -1)))
        keys.append(sum(own[:, head * width : (head + 1) * width] for head in range(attn.num_heads)).flatten())
    return added, keys, received


def merge(units: list[Unit], keys: list[Tensor], received: list[float], removed: int, weight: float) -> list[Unit]:
    """Merges the units of highest E_ij = R_ij - weight * A_i, over an alternating split, patch by patch."""
    best = []
    for i in range(1, len(units), 2):
        cosines = {j: float(torch.cosine_similarity(keys[i], keys[j], dim=0)) for j in range(0, len(units), 2)}
        nearest = max(cosines, key=cosines.__getitem__)
        best.append((cosines[nearest] - weight * received[i], i, nearest))
    pairs = [(i, j) for _, i, j in sorted(best, key=lambda entry: -entry[0])[:removed]]
    sums = [unit.x * len(unit.members) for unit in units]
    for i, j in pairs:
        sums[j] = sums[j] + sums[i]
        units[j].members = units[j].members + units[i].members
    gone = {i for i, _ in pairs}
    kept = [index for index in range(len(units)) if index not in gone]
    for index in kept:
        units[index].x = sums[index] / len(units[index].members)
    return [units[index] for index in kept]


@torch.no_grad()
def encode(
    tower: Any, pixels: Tensor, height: int, width: int, removed: int, weight: float
) -> tuple[Tensor, list[Tensor], list[tuple[int, list[int]]]]:
    """Runs the tower on one image.

    Gives the features of every unit in raster order, those of inner blocks, and for every slot the unit that lends
    it its place and the units that it stands for.
    """
    units, deep = begin(tower, pixels, height, width), []
    full = getattr(tower, "fullatt_block_indexes", range(len(tower.blocks)))
    for index, block in enumerate(tower.blocks):
        added, keys, received = attend(units, block, index in full)
        for unit, more in zip(units, added, strict=True):
            unit.x = unit.x + more
        units = merge(units, keys, received, removed, weight)
        for unit in units:
            unit.x = unit.x + block.mlp(block.norm2(unit.x))
        if index in getattr(tower, "deepstack_visual_indexes", ()):
            merger = tower.deepstack_merger_list[list(tower.deepstack_visual_indexes).index(index)]
            deep.append(spread(units, [merger(unit.x) for unit in units]))
    slots = [(unit.members[0], unit.members) for unit in units]
    return spread(units, [tower.merger(unit.x) for unit in units]), deep, sorted(slots)


def spread(units: list[Unit], features: list[Tensor]) -> Tensor:
    """Every unit of the image with the feature of its slot."""
    count = sum(len(unit.members) for unit in units)
    of = {member: feature[0] for unit, feature in zip(units, features, strict=True) for member in unit.members}
    return torch.stack([of[index] for index in range(count)])
