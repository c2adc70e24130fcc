"""A token reducer that diffusers can call as an attention processor; every method is a subclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from gen_turbo.config import read_yaml, typed
from gen_turbo.method import Grid, LayerInfo, StepInfo, TokenReducer
from gen_turbo.models import register
from gen_turbo.registry import METHODS
from gen_turbo.tokens.token_map import TokenMap

register.add_pipeline_methods()


@dataclass
class ReductionProcessor(TokenReducer):
    """A method as users hold it: `pipe.set_attn_processor(TurboProcessor(0.4))`.

    It keeps no state: what a run remembers lives with the model it is attached to, so one object may serve many
    models. `attach` and `pipe.set_attn_processor` put it in front of each layer; a model's own `set_attn_processor`
    does not, and its first call says so.
    """

    @classmethod
    def preset(cls, name: str) -> Self:
        """Makes the processor of a file in configs/preset, such as "fidelity", "balanced" or "fast".

        Raises:
            ValueError: If there is no such preset, or it is one of another method.
        """
        tree = read_yaml("preset", name)
        method = tree.pop("method")
        if METHODS[method] is not cls:
            raise ValueError(f"preset {name!r} is of the method {method!r}; use {METHODS[method].__name__}.preset")
        return typed(cls, tree, f"preset {name!r}")

    def plan_tokens(self, tokens: Tensor, grid: Grid | None = None) -> TokenMap:
        """Plans the reduction of tokens (B, N, C) on a (height, width) grid; None where there is no grid.

        Raises:
            ValueError: If the grid does not hold N tokens, or more tokens are to leave than can.
        """
        self.check_reach()
        if tokens.ndim != 3:
            raise ValueError(f"tokens must be (batch, tokens, channels), got {tuple(tokens.shape)}")
        if grid is not None and grid[0] * grid[1] != tokens.shape[1]:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} does not hold {tokens.shape[1]} tokens; pass (h, w)")
        return self.plan(tokens, LayerInfo("tokens", self.ratio, grid), StepInfo())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses to work in one layer of a model alone, which knows neither grid nor step.

        Raises:
            TypeError: Always, with the lines that attach.
        """
        name = type(self).__name__
        raise TypeError(
            f"{name} is not set on a model but attached: give the model its own processors back, for instance by "
            f"`model.set_attn_processor(AttnProcessor2_0())`, and call `pipe.set_attn_processor({name}(...))` or "
            f"`gen_turbo.attach(model, {name}(...))`"
        )
