"""What a pipeline's sampler does with a denoiser's results: recorded runs, and how far a wrong result moves the end.

Runs are seen at the scheduler's `step`, which every pipeline of diffusers calls with the guided result, however often
and on which models it calls for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gen_turbo.engine.placed import Placed
from gen_turbo.engine.values import tensors
from gen_turbo.training.schedule import MOST_BRANCHES

_NUM_PROBED = 6
_FIRST_PROBED = 3
_SHIFT = 0.01
_LEAST = 1e-12
_LEAST_OFF = 1e-4
"""Of the square of guided results, what may be left of them where they are the sum of guidance branches."""


@dataclass
class SampledRun:
    """One run of a pipeline.

    Attributes:
        raw: Results of the models in order.
        calls_before: For each step of the scheduler, how many of them came before it.
        guided: What the scheduler was given at each step, in double precision on the host.
        times: Its times.
        scheduler: The scheduler before the first step.
        arguments: What else it was given at each step.
        final: What its last step gave.
    """

    raw: list[Any] = field(default_factory=list)
    calls_before: list[int] = field(default_factory=list)
    guided: list[Tensor] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    scheduler: Any = None
    arguments: list[tuple[Tensor, Any, Tensor, dict[str, Any]]] = field(default_factory=list)
    final: Tensor = field(default_factory=lambda: torch.zeros(()))


class Enough(Exception):
    """Ends a run behind a step of its scheduler."""


class _Answering(Placed):
    """Answers the first calls by earlier results, and notes the others'."""

    def __init__(self, module: nn.Module, run: SampledRun, known: Sequence[Any]) -> None:
        super().__init__("", module)
        self.run, self.known = run, known

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """A known result, or the model's."""
        number = len(self.run.raw)
        result = self.known[number] if number < len(self.known) else self.inner(*args, **kwargs)
        self.run.raw.append(result)
        return result


@contextmanager
def sampling(
    pipe: Any,
    models: Sequence[nn.Module],
    known: Sequence[Any] = (),
    instead: tuple[int, Tensor] | None = None,
    last: int | None = None,
) -> Iterator[SampledRun]:
    """Records the run inside of the `with` block.

    Args:
        pipe: The pipeline.
        models: Its denoisers.
        known: Results that stand for the first calls of the models.
        instead: A step of the scheduler, and the guided result that it is given there.
        last: The step of the scheduler behind which the run ends, by an exception
            that ends here.
    """
    run, scheduler = SampledRun(), pipe.scheduler
    stock = scheduler.step

    def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        number = len(run.guided)
        if number == 0:
            run.scheduler = copy.deepcopy({k: v for k, v in vars(scheduler).items() if k != "step"})
        if instead is not None and instead[0] == number:
            model_output = instead[1].to(model_output)
        run.guided.append(model_output.detach().double().cpu())
        run.calls_before.append(len(run.raw))
        run.times.append(float(timestep))
        run.arguments.append((model_output, timestep, sample, kwargs))
        if number == last:
            raise Enough
        result = stock(model_output, timestep, sample, *args, **kwargs)
        run.final = result[0].detach().double().cpu()
        return result

    placed = [_Answering(model, run, known) for model in models]
    for one in placed:
        one.install()
    scheduler.step = step
    try:
        yield run
    except Enough:
        pass
    finally:
        del scheduler.step
        for one in placed:
            one.remove()


def effects(run: SampledRun, kind: type[Any]) -> np.ndarray[Any, Any]:
    """How far the last latents move per unit of a step's guided result, by the scheduler alone; one number a step.

    Args:
        run: A recorded run.
        kind: Class of its scheduler.
    """
    base = _sampled(run, kind, None)
    shift = _SHIFT * float(run.guided[0].square().mean().sqrt())
    moved = [float((_sampled(run, kind, (step, shift)) - base).mean()) / shift for step in range(len(run.guided))]
    return np.array(moved)


