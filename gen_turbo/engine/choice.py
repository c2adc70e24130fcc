"""Which layers of a denoiser a reducer takes, and the ratio of each."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from gen_turbo.method import TokenReducer
from gen_turbo.models.adapter import Adapter, LayerSpec
from gen_turbo.tokens.ratios import ratio_of_layer


def layers_of(model: nn.Module, adapter: Adapter, reducer: TokenReducer) -> list[LayerSpec]:
    """What the reducer's scope covers: attention layers or blocks.

    Raises:
        ValueError: If blocks are asked for and the family has none, or the ratio is out of reach.
    """
    reducer.check_reach()
    if reducer.scope in ("attention", "auto"):
        return adapter.layers(model)
    blocks, name = adapter.blocks(model), type(model).__name__
    if not blocks:
        raise ValueError(f"scope={reducer.scope!r} has no blocks to merge in {name}; use scope='attention'")
    if reducer.scope == "model" and not adapter.is_transformer:
        raise ValueError(f"scope='model' needs a transformer, {name} is none; use scope='block'")
    return blocks


def without_auto(reducer: TokenReducer) -> TokenReducer:
    """The reducer with a definite scope: itself, or a copy whose scope is "attention" in place of "auto"."""
    if reducer.scope != "auto":
        return reducer
    told = copy.copy(reducer)
    told.scope = "attention"
    return told


def chosen_layers(
    reducer: TokenReducer, layers: list[LayerSpec], model_name: str, names: Sequence[str] | None = None
) -> list[tuple[LayerSpec, float]]:
    """The layers that are reduced and the ratio of each, by level and by name.

    Args:
        reducer: The settings.
        layers: Every layer or block of the scope.
        model_name: For messages.
        names: Those that are looked at, which may be none; all of them where this is None.

    Raises:
        ValueError: If a level or a layer that is named is not there, or none is chosen.
    """
    able = [layer for layer in layers if not layer.left_alone]
    levels = sorted({layer.downsample for layer in able})
    if not levels:
        raise ValueError(f"this {model_name} has no self-attention in transformer blocks; nothing can be reduced")
    unknown = sorted(set(reducer.ratios) - set(levels))
    if unknown:
        raise ValueError(f"ratios names downsample factors {unknown}, but {model_name} has attention at {levels}")
    _check_patterns(reducer, able, model_name)
    coarsest = levels[0] if reducer.max_downsample is None else reducer.max_downsample
    by_level = {level: reducer.ratio for level in levels if level <= coarsest} | reducer.ratios
    named = [
        (layer, ratio_of_layer(layer.name, by_level.get(layer.downsample, -1), reducer.layer_ratios)) for layer in able
    ]
    chosen = [(layer, ratio) for layer, ratio in named if ratio >= 0 and (names is None or layer.name in names)]
    if not chosen and names is None:
        raise ValueError(
            f"max_downsample={coarsest} and no ratios: no layer would be reduced, the finest is at {levels[0]}"
        )
    return chosen


def unmatched(reducer: TokenReducer, layers: Sequence[LayerSpec]) -> list[str]:
    """The patterns of `layer_ratios` that name none of the layers which can be reduced."""
    names = [layer.name for layer in layers if not layer.left_alone]
    return [pattern for pattern in reducer.layer_ratios if not any(fnmatchcase(name, pattern) for name in names)]


def _check_patterns(reducer: TokenReducer, able: list[LayerSpec], model_name: str) -> None:
    for pattern in unmatched(reducer, able):
        raise ValueError(
            f"layer_ratios names {pattern!r}, which is no layer of {model_name} that can be reduced; there are: "
            f"{', '.join(layer.name for layer in able)}"
        )
