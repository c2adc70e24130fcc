"""Whether a method fits a vision-language model, said before anything is changed."""

from __future__ import annotations

from typing import Any

from torch import nn

from gen_turbo.method import TokenReducer
from gen_turbo.vlm.decoder import check_cut, check_read, has_recurrences, has_windows
from gen_turbo.vlm.family import Family, tower_facts
from gen_turbo.vlm.routes import Routing
from gen_turbo.vlm.settings import Staged, check_settings, elsewhere, inner_of, placement_of
from gen_turbo.vlm.shrink import can_shrink
from gen_turbo.vlm.text import check_text
from gen_turbo.vlm.words import check_words


def check_place(model: nn.Module, family: Family, reducer: TokenReducer) -> None:
    """Says before anything is changed why a place does not fit a model."""
    placement = placement_of(reducer)
    name = type(model).__name__
    has_grid = family.grids is not None or family.is_cross
    has_frames = family.frames is not None and not family.has_lone_frames
    check_settings(reducer, name, has_grid, family.is_cross, has_frames)
    if family.is_cross:
        check_text(model, reducer)
    else:
        check_words(model, reducer, placement.place)
    if reducer.proportional_attention:
        check_weighed(model, family)
    facts = tower_facts(model, family)
    if placement.place == "input":
        # Behind pooling or tiles, the copies of a patch are no image tokens that could leave.
        if facts is None or not can_shrink(model, facts) or not (facts.projector or family.is_cross):
            raise ValueError(f"this {name} reads no smaller images; use the method pool instead")
        return
    reads_patches = facts is not None and bool(facts.projector or facts.is_packed or family.is_cross)
    if tower_needs(reducer) and (placement.place in ("decoder", "projector") or not reads_patches):
        place = "use place='pre_llm' or " if reads_patches else "use "
        raise ValueError(
            f"at place={placement.place!r} the tokens of {name} are no patches of its vision tower, whose attention "
            f"this method reads; {place}a method without it, such as divprune"
        )
    if placement.place == "tower" and facts is None:
        raise ValueError(f"the vision tower of this {name} cannot be reduced; {elsewhere(reducer)}")
    _check_decoder(model, family, reducer, name)


def tower_needs(reducer: TokenReducer) -> set[str]:
    """The kinds of attention of a vision tower without which a method cannot work."""
    return {"class", "self"} & set(inner_of(reducer).needs)


def tower_attention(reducer: TokenReducer) -> str:
    """The kind of attention of a vision tower that a method reads before the language model; empty for none."""
    wanted: str = getattr(reducer, "semantic", "")
    return wanted if wanted in ("class", "self") and placement_of(reducer).place == "pre_llm" else ""


def _check_decoder(model: nn.Module, family: Family, reducer: TokenReducer, name: str) -> None:
    """Says why tokens cannot leave inside the language model where a method wants that."""
    is_staged, placement = isinstance(reducer, Staged), placement_of(reducer)
    if family.is_cross and (is_staged or hasattr(reducer, "budgets")):
        raise ValueError(
            f"{name} has no image tokens in its prompt, which {type(reducer).__name__} works on; use the method turbo"
        )
    if family.is_cross and placement.place == "decoder":
        raise ValueError(f"{name} has no image tokens in its prompt; {elsewhere(reducer)}")
    if not is_staged and placement.place != "decoder":
        return
    config: Any = model.get_submodule(family.text).config
    firsts = reducer.stages(config.num_hidden_layers, 1) if isinstance(reducer, Staged) else (placement.layer,)
    for first in firsts:
        if first:
            check_cut(model, config, first, "cut" if is_staged else "layer", elsewhere(reducer))
            if {"last", "next"} & set(inner_of(reducer).needs):
                check_read(model, model.get_submodule(f"{family.text}.layers.{first}"))


def check_weighed(model: nn.Module, family: Family) -> None:
    """Says why keys of a language model cannot weigh by how many tokens they stand for.

    Raises:
        ValueError: If its kernel takes no mask, or a layer makes its own or chooses keys by it.
    """
    config: Any = model.get_submodule(family.text).config
    name, kernel = type(model).__name__, config._attn_implementation
    if kernel not in ("sdpa", "eager"):
        raise ValueError(f"proportional_attention weighs keys by a mask, which {kernel} does not take; use 'sdpa'")
    if getattr(config, "indexer_types", None):
        raise ValueError(f"{name} chooses which keys it sees by their mask; leave proportional_attention out")
    is_recurrent = has_recurrences(config)
    if is_recurrent or (has_windows(config) and not family.masks_in_base):
        kind = "recurrent layers" if is_recurrent else "sliding windows"
        raise ValueError(f"{name} has {kind}, where keys cannot be weighed; leave proportional_attention out")


def check_routing(model: nn.Module, config: Any, routing: Routing) -> None:
    """Says before anything is changed why a routing does not fit a model, whose language model has this configuration.

    Raises:
        ValueError: Naming the setting.
    """
    if not 1 <= routing.num_layers <= config.num_hidden_layers:
        raise ValueError(
            f"{routing.num_layers} layers are to run, but {type(model).__name__} has {config.num_hidden_layers}"
        )
    # Before the first layer only sliding windows are in the way.
    check_cut(model, config, routing.first or config.num_hidden_layers - 1, "first", "use the method turbo")
    attention = config._attn_implementation
    if routing.mode != "drop" and "flash" in (attention or ""):
        raise ValueError(f"mode={routing.mode!r} hides tokens by a mask, which {attention} does not take; use 'sdpa'")
