"""Calibration of PAR on a diffusion pipeline: its own runs of a few prompts show what can be skipped, and when.

Nothing is trained and no images are needed. Stock runs are recorded; at a few calls every group of units is forecast
and the model run again, which shows how far the output moves; at the same calls the whole output is forecast and the
run finished, which shows how far that moves the result. With these prices, and with what each unit takes while tokens
are merged, a greedy search fills every budget. What it finds is then run for real, timed and compared with stock: the
cost and the distance in the file are those of real runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gen_turbo.engine.probing import Probe, Recording
from gen_turbo.training.schedule import WHOLE
from gen_turbo.training.search import Search, Skips

Draw = Callable[[int, str], Any]
"""Makes the i-th calibration image and gives the pipeline's result of an `output_type`: "latent" or "np"."""
_NUM_PROBED = 5
_LEAST = 1e-12


@dataclass
class Prices:
    """What the recordings show.

    Attributes:
        recordings: Stock runs; the first one was probed.
        probed: The calls that were probed.
        final: Move of the final latents where the output is forecast at a probed call, relative.
        groups: Names of the units of each group.
        slopes: The best share of the slope for each unit.
    """

    recordings: list[Recording]
    probed: list[int]
    final: dict[int, float]
    groups: Mapping[str, Sequence[str]]
    slopes: dict[str, float]

    def shares(self, seconds: Mapping[str, Sequence[float]], whole: float) -> dict[str, float]:
        """Share of a stock call's time that each group takes in most calls, and may save.

        The median: a call that runs in full, so that later ones can merge, is not saved by a skip, but put off.

        Args:
            seconds: Of every unit in every call; with tokens merged, less than of stock in most.
            whole: Of the stock model, mean.
        """
        return {
            group: float(np.median(np.sum([seconds[unit] for unit in units], axis=0))) / whole
            for group, units in self.groups.items()
        }

    def choices(
        self, base: float, shares: Mapping[str, float], inside: Mapping[str, Sequence[str]], costs: Sequence[float]
    ) -> list[Skips]:
        """What to skip for each cost, by unit; nothing, once, where a mean call costs no more than that as it is."""
        search = Search(len(self.recordings[0].times), base, shares, inside, cache(self.error))
        found: list[Skips] = []
        for skips in search.run(costs):
            by_unit = {unit: calls for group, calls in skips.items() for unit in self.groups[group]}
            if by_unit not in found:
                found.append(by_unit)
        return found

    def error(self, group: str, call: int, newer: int, older: int) -> float:
        """Squared relative error of the final latents."""
        if older < 0:
            return float("inf")
        moved = self._move(group, call) * self._off(group, call, newer, older)
        return float((moved * self._gain(call)) ** 2)

    def _off(self, group: str, call: int, newer: int, older: int) -> float:
        """Relative error of the forecast itself, over all units of a group and all recordings."""
        squares = [
            _relative(recording.samples[unit], call, newer, older, self.slopes[unit]) ** 2
            for recording in self.recordings
            for unit in self.groups[group]
        ]
        return float(np.sqrt(np.mean(squares)))

    def _move(self, group: str, call: int) -> float:
        """Relative move of the output for a relative error of the group's forecast of one."""
        known = [
            self.recordings[0].moved[group, probed] / max(self._off_of_line(group, probed), _LEAST)
            for probed in self.probed
        ]
        return _between(call, self.probed, known)

    def _off_of_line(self, group: str, call: int) -> float:
        samples = self.recordings[0].samples
        squares = [_relative(samples[unit], call, call - 1, call - 2, 1.0) ** 2 for unit in self.groups[group]]
        return float(np.sqrt(np.mean(squares)))

    def _gain(self, call: int) -> float:
        """Relative move of the final latents for a relative move of the output of one."""
        moved = self.recordings[0].moved
        return _between(call, self.probed, [self.final[c] / max(moved[WHOLE, c], _LEAST) for c in self.probed])


