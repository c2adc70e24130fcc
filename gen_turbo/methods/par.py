"""PAR: which tokens and which layers run, chosen together under a budget."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from gen_turbo.method import OF_RESIDUALS, LayerInfo, StepInfo, TokenReducer
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.methods.identity import IdentityProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.training.choosers import CONTROLS, Trained, control
from gen_turbo.training.generic import Generic
from gen_turbo.training.layouts import Layout
from gen_turbo.training.router_file import router_for
from gen_turbo.training.schedule import Schedule
from gen_turbo.training.schedule_file import ScheduleFile, read, shipped
from gen_turbo.vlm.routes import Routed, Routing

GENERIC, AUTO, _TURBO = "generic", "auto", "turbo"


@METHODS.register("par")
@dataclass
class PARProcessor(Routed, ReductionProcessor):
    """Prunes tokens and layers together so that a run costs what the budget allows.

    Pruning All-Rounder (PAR, ICCV 2025, arXiv 2412.06458): one controller decides over tokens and layers. In a denoiser
    it is a schedule, found by `gen-turbo calibrate par` on the model's own outputs: every step runs, runs on fewer
    tokens, or skips blocks, or the whole model, whose result is then forecast from the last steps that ran them. In a
    vision-language model it is a router that reads the prompt and keeps the image tokens and the decoder layers of
    highest score.

    Costs memory for what forecasts are made of; see `gen_turbo.report`.

    Differs from the paper, which is about language models: denoisers, forecasts and schedules are ours.

    Attributes:
        budget: Share of the stock model's cost that may be spent, in (0, 1]; 1 keeps the model as it is.
        schedule: For denoisers, the path of a file of schedules, or what `read` gives of it; "generic" is a rule that
            skips whole calls by their place in the run, for any model, sampler and number of steps; None takes
            the schedules that ship for this model, and the rule for runs that none of them is for. `report` says where
            the rule is at work. `gen-turbo calibrate par` makes schedules that lose less.
        router: For vision-language models, the file of a trained router; None takes the one that ships for this model;
            "random" and "uniform" are controls that do not look at the prompt.
        tokens: For vision-language models, the share of the image tokens that is kept, instead of what the router's
            calibration found best for the budget; alone, every layer runs.
        layers: The same for the number of decoder layers that run; alone, every token stays.
        first: The first decoder layer without the dropped tokens, where `tokens` or `layers` are given; 2 in the paper.
        mode: "drop", or "mask" to compute everything and hide what was dropped, as the released code does.
        threshold: For denoisers, the largest relative error of a unit's last forecast, taken where it ran, at which a
            skip of the schedule is still made; None makes all. Costs a forecast where the unit runs.
        inner: How tokens are merged where the model runs on fewer: a method's name, which works with the settings of
            this object that all methods share, a mapping with `method` and its settings, a processor, or None to
            merge none. "auto" merges in runs whose schedule was better with it, as that schedule says, else nowhere.
    """

    ratio: float = 0.7
    full_every: int = 8
    budget: float = 0.5
    schedule: Any = None
    router: str | None = None
    tokens: float | None = None
    layers: int | None = None
    first: int = 2
    mode: str = "drop"
    threshold: float | None = None
    inner: Any = AUTO

    vlm_settings = ("router", "tokens", "layers", "first", "mode")

    def __post_init__(self) -> None:
        """Checks every setting; raises ValueError."""
        super().__post_init__()
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget must be a share of the stock model's cost, 0 < budget <= 1; got {self.budget}")
        if self.tokens is not None and not 0 < self.tokens <= 1:
            raise ValueError(f"tokens must be the share of image tokens kept, 0 < tokens <= 1; got {self.tokens}")
        if self.mode not in ("drop", "mask"):
            raise ValueError(f"mode must be 'drop' or 'mask'; got {self.mode!r}")
        if self.threshold is not None and self.threshold < 0:
            raise ValueError(f"threshold must not be negative; got {self.threshold}")

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
        return self._reducer(_TURBO if self.inner == AUTO else self.inner)

    def _reducer(self, inner: Any) -> TokenReducer | None:
        """What an inner method stands for."""
        if inner is None or isinstance(inner, TokenReducer):
            return inner
        shared = {field.name: getattr(self, field.name) for field in fields(TokenReducer)}
        given = {"method": inner} if isinstance(inner, str) else dict(inner)
        name = given.pop("method", None)
        if name not in METHODS or name == "par":
            known = ", ".join(other for other in METHODS.names() if other != "par")
            raise ValueError(f"inner must name a method that merges tokens; got {name!r}, known: {known}")
        if (shared | given)["restore"] == "copy":
            # Defaults of PAR's own are nobody's wish.
            for setting in {*OF_RESIDUALS} - {*self.changed(OF_RESIDUALS)}:
                del shared[setting]
        try:
            reducer: TokenReducer = METHODS[name](**shared | given)
        except TypeError as error:
            raise ValueError(f"inner: {name} does not take what is given: {error}") from error
        return reducer

    def routing(self, model: nn.Module, text: nn.Module) -> Routing:
        """Makes the routing of a vision-language model whose language model is `text`.

        Raises:
            ValueError: If there is no router for it, or the budget cannot be met.
        """
        config: Any = text.config
        depth: int = config.num_hidden_layers
        is_given = self.tokens is not None or self.layers is not None
        layout = Layout(self.tokens or 1.0, depth if self.layers is None else self.layers, self.first)
        if self.router in CONTROLS or (self.budget == 1 and not is_given):
            if self.budget < 1 and not is_given:
                raise ValueError(f"router={self.router!r} has no calibration; give tokens and layers")
            chooser = control(self.router or "uniform", depth)
            return Routing(chooser, 1 - layout.tokens, layout.layers, layout.first, self.mode)
        artefact = router_for(model, text, self.router)
        layout = layout if is_given else artefact.layout_at(self.budget, text)
        return Routing(Trained(artefact.router), 1 - layout.tokens, layout.layers, layout.first, self.mode)

    def unread(self, place: str, has_grid: bool) -> dict[str, str]:
        """The settings that nothing reads on a vision-language model, and where they belong."""
        found = dict.fromkeys(("ratio", "schedule", "threshold", "inner"), "denoisers")
        found |= dict.fromkeys(
            ("keep", "adaptive", "text_ratio", "across_frames", "proportional_attention"),
            "methods without a router; give tokens",
        )
        if self.tokens is not None or self.layers is not None:
            found["budget"] = "tokens=None and layers=None"
        else:
            found["first"] = "given tokens or layers"
        return found

    def merging(self, model: nn.Module) -> TokenReducer:
        """What merges tokens in a denoiser; without it, text alone, and within a budget of 1 nothing."""
        if self.budget == 1:
            return IdentityProcessor(0.0)
        inner = self.inner
        if inner == AUTO:
            inner = next((schedule.inner for schedule in self._calibrated(model) if schedule.inner), None)
        reducer = self._reducer(inner)
        return IdentityProcessor(0.0, text_ratio=self.text_ratio) if reducer is None else reducer

    def schedules(self, model: nn.Module) -> list[Schedule | Generic]:
        """The schedules within the budget for a denoiser, one for each length of run, and the rule for other runs.

        Raises:
            ValueError: If what is given was made for another model, or all cost more than the budget.
        """
        if self.budget == 1:
            return []
        is_auto = self.inner == AUTO
        found: list[Schedule | Generic] = [
            schedule.without_merging() if is_auto and schedule.inner is None else schedule
            for schedule in self._calibrated(model)
        ]
        is_fixed = self.schedule is not None and self.schedule != GENERIC
        return found if is_fixed else [*found, Generic(self.budget, is_merged=not is_auto)]

    def _calibrated(self, model: nn.Module) -> list[Schedule]:
        """The best schedules within the budget."""
        if self.schedule == GENERIC:
            return []
        is_merged = None if self.inner == AUTO else self.inner is not None
        if self.schedule is not None:
            file = self.schedule if isinstance(self.schedule, ScheduleFile) else read(self.schedule)
            if not file.is_for(model):
                raise ValueError(
                    f"the schedule was calibrated for another model, a {file.model}; calibrate one for this "
                    f"{type(model).__name__} by gen-turbo calibrate par"
                )
            found = file.at(self.budget, is_merged)
            if self.inner == AUTO and isinstance(found.inner, str) and found.inner != _TURBO:
                raise ValueError(f"the schedule was measured with tokens merged by {found.inner!r}; name it as inner")
            return [found]
        schedules, reasons = list[Schedule](), []

        def clashes(own: Schedule) -> bool:
            # Where schedules say what merges, they have to agree: an attachment merges in one way in all of its runs.
            others = [schedule.inner for schedule in schedules if schedule.inner is not None]
            return is_merged is None and own.inner is not None and own.inner not in (others or [own.inner])

        for file in shipped(model):
            try:
                found = file.at(self.budget, is_merged)
                found = file.at(self.budget, False) if clashes(found) else found
                schedules += [] if clashes(found) else [found]
            except ValueError as error:
                reasons.append(error)
        if reasons and not schedules:
            raise reasons[0]
        return schedules

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        """Plans the merge of tokens (B, N, C) as the inner method does."""
        reducer = self.reducer()
        if reducer is None:
            return TokenMap.identity(1, tokens.shape[1], tokens.device)
        return reducer.plan(tokens, site, frame)
