"""Whether a method fits a vision-language model, said before anything is changed."""

from __future__ import annotations

from torch import nn

from gen_turbo.method import TokenReducer
from gen_turbo.vlm.decoder import check_cut
from gen_turbo.vlm.family import Family, tower_facts
from gen_turbo.vlm.settings import check_settings, inner_of, placement_of
from gen_turbo.vlm.shrink import can_shrink
from gen_turbo.vlm.text import check_text
from gen_turbo.vlm.words import check_words


def check_place(model: nn.Module, family: Family, reducer: TokenReducer) -> None:
    """Says before anything is changed why a place does not fit a model."""
    placement = placement_of(reducer)
    name = type(model).__name__
    check_settings(reducer, name, family.grids is not None or family.is_cross, family.is_cross)
    if family.is_cross:
        check_text(model, reducer)
    else:
        check_words(model, reducer, placement.place)
    facts = tower_facts(model, family)
    if placement.place == "input":
        # Behind pooling or tiles, the copies of a patch are no image tokens that could leave.
        if facts is None or not can_shrink(model, facts) or not (facts.projector or family.is_cross):
            raise ValueError(f"this {name} reads no smaller images; use the method pool instead")
        return
    reads_patches = facts is not None and bool(facts.projector or facts.is_packed or family.is_cross)
    wanted = {"class", "self"} & set(getattr(inner_of(reducer), "needs", ()))
    if wanted and (placement.place in ("decoder", "projector") or not reads_patches):
        raise ValueError(
            f"at place={placement.place!r} the tokens of {name} are no patches of its vision tower, whose attention "
            "this method reads; use place='pre_llm' or a method without it, such as divprune"
        )
    if placement.place == "tower" and facts is None:
        raise ValueError(f"the vision tower of this {name} cannot be reduced; use place='pre_llm' or place='decoder'")
    if placement.place == "decoder" and family.is_cross:
        raise ValueError(f"{name} has no image tokens in its prompt; use place='tower' or place='pre_llm'")
    if placement.place != "decoder":
        return
    check_cut(model, model.get_submodule(family.text).config, placement.layer)