def measure(probe: Probe, draw: Draw, num_calls: int, num_prompts: int, note: Callable[[str], None]) -> Prices:
    """Records stock runs of the first prompts and prices every group.

    Args:
        probe: On the pipeline's denoiser.
        draw: Makes an image.
        num_calls: Calls of the model in a run.
        num_prompts: Runs that are recorded; the first one is probed.
        note: Receives messages about progress.

    Raises:
        ValueError: If the run has too few calls for a skip.
    """
    if num_calls <= 3:
        raise ValueError(f"a run of {num_calls} calls has nothing to skip; take at least 4 steps")
    probed = sorted({round(place) for place in np.linspace(2, num_calls - 1, _NUM_PROBED)})
    note(f"stock run of prompt 1, probing {len(probe.groups)} groups at calls {probed} of {num_calls}")
    with probe.recording(probed) as first:
        stock = _latents(draw(0, "latent"))
    recordings = [first]
    for index in range(1, num_prompts):
        note(f"stock run of prompt {index + 1} of {num_prompts}")
        with probe.recording() as other:
            draw(index, "latent")
        recordings.append(other)
    final = {call: _final_move(probe, draw, first, call, stock, note) for call in probed}
    groups = probe.groups
    slopes = {unit: _slope([r.samples[unit] for r in recordings]) for units in groups.values() for unit in units}
    return Prices(recordings, probed, final, groups, slopes)


def _final_move(
    probe: Probe, draw: Draw, recording: Recording, call: int, stock: Tensor, note: Callable[[str], None]
) -> float:
    """Runs a prompt with the output forecast at one call; the calls before are replayed."""
    start = time.perf_counter()
    with probe.replaying(probe.forecast_at(recording.outputs, call)):
        latents = _latents(draw(0, "latent"))
    moved = float((latents - stock).norm() / stock.norm())
    note(f"output forecast at call {call}: result moves by {moved:.2e} ({time.perf_counter() - start:.0f} s)")
    return moved


def content(result: Any) -> Any:
    """The images or the videos of a pipeline's result."""
    return result.images if hasattr(result, "images") else result.frames


def _latents(result: Any) -> Tensor:
    latents = content(result)
    return latents.float().cpu() if isinstance(latents, Tensor) else torch.as_tensor(np.asarray(latents)).float()


def _relative(samples: Sequence[Tensor], call: int, newer: int, older: int, slope: float) -> float:
    line = samples[newer].lerp(samples[older], -slope * (call - newer) / (newer - older))
    return float((line - samples[call]).norm() / samples[call].norm().clamp(min=_LEAST))


def _slope(runs: Sequence[Sequence[Tensor]]) -> float:
    """The median of the best slopes of forecasts from the last two calls and from every second call, 0 to 1.

    Least squares over all calls would follow the first few, where most changes and little can be skipped.
    """
    best = []
    for samples in runs:
        for step in (1, 2):
            for call in range(2 * step, len(samples)):
                steps = (call - step, call - 2 * step, call)
                along, line = best_slope(samples[steps[0]], samples[steps[1]], samples[call], steps)
                best.append(float(along) / max(float(line), _LEAST))
    return round(float(np.clip(np.median(best), 0.0, 1.0)), 3)


def _between(call: int, places: Sequence[int], values: Sequence[float]) -> float:
    """Interpolates positive values on a logarithmic scale, and holds the outer ones."""
    return float(np.exp(np.interp(call, places, np.log(np.maximum(values, _LEAST)))))


def best_slope(newest: Tensor, older: Tensor, actual: Tensor, steps: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Gives numerator and denominator of the least-squares slope, to be summed over what is forecast together.

    Args:
        newest: The quantity at `steps[0]`.
        older: The same at `steps[1]`.
        actual: What it really is at `steps[2]`.
        steps: Falling for the first two; the third lies behind the first.
    """
    line = ((newest - older) * ((steps[2] - steps[0]) / (steps[0] - steps[1]))).float()
    return (line * (actual - newest).float()).sum(), line.square().sum()
