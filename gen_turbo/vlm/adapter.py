"""What `attach` needs of the families of vision-language models: the part that works on one model."""

from __future__ import annotations

from typing import Any

from torch import nn

from gen_turbo.method import TokenReducer
from gen_turbo.vlm.families import FAMILIES
from gen_turbo.vlm.family import Family
from gen_turbo.vlm.grouping import GroupingPart
from gen_turbo.vlm.part import VlmPart
from gen_turbo.vlm.routed import RoutedPart
from gen_turbo.vlm.routes import Routed
from gen_turbo.vlm.settings import placement_of


class VlmAdapter:
    """One family, as `attach` sees it."""

    def __init__(self, family: Family) -> None:
        self.family, self.models = family, family.models

    def attachment(self, model: nn.Module, reducer: TokenReducer, pipeline: Any | None) -> Any:
        """Prepares a reducer for one model and changes nothing yet."""
        if isinstance(reducer, Routed):
            return RoutedPart(model, self.family, reducer)
        part = GroupingPart if placement_of(reducer).place == "projector" else VlmPart
        return part(model, self.family, reducer)


ADAPTERS = tuple(map(VlmAdapter, FAMILIES))
