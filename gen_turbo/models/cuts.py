"""Where a UNet can be cut: the last layers of the way up run, all that is deeper is one forecast."""

from __future__ import annotations

from typing import Any

from torch import nn

from gen_turbo.models.adapter import Unit

_KNOWN = {
    "down": {"DownBlock2D", "CrossAttnDownBlock2D"},
    "up": {"UpBlock2D", "CrossAttnUpBlock2D"},
}
"""Blocks whose order of layers and skip connections is known; Kandinsky's and others' are not cut."""


def unet_cuts(model: nn.Module) -> list[Unit]:
    """One unit per layer of the way up, `deep.1` for all but the last layer, and so on.

    What enters the last layers is forecast; they still read the skip connections of the way down, of which only the
    beginning has to run. DeepCache (Ma et al., CVPR 2024, arXiv 2312.00858) holds that value instead.
    """
    if not all(type(block).__name__ in _KNOWN[way] for way in _KNOWN for block in _blocks(model, way)):
        return []
    ups = [(index, layer) for index, block in enumerate(_blocks(model, "up")) for layer in range(len(block.resnets))]
    down = _skip_connections(model)
    # Without a middle block nothing enters the first layer that could be forecast.
    most = len(ups) - (getattr(model, "mid_block", None) is None)
    return [_cut(model, *ups[-kept], kept, down) for kept in range(1, most + 1)]


def _cut(model: nn.Module, block: int, layer: int, kept: int, down: list[list[tuple[int, str]]]) -> Unit:
    idle = [name for modules in down if modules[0][0] >= kept for _, name in modules[:1]]
    idle += [name for modules in down if modules[0][0] < kept for place, name in modules[1:] if place >= kept]
    has_middle = getattr(model, "mid_block", None) is not None
    before = ["mid_block"] * has_middle + [f"up_blocks.{index}" for index in range(block)]
    for index in range(layer):
        before.append(f"up_blocks.{block}.resnets.{index}")
        if _has_attention(model.up_blocks[block]):  # type: ignore[index]
            before.append(f"up_blocks.{block}.attentions.{index}")
    return Unit(f"deep.{kept}", before[-1], (*idle, *before[:-1]))


def _skip_connections(model: nn.Module) -> list[list[tuple[int, str]]]:
    """Of each block down: itself by its first skip connection, then its modules by the one that they serve."""
    place, found = 1, []
    for index, block in enumerate(_blocks(model, "down")):
        modules = [(place, f"down_blocks.{index}")]
        for layer in range(len(block.resnets)):
            names = ["resnets", "attentions"] if _has_attention(block) else ["resnets"]
            modules += [(place, f"down_blocks.{index}.{name}.{layer}") for name in names]
            place += 1
        for layer in range(len(getattr(block, "downsamplers", None) or ())):
            modules.append((place, f"down_blocks.{index}.downsamplers.{layer}"))
        place += bool(getattr(block, "downsamplers", None))
        found.append(modules)
    return found


def _has_attention(block: Any) -> bool:
    return len(getattr(block, "attentions", None) or ()) == len(block.resnets)


def _blocks(model: nn.Module, way: str) -> list[Any]:
    return list(getattr(model, f"{way}_blocks", ()))
