"""Fewer tokens before the projector: semantic tokens that read the image unseen, or any method's plan.

Shape names: B images, N patches, M groups, D channels of the tower.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gen_turbo.method import Grid, LayerInfo, StepInfo, TokenReducer
from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.training.files import artefact_path
from gen_turbo.training.probe import is_same_model, weight_probe
from gen_turbo.training.vistog import SemanticGrouping, VisToGArtefact, VisToGShape
from gen_turbo.vlm.counts import Counts
from gen_turbo.vlm.family import Family, TowerFacts, square, tower_facts
from gen_turbo.vlm.hooks import InstanceMethod
from gen_turbo.vlm.images import Encoded
from gen_turbo.vlm.planning import plan_tokens
from gen_turbo.vlm.semantic import SemanticStream
from gen_turbo.vlm.settings import Grouped, elsewhere
from gen_turbo.vlm.stage import Encoder, Handle


class Grouper(Protocol):
    """Makes M tokens of N patches."""

    def place(self) -> Iterator[Handle]:
        """Puts hooks in place, one after the other, and gives what takes each off."""
        ...

    def groups(self, patches_BND: Tensor, grid: Grid) -> tuple[Tensor, TokenMap]:
        """The groups (B, M, D), and a plan whose anchors are the places that they take among the patches."""
        ...


class _Planned:
    """Groups that a method plans on the patches themselves."""

    def __init__(self, reducer: TokenReducer) -> None:
        self._reducer = reducer

    def place(self) -> Iterator[Handle]:
        return iter(())

    def groups(self, patches_BND: Tensor, grid: Grid) -> tuple[Tensor, TokenMap]:
        site = LayerInfo("projector", self._reducer.ratio_of(patches_BND.shape[1]), grid)
        plan = plan_tokens(self._reducer, patches_BND, site, StepInfo())
        merged = getattr(self._reducer, "combine", "merge") == "merge"
        return plan.merge(patches_BND) if merged else plan.select(patches_BND), plan


class Grouping(Encoder):
    """Between vision tower and projector.

    The projector reads groups alone. What it returns is copied to the places of the patches, so that the model's own
    checks hold, and the gate lets one copy of each into the language model, with mask, positions and cache that fit.
    Where text reads the image by cross-attention, the tower returns class tokens and groups.

    Attributes:
        grouping: The semantic tokens and the grouping layer, for training and for images of groups; None where
            a method plans on patches.
        connector: The trained projector; None to use the model's own.

    Args:
        model: The model.
        facts: What is known of its tower.
        counts: Receives the row of the tower where text reads by cross-attention.
        reducer: The method, which removes some tokens.
        is_cross: Whether text reads the image by cross-attention.

    Raises:
        ValueError: If the weights or numbers of tokens do not fit the model.
    """

    def __init__(
        self, model: nn.Module, facts: TowerFacts, counts: Counts, reducer: TokenReducer, is_cross: bool = False
    ) -> None:
        self.grouping: SemanticGrouping | None = None
        self.connector: nn.Module | None = None
        super().__init__()
        self._facts, self._counts, self._is_cross = facts, counts, is_cross
        self._leading = facts.num_leading(model)
        self._grouper: Grouper = self._grouper_of(model, reducer)
        if is_cross:
            counts.add(facts.module)

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Puts a hook on the tower, or takes the place of the projector's `forward`."""
        yield from self._grouper.place()
        if self._is_cross:
            yield model.get_submodule(self._facts.module).register_forward_hook(self._after_tower)
        else:
            yield InstanceMethod(model.get_submodule(self._facts.projector), "forward", self._project)

    def slots(self) -> Tensor | None:
        """The group of each patch of the images seen last, (B, N); None before the first."""
        if isinstance(self._grouper, SemanticStream):
            return self._grouper.slots.value
        plans = self._last.value.plans
        return torch.cat([plan.slot_BN for plan in plans]) if plans else None

    def probe(self, model: nn.Module) -> Tensor:
        """The sample of the weights that learned groups depend on: tower and projector."""
        return _probe(model, self._facts)

    def copy_connector(self, model: nn.Module) -> nn.Module:
        """A copy of the model's projector that takes its place from now on, to be trained."""
        connector = deepcopy(model.get_submodule(self._facts.projector))
        vars(connector).pop("forward", None)
        self.connector = connector
        return connector

    def _grouper_of(self, model: nn.Module, reducer: TokenReducer) -> Grouper:
        if not isinstance(reducer, Grouped):
            return _Planned(reducer)
        artefact = _artefact(model, self._facts, reducer)
        if artefact is None:
            grouping = SemanticGrouping(_shape(model, self._facts, reducer)).eval()
            artefact = VisToGArtefact(grouping, {}, weight_probe([]), {})
        self.grouping = artefact.grouping
        self.connector = _connector(model, self._facts, artefact)
        return SemanticStream(model, self._facts, self.grouping)

    def _groups(self, patches: Tensor) -> tuple[Tensor, TokenMap]:
        groups, seats = self._grouper.groups(patches, _grid(patches))
        self._last.value = Encoded(seats.by_row() if len(seats.slot_BN) == len(patches) else [seats] * len(patches))
        return groups, seats

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _project(self, forward: Any, patches: Tensor) -> Tensor:
        groups, seats = self._groups(patches)
        if self.connector is not None:
            self._follow(self.connector, groups)
        projected: Tensor = (self.connector or forward)(groups)
        return seats.unmerge(projected)

    @staticmethod
    def _follow(connector: nn.Module, groups: Tensor) -> None:
        """Moves the trained projector to where the model has moved since it was attached to."""
        weight = next(connector.parameters(), groups)
        if not connector.training and (weight.device != groups.device or weight.dtype != groups.dtype):
            connector.to(groups.device, groups.dtype)

    def _after_tower(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        tokens: Tensor = output.last_hidden_state
        patches = tokens[:, self._leading :]
        groups, _ = self._groups(patches)
        images = len(patches)
        self._counts.count(self._facts.module, images * patches.shape[1], images * groups.shape[1], _grid(patches))
        output.last_hidden_state = torch.cat([tokens[:, : self._leading], groups], 1)
        return output


def grouping_facts(model: nn.Module, family: Family, reducer: TokenReducer) -> TowerFacts:
    """The facts of a tower whose patches can be grouped before they are read.

    Raises:
        ValueError: If there is none, or something else than patches is read.
    """
    name, facts, config = type(model).__name__, tower_facts(model, family), model.config
    if facts is None or not (facts.projector or family.is_cross):
        raise ValueError(f"{name} has no projector that reads plain patches; {elsewhere(reducer)}")
    layers: Any = getattr(config, "vision_feature_layer", None)
    if isinstance(layers, (list, tuple)) and len(layers) > 1:
        raise ValueError(f"the projector of this {name} reads {len(layers)} layers of the tower; {elsewhere(reducer)}")
    if getattr(config, "vision_feature_select_strategy", None) == "full" and facts.num_leading(model):
        raise ValueError(f"the projector of this {name} reads the class token; set vision_feature_select_strategy")
    return facts


def _probe(model: nn.Module, facts: TowerFacts) -> Tensor:
    return weight_probe(model.get_submodule(path) for path in (facts.module, facts.projector) if path)


def _shape(model: nn.Module, facts: TowerFacts, settings: Any) -> VisToGShape:
    """The sizes of untrained groups; raises ValueError if no patch would leave."""
    tower: Any = model.get_submodule(facts.module)
    num_patches = (tower.config.image_size // tower.config.patch_size) ** 2
    num_groups = settings.num_tokens or num_patches - num_removed(num_patches, settings.ratio_of(num_patches))
    if settings.num_tokens >= num_patches:
        raise ValueError(f"num_tokens must be below the {num_patches} patches of an image; got {num_groups}")
    if num_groups == num_patches:
        raise ValueError(f"none of the {num_patches} patches of an image would leave; raise ratio or set num_tokens")
    return VisToGShape(num_groups, tower.config.hidden_size, settings.first_block)


def _artefact(model: nn.Module, facts: TowerFacts, settings: Grouped) -> VisToGArtefact | None:
    if settings.weights is None:
        return None
    artefact = VisToGArtefact.load(artefact_path(settings.weights))
    num_groups = artefact.grouping.shape.num_groups
    if settings.num_tokens not in (0, num_groups):
        raise ValueError(f"{settings.weights} was trained for num_tokens={num_groups}; got {settings.num_tokens}")
    if not is_same_model(artefact.probe, _probe(model, facts)):
        raise ValueError(f"{settings.weights} was trained for another model; make weights: gen-turbo calibrate vistog")
    _check_fits(model, facts, artefact, settings.weights)
    return artefact


def _check_fits(model: nn.Module, facts: TowerFacts, artefact: VisToGArtefact, path: str) -> None:
    """Refuses learned parts whose sizes are not those of the tower and the projector; raises ValueError."""
    tower: Any = model.get_submodule(facts.module)
    shape, config = artefact.grouping.shape, tower.config
    num_patches = (config.image_size // config.patch_size) ** 2
    if shape.width != config.hidden_size or shape.first_block >= config.num_hidden_layers:
        raise ValueError(f"{path} is of {shape}, which does not fit a tower of {config.hidden_size} channels")
    if shape.num_groups >= num_patches:
        raise ValueError(f"{path} has {shape.num_groups} groups, no fewer than the {num_patches} patches of an image")
    own = model.get_submodule(facts.projector).state_dict() if facts.projector else {}
    sizes = [{name: weight.shape for name, weight in one.items()} for one in (artefact.connector, own)]
    if artefact.connector and sizes[0] != sizes[1]:
        raise ValueError(f"{path} has a projector of other weights than this model's")


def _connector(model: nn.Module, facts: TowerFacts, artefact: VisToGArtefact) -> nn.Module | None:
    """The trained projector on the device and in the type of the model's own."""
    if not artefact.connector:
        return None
    connector = deepcopy(model.get_submodule(facts.projector))
    connector.load_state_dict(artefact.connector)
    return connector.eval()


def _grid(patches: Tensor) -> Grid:
    return square(patches.shape[1]) or (1, patches.shape[1])
