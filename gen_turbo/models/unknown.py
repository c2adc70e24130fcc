"""Denoisers of no known family: nothing of them is reduced, but whole calls can be left out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gen_turbo.models.adapter import Geometry, LayerSpec, ModelCall, Unit, units_of
from gen_turbo.models.conditions import Text
from gen_turbo.models.inputs import time_of

_SAMPLES = ("hidden_states", "sample", "x", "latents", "latent_model_input")
_TIMES = ("timestep", "timesteps", "t", "time", "sigma")
_CONDITIONS = ("encoder_hidden_states", "prompt_embeds", "cap_feats", "context", "class_labels", "y")


class UnknownAdapter:
    """Any model whose arguments hold latents and a time by one of their usual names."""

    models: tuple[str, ...] = ()
    is_transformer = is_one_stack = has_references = False
    positions: Mapping[str, tuple[str, ...]] = {}

    def takes(self, model: nn.Module) -> bool:
        """Whether a model is given latents and a time."""
        names = inspect.signature(type(model).forward).parameters
        return any(name in names for name in _SAMPLES) and any(name in names for name in _TIMES)

    def layers(self, model: nn.Module) -> list[LayerSpec]:
        """None."""
        return []

    def blocks(self, model: nn.Module) -> list[LayerSpec]:
        """None."""
        return []

    def units(self, model: nn.Module) -> dict[str, Unit]:
        """The whole model."""
        return units_of(model, self)

    def text_signature(self, model: nn.Module) -> Text:
        """None."""
        return "nothing is known of its text"

    def read(self, arguments: Mapping[str, Any]) -> ModelCall:
        """Latents, time and condition of a call; raises ValueError where it has no latents or no time."""
        samples = [arguments[name] for name in _SAMPLES if isinstance(arguments.get(name), Tensor)]
        times = [arguments[name] for name in _TIMES if arguments.get(name) is not None]
        if not samples or not times:
            raise ValueError(
                f"a call with {', '.join(arguments)} shows no latents ({', '.join(_SAMPLES)}) or no time "
                f"({', '.join(_TIMES)}); detach, for nothing of it can be left out"
            )
        conditions = [arguments[name] for name in _CONDITIONS if isinstance(arguments.get(name), Tensor)]
        return ModelCall(samples[0], times[0], conditions[0] if conditions else None)

    def time(self, timestep: Any) -> float:
        """As it is given."""
        return time_of(timestep)

    def geometry(self, model: nn.Module, arguments: Mapping[str, Any]) -> Geometry:
        """Unknown."""
        return Geometry(None)

    def semantic_value(self, layer: nn.Module, tokens: Tensor, kind: str, condition: Tensor | None) -> Tensor | None:
        """None."""
        return None


UNKNOWN = UnknownAdapter()
