"""What of a denoiser can be skipped: the whole of it, a transformer block, or the inside of a UNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from gen_turbo.engine.base import DenoiserHost, Form
from gen_turbo.training.schedule import WHOLE


@dataclass(frozen=True)
class Unit:
    """Something that one forecast stands for.

    Attributes:
        name: As schedules name it.
        module: The path of the module whose result is forecast; empty for the whole model.
        idle: Paths of the other modules that need not run then, for only what is forecast reads them.
        form: Of a block, whose change of its input is forecast; None where the result itself is.
    """

    name: str
    module: str
    idle: tuple[str, ...] = ()
    form: Form | None = None


class SkippingHost(DenoiserHost, Protocol):
    """A family of denoisers that knows what can be skipped in them."""

    def units(self, model: nn.Module) -> dict[str, Unit]:
        """Everything that can be skipped, by name."""
        ...


def units_of(model: nn.Module, host: DenoiserHost, cuts: Sequence[Unit] = ()) -> dict[str, Unit]:
    """Everything that can be skipped in a model, by name.

    Args:
        model: The model.
        host: Its family, which knows the blocks.
        cuts: What can be skipped besides.
    """
    blocks = [Unit(layer.name, layer.name, form=layer.form) for layer in host.blocks(model)]
    return {unit.name: unit for unit in [Unit(WHOLE, ""), *cuts, *blocks]}