def gains(
    pipe: Any, models: Sequence[nn.Module], draw: Callable[[], object], run: SampledRun, effect: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """How much farther the last latents move than by the scheduler alone, for the model sees what it was led to.

    At a few steps the result is forecast on a line and the run finished; between them the logarithm is interpolated.
    """
    num_steps = len(run.guided)
    probed = probed_steps(num_steps)
    found = []
    for step in probed:
        line = 2 * run.guided[step - 1] - run.guided[step - 2]
        end = run.calls_before[step]
        with sampling(pipe, models, run.raw[:end], (step, line)) as other:
            draw()
        off = abs(effect[step]) * float((line - run.guided[step]).norm())
        found.append(float((other.final - run.final).norm()) / max(off, _LEAST))
    # After the last step no model sees anything.
    places, values = [*probed, num_steps - 1], [*found, 1.0]
    logs = np.log(np.maximum(values, _LEAST))
    return np.exp(np.interp(np.arange(num_steps), places, logs))


def shares_of(runs: Sequence[SampledRun]) -> tuple[float, ...]:
    """What each guidance branch in the batch of a call weighs in the guided result; (1.0,) where that is not so.

    Pipelines that call the model once in a step give it all images for each branch, and add up what it gives.
    """
    one = (1.0,)
    results = [[tensors(raw)[0] for raw in run.raw] for run in runs]
    guided = [result for run in runs for result in run.guided]
    if any(len(run.raw) != len(run.guided) for run in runs):
        return one
    raw = [result.detach().double().cpu() for of_run in results for result in of_run]
    count = len(raw[0]) // len(guided[0])
    if not 1 < count <= MOST_BRANCHES or any(
        r.shape != (count * len(g), *g.shape[1:]) for r, g in zip(raw, guided, strict=True)
    ):
        return one
    parts = [torch.stack([part.flatten() for part in r.chunk(count)]) for r in raw]
    square = sum((p @ p.T for p in parts), torch.zeros(count, count).double())
    wanted = sum((p @ g.flatten() for p, g in zip(parts, guided, strict=True)), torch.zeros(count).double())
    shares = torch.linalg.lstsq(square, wanted[:, None]).solution[:, 0]
    off = sum(float((shares @ p - g.flatten()).square().sum()) for p, g in zip(parts, guided, strict=True))
    if off > _LEAST_OFF * sum(float(g.square().sum()) for g in guided):
        return one
    return tuple(float(share) for share in shares)


def parts_of(raw: Any, shares: Sequence[float]) -> list[np.ndarray[Any, Any]]:
    """What each guidance branch of a call's batch adds to the guided result, on the host in double precision."""
    chunks = tensors(raw)[0].detach().double().cpu().chunk(len(shares))
    return [(share * chunk).flatten().numpy() for share, chunk in zip(shares, chunks, strict=True)]


def probed_steps(num_steps: int) -> list[int]:
    """The steps at which `gains` looks."""
    first = min(_FIRST_PROBED, num_steps - 2)
    return sorted({round(place) for place in np.linspace(first, num_steps - 2, _NUM_PROBED)})


def _sampled(run: SampledRun, kind: type[Any], shifted: tuple[int, float] | None) -> Tensor:
    """The last latents of the scheduler on recorded results, one of them shifted; its noise is the same each time."""
    scheduler: Any = object.__new__(kind)
    vars(scheduler).update(copy.deepcopy(run.scheduler))
    generator = torch.Generator().manual_seed(0)
    sample = run.arguments[0][2]
    for number, (output, timestep, _, given) in enumerate(run.arguments):
        kwargs = given | {"return_dict": False}
        if kwargs.get("generator") is not None:
            kwargs["generator"] = generator
        moved = output + shifted[1] if shifted is not None and shifted[0] == number else output
        sample = scheduler.step(moved, timestep, sample, **kwargs)[0]
    return sample.detach().double().cpu()
