"""Threads and exceptions: whatever happens inside of a call, the model is stock between calls and runs again."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from stated import TurboProcessor
from torch import Tensor, nn

from gen_turbo import IdentityProcessor, attach
from gen_turbo.api import NoEffectWarning
from gen_turbo.engine.graphs import GraphsWarning
from tests.engine.families import family
from tests.tiny_family import random
from tests.tiny_hosts import image, run_unet, sd15_unet, sd_pipeline, unet_inputs

KINDS: dict[str, dict[str, object]] = {
    "residual": {},
    "copied": {"restore": "copy", "match_every": 2},
    "block": {"scope": "block"},
}


class Stop(Exception):
    """The user has seen enough."""


@pytest.mark.parametrize("kind", KINDS)
def test_two_threads_draw_what_each_draws_alone(kind):
    """Catches a call that finds layers set for another thread's step."""
    first = sd_pipeline()
    parts = first.components | {"scheduler": DDIMScheduler.from_config(first.scheduler.config)}
    pipes, steps = (first, StableDiffusionPipeline(**parts, requires_safety_checker=False)), (8, 6)
    pipes[1].set_progress_bar_config(disable=True)
    drawn: dict[int, Tensor] = {}

    def draw(number: int) -> None:
        drawn[number] = image(pipes[number], seed=number, steps=steps[number])

    with attach(first.unet, TurboProcessor(0.4, **KINDS[kind])):
        alone = [image(pipe, seed=number, steps=steps[number]) for number, pipe in enumerate(pipes)]
        threads = [threading.Thread(target=draw, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(drawn[0], alone[0]) and torch.equal(drawn[1], alone[1])


INSIDE: dict[str, tuple[str, dict[str, object]]] = {
    "residual": ("sd15", {}),
    "block": ("sd15", {"scope": "block"}),
    "keys alone": ("sd15", {"restore": "copy", "kv_only": True}),
    "size-weighted": ("sd15", {"restore": "copy", "proportional_attention": True}),
    "span": ("sd3", {"scope": "block", "merge_span": 0}),
    "text": ("sd3", {"text_ratio": 0.4}),
}


@pytest.mark.parametrize("kind", INSIDE)
@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_exception_inside_of_the_model_leaves_it_stock(kind, call):
    """Catches a lock that stays closed, layers that stay short, and keys that stay merged in every later call."""
    name, settings = INSIDE[kind]
    model, run = family(name)
    block, given = _a_block(model)
    inner = (block.attn1 if name == "sd15" else block.attn).to_out[0]
    stock, seen = block(**given), []

    def fail(module: nn.Module, args: object) -> None:
        seen.append(module)
        if len(seen) == call:
            raise Stop

    with attach(model, TurboProcessor(0.4, **settings)):
        alone = run(times=(900, 800, 700, 600, 500))
        handle = inner.register_forward_pre_hook(fail)
        with pytest.raises(Stop):
            run(times=(900, 800, 700, 600, 500))
        handle.remove()
        after = block(**given)
        results: list[Tensor] = []
        thread = threading.Thread(target=lambda: results.append(run(times=(900, 800, 700, 600, 500))), daemon=True)
        thread.start()
        thread.join(30)
    pairs = zip(after, stock, strict=True) if isinstance(stock, tuple) else [(after, stock)]
    assert all(torch.equal(a, b) for a, b in pairs)
    assert len(results) == 1 and torch.equal(results[0], alone)


def _a_block(model: nn.Module) -> tuple[Any, dict[str, Tensor]]:
    """A block that is reduced, and arguments of its own."""
    if hasattr(model, "down_blocks"):
        block = model.down_blocks[0].attentions[0].transformer_blocks[0]
        return block, {"hidden_states": random(2, 256, 16), "encoder_hidden_states": random(2, 6, 32)}
    given = {"hidden_states": random(2, 64, 32), "encoder_hidden_states": random(2, 5, 32), "temb": random(2, 32)}
    return model.transformer_blocks[1], given


def test_a_warning_that_is_an_error_leaves_the_model_stock():
    """Catches layers that were set for a step which then did not run."""
    unet, inputs = sd15_unet(), unet_inputs()
    block, given = _a_block(unet)
    stock = block(**given)
    with attach(unet, TurboProcessor(0.4, restore="copy"), graphs=True):
        with pytest.raises(GraphsWarning), warnings.catch_warnings():
            warnings.simplefilter("error")
            run_unet(unet, **inputs)
        assert torch.equal(block(**given), stock)


def test_nothing_is_said_where_nothing_was_asked_for():
    """Catches a warning of no effect about a method that removes nothing."""
    pipe = sd_pipeline()
    with attach(pipe, IdentityProcessor(0.4)), warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        image(pipe, steps=3)
