"""Tiny transformers of the blocks of Flux with random weights, and the inputs of one call of each."""

from __future__ import annotations

import torch
from diffusers import (
    BriaTransformer2DModel,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    LongCatImageTransformer2DModel,
    OvisImageTransformer2DModel,
)
from torch import nn

from tests.tiny_family import HEADS, NUM_TEXT, random, text


def flux(num_layers: int = 1, num_single_layers: int = 2) -> nn.Module:
    """Flux: double blocks and single blocks."""
    widths = {"in_channels": 8, "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8)}
    return FluxTransformer2DModel(**HEADS, num_layers=num_layers, num_single_layers=num_single_layers, **widths)


def flux_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Text and image positions."""
    pooled, ids = random(batch, 16, seed=4), image_positions(*grid)
    return {**text(batch), "pooled_projections": pooled, "img_ids": ids, "txt_ids": torch.zeros(NUM_TEXT, 3)}


def image_positions(height: int, width: int, number: int = 0, start: int = 0) -> torch.Tensor:
    """One row (number, row, column) per token, rows and columns from `start` on."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows, columns], -1).reshape(-1, 2) + start
    return torch.cat([torch.full((len(places), 1), number), places], 1).float()


def flux2() -> nn.Module:
    """FLUX.2: single blocks whose attention and feed-forward are one projection."""
    shape = {"in_channels": 8, "num_layers": 1, "num_single_layers": 2, "axes_dims_rope": (4, 4, 4, 4)}
    widths = {"joint_attention_dim": 32, "timestep_guidance_channels": 16}
    return Flux2Transformer2DModel(**HEADS, **shape, **widths, guidance_embeds=False)


def flux2_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Positions of four columns, those of the text in the last."""
    last = torch.zeros(grid[0] * grid[1], 1)
    image = torch.cat([image_positions(*grid), last], 1).repeat(batch, 1, 1)
    words = torch.cat([torch.zeros(NUM_TEXT, 3), torch.arange(NUM_TEXT)[:, None]], 1).repeat(batch, 1, 1)
    return {**text(batch), "img_ids": image, "txt_ids": words}


def longcat(cls: type[nn.Module] = LongCatImageTransformer2DModel) -> nn.Module:
    """LongCat-Image, or another model of Flux's blocks that is told no pooled text."""
    widths = {"in_channels": 8, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8)}
    own = {"out_channels": 8} if cls is OvisImageTransformer2DModel else {}
    return cls(**HEADS, num_layers=1, num_single_layers=2, **widths, **own)


def longcat_inputs(batch: int, grid: tuple[int, int], number: int = 1, start: int = 7) -> dict[str, object]:
    """Positions of the image behind those of the text."""
    words = torch.arange(NUM_TEXT)[:, None] * torch.tensor([0.0, 1.0, 1.0])
    return {**text(batch), "img_ids": image_positions(*grid, number, start), "txt_ids": words}


def bria() -> nn.Module:
    """Bria 3.2, which is told thousandths of the time and no pooled text."""
    widths = {"in_channels": 8, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8)}
    return BriaTransformer2DModel(**HEADS, num_layers=1, num_single_layers=2, **widths)


def chroma() -> nn.Module:
    """Chroma: its blocks' modulation comes from a small network."""
    widths = {"in_channels": 8, "joint_attention_dim": 32, "axes_dims_rope": (4, 4, 8)}
    small = {"approximator_num_channels": 16, "approximator_hidden_dim": 16, "approximator_layers": 1}
    return ChromaTransformer2DModel(**HEADS, **widths, **small, num_layers=1, num_single_layers=2)


def chroma_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Positions and a mask that hides the last text token of the last row."""
    mask = torch.ones(batch, NUM_TEXT + grid[0] * grid[1])
    mask[-1, NUM_TEXT - 1] = 0
    given = flux_inputs(batch, grid)
    del given["pooled_projections"]
    return {**given, "attention_mask": mask}
