"""A reducer on one vision-language model: what is put in place, what it does to a call, and the way back."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from itertools import pairwise
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.engine.base import LayerReport, NoEffectWarning, OnModel
from gen_turbo.method import Grid, LayerInfo, StepInfo, TokenReducer
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.training.layouts import layer_multiplications
from gen_turbo.vlm.cross import CrossGate
from gen_turbo.vlm.decoder import Cut
from gen_turbo.vlm.family import Family, tower_facts
from gen_turbo.vlm.fits import check_place, tower_attention, tower_needs
from gen_turbo.vlm.gate import Gate
from gen_turbo.vlm.hooks import placed, settle
from gen_turbo.vlm.origin import Seen
from gen_turbo.vlm.packed import PackedTower
from gen_turbo.vlm.planning import plan_tokens
from gen_turbo.vlm.run import FRAME, Group, Images, Reduction
from gen_turbo.vlm.settings import Staged, may_remove, placement_of
from gen_turbo.vlm.shrink import Shrink
from gen_turbo.vlm.text import TEXT_ENCODER, TextMerge
from gen_turbo.vlm.tower import EARLY, Tower
from gen_turbo.vlm.words import PROMPT, Words


class VlmPart(OnModel):
    """A reducer on one model.

    Raises:
        ValueError: If the family has no such place, or the place does not fit the model.
    """

    def __init__(self, model: nn.Module, family: Family, reducer: TokenReducer) -> None:
        super().__init__(model)
        self.reducer = reducer
        self._family = family
        self._placement = placement_of(reducer)
        self._handles: list[Any] = []
        self._rows: dict[str, LayerReport] = {}
        self._segments: dict[str, tuple[int, int]] = {}
        self._counting = Lock()
        check_place(model, family, reducer)
        self._tower: Tower | PackedTower | Shrink | None = None
        self._gate: Gate | None = None
        self._cut: Cut | None = None
        self._cross: CrossGate | None = None
        self._text = TextMerge(model, reducer) if reducer.text_ratio and family.is_cross else None
        self._prepare(model)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Where tokens leave."""
        return tuple(self._rows)

    @property
    def remembered_bytes(self) -> int:
        """Bytes held now between the calls of the model: what is known of the images seen last."""
        return self._gate.seen.num_bytes if self._gate is not None else 0

    @property
    def most_remembered_bytes(self) -> int:
        """The most bytes held at once: nothing is kept of images seen before."""
        return self.remembered_bytes

    def rows(self) -> list[LayerReport]:
        """One row per place where tokens leave."""
        return list(self._rows.values())

    def install(self) -> None:
        """Puts every hook in place."""
        for stage in (self._tower, self._cross, self._gate, self._cut, self._text):
            if stage is not None:
                placed(stage.install(), self._handles)
        if self._gate is not None:
            if self._gate.words is not None:
                placed(self._gate.words.install(self.model), self._handles)
            self._handles.append(self._gate.watch(self._note))
        settle(self.model, self._handles, is_idle=not may_remove(self.reducer))

    def remove(self) -> None:
        """Takes every hook off; doing it twice is harmless."""
        for handle in reversed(self._handles):
            handle.remove()
        if self._gate is not None:
            self._gate.seen = Seen()
        self._handles = []

    def _prepare(self, model: nn.Module) -> None:
        place, family = self._placement.place, self._family
        facts = tower_facts(model, family)
        if place == "input":
            self._prepare_image(model)
        elif facts is not None and (place == "tower" or family.is_cross or tower_attention(self.reducer)):
            kind = PackedTower if facts.is_packed else Tower
            self._tower = kind(model, facts, self.reducer if place == "tower" else None)
            self._tower.on_block = self._note_block
            self._tower.is_video = lambda: self._gate is not None and self._gate.videos.is_encoding
            early = getattr(self.reducer, "early_block", None)
            self._tower.early = early(self._tower.num_blocks) if early is not None else None
        if place == "tower":
            assert isinstance(self._tower, (Tower, PackedTower))
            self._rows.update(
                {name: LayerReport(name, 1, "reduced") for name in map(self._block_name, self._tower.watched)}
            )
        if self._text is not None:
            self._text.on_merge = partial(self._note_text, TEXT_ENCODER)
            self._rows[TEXT_ENCODER] = LayerReport(TEXT_ENCODER, 1, "reduced")
        if family.is_cross:
            self._prepare_cross()
            return
        base, text = model.get_submodule(family.base), model.get_submodule(family.text)
        planners = dict.fromkeys(("tower", "input"), self._plan_duplicates) | {"pre_llm": self._plan_at_gate}
        planner = self._plan_at_gate if isinstance(self.reducer, Staged) else planners.get(place)
        # What the tower or a smaller image made equal is its own mean; features of inner blocks are not.
        self._gate = Gate(base, text, family, planner, self._placement.combine == "merge")
        self._gate.videos.is_taken = place in ("pre_llm", "decoder") and not tower_needs(self.reducer)
        self._gate.shared = self.reducer if self.reducer.adaptive or hasattr(self.reducer, "budgets") else None
        if self.reducer.text_ratio:
            self._gate.words = Words(model, self.reducer)
            self._gate.words.on_reduction = partial(self._note_text, PROMPT)
            self._rows[PROMPT] = LayerReport(PROMPT, 1, "reduced")
        names = self._name_stages(text, family.text)

        def note(first: int, images: Images, reduction: Reduction) -> None:
            self._note_reduction(names[first], images, reduction)

        self._gate.on_reduction = partial(note, 0)
        if cuts := {first: partial(self._plan_at_cut, first) for first in names if first}:
            self._cut = Cut(text, self._gate, cuts)
            self._cut.on_reduction = note
            self._gate.has_cut = lambda length: may_remove(self.reducer) and self._removes(length)

    def _name_stages(self, text: Any, path: str) -> dict[int, str]:
        """Adds a row for the decoder layers from each place where tokens leave on; gives their names by first layer."""
        self._depth: int = text.config.num_hidden_layers
        placement = self._placement
        firsts = [placement.layer if placement.place == "decoder" else 0]
        if isinstance(self.reducer, Staged):
            firsts = list(self.reducer.stages(self._depth, 1))
        names = {first: f"{path}.layers.{first}" if first else path for first in firsts}
        for first, end in pairwise([*firsts, self._depth]):
            # The first row has the layers before it too, which save nothing.
            start = 0 if first == firsts[0] else first
            self._segments[names[first]] = token_flops(text, start, end), token_flops(text, first, end)
            self._rows[names[first]] = LayerReport(names[first], 1, "reduced")
        return names

    def _removes(self, length: int) -> bool:
        """Whether some tokens of an image of so many are to leave."""
        if isinstance(self.reducer, Staged):
            return min(self.reducer.stages(self._depth, length).values()) < length
        return num_removed(length, self.reducer.ratio_of(length)) > 0

    def _ratio(self, group: Group, first: int) -> float:
        """The fraction of a group's tokens that is removed before a decoder layer."""
        if not isinstance(self.reducer, Staged):
            return group.ratio(self.reducer)
        return group.ratio_to(self.reducer.stages(self._depth, group.whole or group.length)[first])

    def _prepare_image(self, model: nn.Module) -> None:
        facts = tower_facts(model, self._family)
        assert facts is not None
        self._tower = Shrink(model, facts, self.reducer)
        self._tower.on_shrink = lambda grid, before, after: self._count(facts.module, grid, before, after, 0, 0)
        self._rows[facts.module] = LayerReport(facts.module, 1, "reduced")

    def _prepare_cross(self) -> None:
        if self._placement.place == "pre_llm":
            assert isinstance(self._tower, Tower)
            name = self._tower.facts.module
            self._cross = CrossGate(self._tower, self.reducer, self._placement.combine == "merge")
            self._cross.on_reduction = lambda before, after: self._count(name, None, before, after, 0, 0)
            self._rows[name] = LayerReport(name, 1, "reduced")

    def _block_name(self, index: int) -> str:
        assert self._tower is not None
        return f"{self._tower.facts.module}.{index}"

    def _note(self, seen: Seen) -> None:
        """Keeps what the tower knows of the images whose features were just made."""
        if self._tower is None:
            return
        seen.plans = self._tower.plans()
        wanted = tower_attention(self.reducer)
        if not wanted:
            return
        for when in ("", EARLY) if getattr(self._tower, "early", None) is not None else ("",):
            for kind in dict.fromkeys((wanted, "self")):
                values = self._tower.values(when + kind)
                if values is not None:
                    seen.values[when + kind] = values
                    break

    def _plan_at_gate(self, tokens: Tensor, group: Group) -> TokenMap:
        site = LayerInfo("pre_llm", self._ratio(group, 0), group.grid, semantic=lambda kind: self._value(kind, group))
        return plan_tokens(self.reducer, tokens, site, StepInfo())

    def _plan_at_cut(self, first: int, tokens: Tensor, group: Group) -> TokenMap:
        def semantic(kind: str) -> Tensor | None:
            assert self._cut is not None and self._cut.images is not None
            if kind not in ("last", "next"):
                return None
            images = self._cut.images
            return self._cut.attention(kind)[images.is_image_BL][images.index(group)]

        site = LayerInfo("decoder", self._ratio(group, first), group.grid, semantic=semantic)
        return plan_tokens(self.reducer, tokens, site, StepInfo())

    def _plan_duplicates(self, tokens: Tensor, group: Group) -> TokenMap:
        """The tower's own plan, whose slots are equal tokens now; nothing where features are no longer patches."""
        assert self._gate is not None
        plans = self._gate.seen.plans
        if all(plan.num_tokens != group.length for plan in plans):
            return TokenMap.identity(1, group.length, tokens.device)
        found = [plans[origin] for origin in self._origins(group)]
        slot, anchor = ([getattr(plan, name) for plan in found] for name in ("slot_BN", "anchor_BM"))
        return TokenMap(torch.cat(slot), torch.cat(anchor))

    def _value(self, kind: str, group: Group) -> Tensor | None:
        assert self._gate is not None
        values = self._gate.seen.values.get(kind, [])
        if all(len(value) != group.length for value in values):
            return None
        origins = self._origins(group)
        return None if FRAME in origins else torch.stack([values[origin] for origin in origins])

    def _origins(self, group: Group) -> list[int]:
        """Which of the tower's images each of a group's is; beam search repeats them."""
        assert self._gate is not None and self._gate.images is not None
        found = [self._gate.images.origins[image] for image in group.images]
        origins = [origin for origin in found if origin is not None]
        if len(origins) < len(found):
            raise ValueError(
                "the image features of this call were not made by this model's tower while the reducer was attached; "
                "pass pixel_values instead of features made before"
            )
        return origins

    def _note_block(self, index: int, before: int, after: int) -> None:
        self._count(self._block_name(index), None, before, after, 0, 0)

    def _note_text(self, name: str, before: int, after: int, words: int) -> None:
        self._count(name, None, before, after, 0, 0)
        if before == after and num_removed(words, self.reducer.text_ratio or 0) == 0:
            warnings.warn(
                f"no word was removed from texts of {words} words at text_ratio {self.reducer.text_ratio}; raise it",
                NoEffectWarning,
                stacklevel=2,
            )

    def _note_reduction(self, name: str, images: Images, reduction: Reduction) -> None:
        wholes = images.wholes or images.lengths
        before, after = sum(wholes), sum(reduction.lengths())
        grid = images.grids[0] if images.grids else None
        columns = images.num_columns or images.is_image_BL.numel()
        cost, saved = self._segments[name]
        # Layers before a cut run on every column.
        self._count(
            name, grid, before, after, columns * cost - (columns - reduction.num_columns) * saved, columns * cost
        )
        longest, is_last = max(wholes), name == next(reversed(self._segments))
        if after == before and is_last and self.reducer.removes and not self._removes(longest):
            asked = f"keep {self.reducer.keep}" if self.reducer.keep is not None else f"ratio {self.reducer.ratio}"
            more = "lower `keep`" if self.reducer.keep is not None else "raise `ratio`"
            warnings.warn(
                f"no token was removed from images of {longest} tokens at {asked}; {more}",
                NoEffectWarning,
                stacklevel=2,
            )

    def _count(self, name: str, grid: Grid | None, before: int, after: int, flops: int, stock: int) -> None:
        with self._counting:
            row = self._rows[name]
            self._rows[name] = replace(
                row,
                grid=grid,
                num_tokens=before,
                num_kept=after,
                num_full=row.num_full + (before == after),
                num_reduced=row.num_reduced + (before != after),
                flops=row.flops + flops,
                stock_flops=row.stock_flops + stock,
            )


def token_flops(text: nn.Module, first: int = 0, end: int | None = None) -> int:
    """Operations of one token in the decoder layers from the first to the end, without attention between tokens."""
    layers: Any = text.layers
    return 2 * sum(layer_multiplications(layer, text.config) for layer in layers[first:end])
