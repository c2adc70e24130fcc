"""`gen-turbo bench host`: what a reduced attention call costs on the host, beside stock's on the short sequence.

Only what surrounds attention is timed: meanwhile a processor that answers at once stands for the layer's own. What is
left is Python and the dispatch of operators that compute next to nothing, which is what a GPU waits for.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tqdm import tqdm

from gen_turbo.api import attach
from gen_turbo.bench import records
from gen_turbo.bench.step_models import StepModel, make
from gen_turbo.bench.timing import Timing, alternate
from gen_turbo.engine.denoiser import DenoiserPart
from gen_turbo.engine.layer import ReducedLayer
from gen_turbo.engine.state import Phase
from gen_turbo.methods.turbo import TurboProcessor

WIDTHS = {"sd15": 0.1, "sdxl": 0.1, "flux": 0.05}
"""Models, each with one of its equal blocks, and the factor on their widths."""
KINDS: dict[str, dict[str, Any]] = {
    "copied": {"restore": "copy", "match_every": 0},
    "residual": {"restore": "residual", "full_every": 100},
}
_LATENTS, _TEXT_TOKENS, _CALLS = 8, 8, 10
_STEPS = 4
"""Two in full and one that may make what later ones use again; calls are timed in the last."""


def run(options: argparse.Namespace) -> None:
    """Measures and records every model and kind; the seconds of a round are those of one call."""
    torch.set_num_threads(options.threads)
    params = {"latents": _LATENTS, "calls": _CALLS, "rounds": options.rounds}
    for model, kind in tqdm([(model, kind) for model in WIDTHS for kind in KINDS], desc="host"):
        name = f"{model} {kind}"
        if records.is_finished(options.records, "host", name, params, options.seed):
            continue
        own, stock = _timed(model, KINDS[kind], options)
        record = records.BenchRecord(
            bench="host",
            setting=name,
            family=kind,
            params=params,
            cpu_s=[t.cpu_s / _CALLS for t in own],
            baseline_cpu_s=[t.cpu_s / _CALLS for t in stock],
            wall_s=[t.wall_s / _CALLS for t in own],
            baseline_wall_s=[t.wall_s / _CALLS for t in stock],
            seed=options.seed,
        )
        records.append(options.records, record)


def _timed(model: str, settings: dict[str, Any], options: argparse.Namespace) -> tuple[list[Timing], list[Timing]]:
    """Each the mean over all reduced layers, by round: reduced, and stock on the short sequence."""
    step = _short_text(make(model, _LATENTS, WIDTHS[model], 1, options.seed))
    with attach(step.model, TurboProcessor(0.4, scope="attention", **settings)) as attachment:
        parts = [part for part in attachment.parts if isinstance(part, DenoiserPart)]
        calls = [_TimedCall(layer, options.rounds) for part in parts for layer in part.layers]
        step.run(_STEPS)
        for call in calls:
            call.leave()
    timed = [call for call in calls if call.own]
    return _mean([call.own for call in timed]), _mean([call.stock for call in timed])


def _short_text(step: StepModel) -> StepModel:
    texts = {name: step.arguments[name] for name in ("encoder_hidden_states", "txt_ids") if name in step.arguments}
    short = {name: text[..., :_TEXT_TOKENS, :] for name, text in texts.items()}
    return replace(step, arguments=step.arguments | short)


@dataclass
class _TimedCall:
    """Stands before a reduced layer and times its call in the last step of a run.

    Attributes:
        own: The reduced call, by round.
        stock: The layer's own forward on what the reduced call gives it.
    """

    layer: ReducedLayer
    rounds: int
    own: list[Timing] = field(default_factory=list)
    stock: list[Timing] = field(default_factory=list)
    num_seen: int = 0

    def __post_init__(self) -> None:
        self.module: Any = self.layer.module
        self.placed = self.module.forward
        self.module.forward = self

    def leave(self) -> None:
        """Gives the layer its place back."""
        self.module.forward = self.placed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.num_seen += 1
        if self.num_seen == _STEPS and self.layer.phase is Phase.REDUCED:
            self._time(args, kwargs)
        return self.placed(*args, **kwargs)

    def _time(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        processor, stock = self.module.processor, type(self.module).forward
        kept: list[Any] = []

        def noted(*given: Any, **named: Any) -> Any:
            kept[:] = [given[1:], named, processor(*given, **named)]
            return kept[-1]

        try:
            self.module.processor = _like(processor, noted)
            self.placed(*args, **kwargs)
            given, named, output = kept
            self.module.processor = _like(processor, lambda *_, **__: output)
            functions = {
                "own": _repeated(lambda: self.placed(*args, **kwargs)),
                "stock": _repeated(lambda: stock(self.module, *given, **named)),
            }
            timings = alternate(functions, self.rounds)
        finally:
            self.module.processor = processor
        self.own, self.stock = timings["own"], timings["stock"]


def _like(processor: Any, function: Callable[..., Any]) -> Any:
    """A processor of the same signature, by which diffusers chooses arguments."""

    @functools.wraps(type(processor).__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return type("Answering", (), {"__call__": call})()


def _repeated(function: Callable[[], Any]) -> Callable[[], None]:
    def repeat() -> None:
        for _ in range(_CALLS):
            function()

    return repeat


def _mean(timings: list[list[Timing]]) -> list[Timing]:
    """The mean over layers, by round."""
    return [
        Timing(statistics.mean(t.cpu_s for t in of_one), statistics.mean(t.wall_s for t in of_one))
        for of_one in zip(*timings, strict=True)
    ]
