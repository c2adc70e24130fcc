"""A method on one vision-language model: the list of its stages, and what the report says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

from gen_turbo.engine.base import LayerReport, OnModel
from gen_turbo.method import TokenReducer
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.call import Calls
from gen_turbo.vlm.counts import Counts, DecoderCounts
from gen_turbo.vlm.cross import CrossGate, StatesGate
from gen_turbo.vlm.decoder import Cut
from gen_turbo.vlm.families import FAMILIES
from gen_turbo.vlm.family import Family, tower_facts
from gen_turbo.vlm.fits import check_place, check_routing, tower_attention, tower_needs
from gen_turbo.vlm.gate import Gate
from gen_turbo.vlm.grouping import Grouping, grouping_facts
from gen_turbo.vlm.images import Group
from gen_turbo.vlm.layers import Choice, RoutedCounts, Skipping
from gen_turbo.vlm.packed import PackedTower
from gen_turbo.vlm.planning import Schedule, plan_copies
from gen_turbo.vlm.routes import Routed
from gen_turbo.vlm.run import Listener
from gen_turbo.vlm.running import Running
from gen_turbo.vlm.settings import check_settings, may_remove, placement_of
from gen_turbo.vlm.shrink import Shrink
from gen_turbo.vlm.sight import Sight
from gen_turbo.vlm.stage import Stage
from gen_turbo.vlm.text import TextMerge
from gen_turbo.vlm.tower import Tower
from gen_turbo.vlm.unread import Unread
from gen_turbo.vlm.videos import Videos
from gen_turbo.vlm.weighing import Weighing
from gen_turbo.vlm.words import Words

S = TypeVar("S", bound=Stage)


class VlmPart(OnModel):
    """A method on one model.

    Attributes:
        reducer: The method.
        stages: What is done to the model, in the order in which it is placed.

    Raises:
        ValueError: If the method does not fit the model. Nothing was changed then.
    """

    def __init__(self, model: nn.Module, family: Family, reducer: TokenReducer) -> None:
        super().__init__(model)
        self.reducer = reducer
        self._counts = Counts()
        self._undo: list[Callable[[], None]] = []
        if isinstance(reducer, Routed):
            self.stages = _routed(model, family, reducer, self._counts)
        elif family.is_cross:
            self.stages = _beside_text(model, family, reducer, self._counts)
        else:
            self.stages = _in_prompt(model, family, reducer, self._counts)
        for stage in self.stages:
            stage.is_idle = not (isinstance(reducer, Routed) or may_remove(reducer))

    def stage(self, kind: type[S]) -> S | None:
        """The stage of a kind; None where there is none."""
        return next((stage for stage in self.stages if isinstance(stage, kind)), None)

    def watch(self, listener: Listener) -> bool:
        """Notifies a listener of every reduction of image tokens in a prompt from the next call on.

        Returns:
            Whether there is any place where the tokens of a prompt are reduced.
        """
        places = [stage for stage in self.stages if isinstance(stage, Gate | Cut)]
        for place in places:
            place.listeners.append(listener)
        return bool(places)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Where tokens leave."""
        return tuple(row.name for row in self._counts.rows if row.status == "reduced")

    @property
    def remembered_bytes(self) -> int:
        """Bytes held now between the calls of the model: what is known of the images seen last."""
        return sum(stage.num_bytes for stage in self.stages)

    @property
    def most_remembered_bytes(self) -> int:
        """The most bytes held at once: nothing is kept of images seen before."""
        return self.remembered_bytes

    def rows(self) -> list[LayerReport]:
        """One row per place where tokens leave."""
        return self._counts.rows

    def install(self) -> None:
        """Places every stage; where one fails, those before it are off again."""
        try:
            for stage in self.stages:
                self._undo.append(stage.install(self.model))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Takes every stage off, the last first; doing it twice is harmless."""
        while self._undo:
            self._undo.pop()()
        for stage in self.stages:
            stage.forget()


def _in_prompt(model: nn.Module, family: Family, reducer: TokenReducer, counts: Counts) -> list[Stage]:
    """The stages where image tokens stand in the prompt of a language model."""
    check_place(model, family, reducer)
    placement, base, text = placement_of(reducer), model.get_submodule(family.base), model.get_submodule(family.text)
    place = placement.place
    config: Any = text.config
    calls: Calls[Running] = Calls(Running)
    is_taken = place in ("pre_llm", "decoder") and not tower_needs(reducer)
    videos = Videos(base, family.frames, calls, is_taken, reducer.across_frames)
    tower = _tower(model, family, reducer, counts, videos)
    sight = Sight(base, family, calls, videos, tower)
    words = Words(model, counts, reducer) if reducer.text_ratio else None
    schedule = Schedule(reducer, config.num_hidden_layers)
    decoder = DecoderCounts(counts, schedule, text, family.text)
    cuts, has_copies = [first for first in schedule.firsts if first], place in ("input", "tower", "projector")
    shared = reducer if not has_copies and (reducer.adaptive or hasattr(reducer, "budgets")) else None

    def plan(tokens: Tensor, group: Group) -> TokenMap:
        return schedule.plan(0, tokens, group, group.value)

    planner = plan_copies if has_copies else plan if 0 in schedule.firsts else None
    gate = Gate(
        base,
        text,
        family,
        calls,
        sight,
        videos,
        planner,
        # What the tower or a smaller image made equal is its own mean; features of inner blocks are not.
        is_merged=placement.combine == "merge" and place != "projector",
        is_weighed=reducer.proportional_attention,
        shared=shared,
        words=words,
        removes_later=schedule.removes if cuts and may_remove(reducer) else None,
    )
    gate.listeners.append(decoder.note)
    stages: list[Stage | None] = [*_unread(model, family, calls), videos, tower, sight, words, gate]
    if cuts:
        cut = Cut(text, calls, cuts, schedule.plan, shared)
        cut.listeners.append(decoder.note)
        stages.append(cut)
    return [stage for stage in stages if stage is not None]


def _tower(
    model: nn.Module, family: Family, reducer: TokenReducer, counts: Counts, videos: Videos
) -> Tower | PackedTower | Shrink | Grouping | None:
    """The stage on the vision tower, or between it and the projector, where a method needs one."""
    place, facts = placement_of(reducer).place, tower_facts(model, family)
    if place == "projector":
        facts = grouping_facts(model, family, reducer)
        return Grouping(model, facts, counts, reducer) if reducer.removes else None
    reads = tower_attention(reducer)
    if facts is None or not (reads or place in ("input", "tower")):
        return None
    if place == "input":
        return Shrink(model, facts, counts, reducer)
    early = getattr(reducer, "early_block", None)
    kind = PackedTower if facts.is_packed else Tower
    return kind(model, facts, counts, reducer if place == "tower" else None, reads, early, videos)


def _unread(model: nn.Module, family: Family, calls: Calls[Running]) -> list[Stage]:
    """The stage that skips blocks of a tower that nothing reads; none for towers that it does not know."""
    facts = tower_facts(model, family)
    return [] if facts is None else [Unread(model, facts, calls)]


def _beside_text(model: nn.Module, family: Family, reducer: TokenReducer, counts: Counts) -> list[Stage]:
    """The stages where text reads the image by cross-attention."""
    check_place(model, family, reducer)
    place = placement_of(reducer).place
    is_merged = placement_of(reducer).combine == "merge"
    facts = grouping_facts(model, family, reducer) if place == "projector" else tower_facts(model, family)
    if facts is None and family.pieces is not None:
        text, length = model.get_submodule(family.text), family.pieces(model.get_submodule(family.base))
        return [StatesGate(text, length, counts, family.text, reducer, is_merged)]
    assert facts is not None
    if place == "projector" and not reducer.removes:
        counts.add(facts.module)
        return []
    if place == "projector":
        return [Grouping(model, facts, counts, reducer, is_cross=True)]
    if place == "input":
        stages: list[Stage] = [Shrink(model, facts, counts, reducer)]
    elif place == "tower":
        stages = [Tower(model, facts, counts, reducer)]
    else:
        tower = Tower(model, facts, counts, semantic=tower_attention(reducer))
        stages = [tower, CrossGate(tower, counts, facts.module, reducer, is_merged)]
    if reducer.text_ratio:
        stages.append(TextMerge(model, counts, reducer))
    return stages


def _routed(model: nn.Module, family: Family, reducer: Routed, counts: Counts) -> list[Stage]:
    """The stages of a method that looks at the whole prompt and chooses tokens and layers."""
    assert isinstance(reducer, TokenReducer)
    if family.is_cross:
        raise ValueError(
            f"{type(model).__name__} has no image tokens in its prompt, among which a router chooses; use the method "
            "turbo"
        )
    check_settings(reducer, type(model).__name__, family.grids is not None)
    base, text = model.get_submodule(family.base), model.get_submodule(family.text)
    routing = reducer.routing(model, text)
    check_routing(model, text.config, routing)
    calls: Calls[Running] = Calls(Running)
    choice, videos = Choice(routing, calls), Videos(base, family.frames, calls)
    counted = RoutedCounts(text, family.text, calls, counts, routing)
    if routing.mode != "soft" and routing.ratio == 0 and routing.num_layers >= counted.depth:
        # Everything is kept: there is nothing to choose.
        return []
    drops = routing.mode == "drop" and routing.ratio > 0
    planner = choice.plan if drops and routing.first == 0 else None
    sight = Sight(base, family, calls, videos)
    gate = Gate(base, text, family, calls, sight, videos, planner, on_prompt=choice.ask)
    gate.listeners.append(counted.note)
    layers = Skipping(text, calls, choice) if routing.mode == "drop" else Weighing(text, calls, choice)
    stages: list[Stage] = [*_unread(model, family, calls), sight, videos, gate, layers]
    if drops and routing.first:
        cut = Cut(text, calls, [routing.first], lambda first, tokens, group, semantic: choice.plan(tokens, group))
        cut.listeners.append(counted.note)
        stages.append(cut)
    return [*stages, counted]


class VlmAdapter:
    """One family, as `attach` sees it."""

    def __init__(self, family: Family) -> None:
        self.family, self.models = family, family.models

    def attachment(self, model: nn.Module, reducer: TokenReducer, pipeline: Any | None) -> VlmPart:
        """Prepares a method for one model and changes nothing yet."""
        return VlmPart(model, self.family, reducer)


ADAPTERS = tuple(map(VlmAdapter, FAMILIES))
