"""How long each part of a denoiser takes, with whatever is attached to it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gen_turbo.models.adapter import Unit


@contextmanager
def timed(model: nn.Module, units: Mapping[str, Unit]) -> Iterator[dict[str, list[float]]]:
    """Seconds of every unit's modules in each call of the model, those that idle with it included.

    Args:
        model: The model.
        units: What can be skipped, by name; the one without a module is the whole model.
    """
    seconds: dict[str, list[float]] = {name: [] for name in units}
    handles: list[RemovableHandle] = []

    def begin(model: nn.Module, args: Any) -> None:
        for calls in seconds.values():
            calls.append(0.0)

    try:
        handles.append(model.register_forward_pre_hook(begin))
        for unit in units.values():
            for name in (unit.module, *unit.idle):
                handles += _clocked(model.get_submodule(name), unit.name, seconds)
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def seconds_now() -> float:
    """CPU seconds of this thread; on an accelerator, seconds when its work is done."""
    if not torch.cuda.is_available():
        return time.thread_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _clocked(module: nn.Module, unit: str, seconds: dict[str, list[float]]) -> list[RemovableHandle]:
    starts: list[float] = []

    def begin(module: nn.Module, args: Any) -> None:
        starts.append(seconds_now())

    def end(module: nn.Module, args: Any, output: Any) -> None:
        seconds[unit][-1] += seconds_now() - starts.pop()

    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
