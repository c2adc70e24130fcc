"""From the third step of a pipeline's run on the host never asks the device for a number, if the text stays."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from stated import TurboProcessor
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gen_turbo import PARProcessor, report
from tests.engine.pipelines import MAKERS, denoiser_of, made
from tests.schedules import blocks_of, by_hand

STEPS = 6
TURBO: dict[str, dict[str, object]] = {
    "residual": {},
    "copied": {"restore": "copy"},
    "staggered": {"stagger": True, "match_every": 2},
    "keys alone": {"restore": "copy", "kv_only": True},
    "size-weighted": {"restore": "copy", "proportional_attention": True},
    "block": {"scope": "block"},
    "span": {"scope": "block", "merge_span": 0, "restore": "copy"},
}
CASES = [
    *itertools.product(("residual", "copied", "block", "span"), MAKERS),
    *itertools.product(("staggered", "keys alone", "size-weighted"), ("unet", "flux", "wan")),
]
READS = {"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__contains__", "cpu", "__repr__"}
"""Methods of tensors, of which on a CPU not all reach an operator."""
WAITING = {
    *("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "item", "masked_select", "allclose", "_unique2"),
    *("bincount", "unique_dim", "repeat_interleave.Tensor"),
}
"""Operators whose result, or its size, the host has to know."""


class Waited(Exception):
    """Something on the device was read."""


class Operators(TorchDispatchMode):
    """Refuses operators that wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if name in WAITING or name.partition(".")[0] in WAITING:
            raise Waited(name)
        if name.startswith(("index.", "index_put")) and any(_is_mask(index) for index in args[1]):
            raise Waited(f"{name} by a mask")
        return func(*args, **(kwargs or {}))


class Methods(TorchFunctionMode):
    """Refuses methods that wait for the device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS or (name == "__setitem__" and not isinstance(args[2], Tensor)):
            # A number that is assigned is copied from the host's memory, which waits as well.
            raise Waited(name)
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)


@dataclass
class Switch:
    """Whether calls are watched, and how many were."""

    is_on: bool = False
    num_calls: int = 0

    def from_third_step(self, pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A callback at the end of a step."""
        self.is_on = step >= 1
        return kwargs


@contextmanager
def watched(model: nn.Module) -> Iterator[Switch]:
    """Calls of a model that must not wait while the switch is on: all of the call, not what calls it."""
    switch, stack = Switch(), ExitStack()

    def begin(module: nn.Module, args: object) -> None:
        if switch.is_on:
            switch.num_calls += 1
            stack.enter_context(Operators())
            stack.enter_context(Methods())

    def end(module: nn.Module, args: object, output: object) -> None:
        stack.close()

    handles = [model.register_forward_pre_hook(begin), model.register_forward_hook(end, always_call=True)]
    try:
        yield switch
    finally:
        stack.close()
        for handle in handles:
            handle.remove()


def num_watched(name: str, reducer: Any) -> int:
    """Draws with a reducer on the pipeline of a family; gives how many calls were watched."""
    pipe, draw = made(name)
    pipe.set_attn_processor(reducer)
    with watched(denoiser_of(pipe)) as switch:
        draw(STEPS, callback_on_step_end=switch.from_third_step)
        told = report(pipe)
    assert told.remembered_bytes == 0
    assert all(layer.num_reduced for layer in told.layers if layer.status == "reduced")
    return switch.num_calls


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_no_step_waits(kind, name):
    """Catches matching, refreshing, restoring and bookkeeping that read a tensor."""
    guided = 2 if name == "wan" else 1
    assert num_watched(name, TurboProcessor(0.4, **TURBO[kind])) == guided * (STEPS - 2)


@pytest.mark.parametrize("name", MAKERS)
def test_no_skip_waits(name):
    """Catches a schedule that asks the device for the time, and a forecast whose reach is a number of the device."""
    pipe, draw = made(name)
    draw(STEPS)
    times = tuple(float(time) for time in pipe.scheduler.timesteps)
    skipped = {"deep.1" if name == "unet" else blocks_of(denoiser_of(pipe))[0]: [2, 3, 5], "output": [4]}
    schedule = by_hand(denoiser_of(pipe), skipped, times)
    processor = PARProcessor(budget=0.5, schedule=schedule, inner="turbo", warmup_steps=1)
    assert num_watched(name, processor) == (2 if name == "wan" else 1) * (STEPS - 2)


@pytest.mark.parametrize(
    "read",
    [
        lambda tokens: tokens.sum().item(),
        lambda tokens: tokens[0, 0].tolist(),
        lambda tokens: bool(tokens.sum() > 0),
        lambda tokens: tokens[tokens > 0],
        lambda tokens: torch.equal(tokens, tokens),
        lambda tokens: torch.nonzero(tokens),
        lambda tokens: tokens.detach().numpy(),
        lambda tokens: tokens.clone().__setitem__(0, 1.0),
    ],
    ids=["item", "tolist", "bool", "mask", "equal", "nonzero", "numpy", "assignment"],
)
def test_a_method_that_waits_is_caught(read):
    """Catches a watch that sees nothing."""

    class Waiting(TurboProcessor):
        def plan(self, tokens, site, frame):
            read(tokens)
            return super().plan(tokens, site, frame)

    with pytest.raises(Waited):
        num_watched("pixart", Waiting(0.4, restore="copy"))
    num_watched("pixart", Waiting(0.4))


def test_the_first_step_is_caught():
    """Catches a watch that does not reach the root, which reads times and sizes there."""
    pipe, draw = made("unet")
    pipe.set_attn_processor(TurboProcessor(0.4))
    with watched(pipe.unet) as switch:
        switch.is_on = True
        with pytest.raises(Waited):
            draw(STEPS)


def test_conditioning_that_is_made_anew_is_compared():
    """Catches branches told apart by whose turn it is, where values alone show that another one begins."""
    pipe, draw = made("unet")
    pipe.set_attn_processor(TurboProcessor(0.4))
    with watched(pipe.unet) as switch:

        def anew(pipe, step, time, kwargs):
            switch.is_on = step >= 2
            return {"prompt_embeds": kwargs["prompt_embeds"].clone()}

        with pytest.raises(Waited):
            draw(STEPS, callback_on_step_end=anew, callback_on_step_end_tensor_inputs=["prompt_embeds"])
