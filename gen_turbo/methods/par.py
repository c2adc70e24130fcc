"""PAR: which tokens and which layers run, chosen together under a budget."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from gen_turbo.contract import Frame, Site, TokenReducer
from gen_turbo.core.plan import ReductionPlan
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.registry import METHODS


@METHODS.register("par")
@dataclass
class PARProcessor(ReductionProcessor):
    """Prunes tokens and layers together so that a run costs what the budget allows.

    Pruning All-Rounder (PAR, ICCV 2025): one controller decides over tokens and layers. In a denoiser it is a
    schedule, found by `gen-turbo calibrate par` on the model's own outputs: every step runs, runs on fewer tokens, or
    skips blocks, or the whole model, whose result is then forecast from the last steps that ran them. In a
    vision-language model it is a router that reads the prompt and keeps the image tokens and the decoder layers of
    highest score.

    Costs memory for what forecasts are made of; see `gen_turbo.report`.

    Differs from the paper, which is about language models: denoisers, forecasts and schedules are ours.

    Attributes:
        budget: Share of the stock model's cost that may be spent, in (0, 1]; 1 leaves the model as it is.
        schedule: For denoisers, the file of a schedule; None takes the one that ships for this model.
        router: For vision-language models, the file of a trained router; None takes the one that ships for this model.
        inner: How tokens are merged where the model runs on fewer: a method's name, which works with the settings of
            this object that all methods share, a mapping with `method` and its settings, a processor, or None to
            merge none.
    """

    ratio: float = 0.7
    budget: float = 0.5
    schedule: str | None = None
    router: str | None = None
    inner: Any = "turbo"

    def __post_init__(self) -> None:
        """Checks every setting; raises ValueError."""
        super().__post_init__()
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget must be a share of the stock model's cost, 0 < budget <= 1; got {self.budget}")

    @property
    def max_ratio(self) -> float:
        """The largest ratio that the inner method can reach."""
        reducer = self.reducer()
        return 1.0 if reducer is None else reducer.max_ratio

    def reducer(self) -> TokenReducer | None:
        """The method that merges tokens; None where none are merged.

        Raises:
            ValueError: If there is no such method, or a setting does not fit.
        """
        if self.inner is None or isinstance(self.inner, TokenReducer):
            return self.inner
        shared = {field.name: getattr(self, field.name) for field in fields(TokenReducer)}
        given = {"method": self.inner} if isinstance(self.inner, str) else dict(self.inner)
        name = given.pop("method", None)
        if name not in METHODS or name == "par":
            known = ", ".join(other for other in METHODS.names() if other != "par")
            raise ValueError(f"inner must name a method that merges tokens; got {name!r}, known: {known}")
        reducer: TokenReducer = METHODS[name](**shared | given)
        return reducer

    def plan(self, tokens: Tensor, site: Site, frame: Frame) -> ReductionPlan:
        """Plans the merge of tokens (B, N, C) as the inner method does."""
        reducer = self.reducer()
        if reducer is None:
            return ReductionPlan.identity(1, tokens.shape[1], tokens.device)
        return reducer.plan(tokens, site, frame)
