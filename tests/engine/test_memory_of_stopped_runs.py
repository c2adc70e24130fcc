"""What a run remembers is gone when the run is, however it ended."""

from __future__ import annotations

import threading
from itertools import count
from typing import Any

import pytest
import torch
from stated import TurboProcessor

from gen_turbo import attach, report
from gen_turbo.engine.runs import Runs
from gen_turbo.models.adapter import Geometry, ModelCall
from tests.engine.pipelines import made
from tests.tiny_family import NUM_TEXT, random
from tests.tiny_hosts import image, sd_pipeline


def _raise(pipe, step, time, kwargs):
    if step == 4:
        raise KeyboardInterrupt
    return {}


def _interrupt(pipe, step, time, kwargs):
    pipe._interrupt = step == 4
    return {}


@pytest.mark.parametrize("stop", [_raise, _interrupt])
def test_a_run_that_is_stopped_leaves_nothing(stop):
    """Catches residuals that wait for a next run, which may never come, and text that is kept alive for them."""
    pipe = sd_pipeline()
    with attach(pipe, TurboProcessor(0.5)):
        alone = image(pipe, steps=8)
        try:
            image(pipe, steps=8, callback_on_step_end=stop)
        except KeyboardInterrupt:
            pass
        told = report(pipe)
        assert told.remembered_bytes == 0 and told.layers[0].num_reduced > 0
        assert torch.equal(image(pipe, steps=8), alone)


@pytest.mark.parametrize("name", ["unet", "flux", "wan"])
@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("stop", [_raise, _interrupt])
def test_text_that_the_caller_keeps_keeps_nothing_else(stop, step, name):
    """Catches residuals that live until the next run, as long as the caller holds the text that it gave."""
    pipe, draw = made(name)
    steps = count()

    def stops(pipe, number, time, kwargs):
        return stop(pipe, 4 if next(steps) == step else 0, time, kwargs)

    # Flux is called with text of the caller's anyway.
    texts: dict[str, Any] = {
        key: random(1, NUM_TEXT, 32, seed=n) for n, key in enumerate(("prompt_embeds", "negative_prompt_embeds"))
    }
    texts = {} if name == "flux" else texts | ({"prompt": None} if name == "unet" else {})
    with attach(pipe, TurboProcessor(0.5)):
        alone = draw(8, **texts)
        try:
            draw(8, **texts, callback_on_step_end=stops)
        except KeyboardInterrupt:
            pass
        assert report(pipe).remembered_bytes == 0 < report(pipe).most_remembered_bytes
        assert torch.equal(draw(8, **texts), alone)


def test_text_that_dies_in_another_thread_during_a_call():
    """Catches a run that is ended in the middle of its call, one that is held after it, and threads that wait."""
    ended: list[Any] = []
    runs = Runs(None, float, ended.append)
    texts = [torch.zeros(1, 2, 3)]

    def context_at(time: float) -> Any:
        call = ModelCall(torch.zeros(1, 4, 8, 8), time, texts[0])
        return runs.find(call) or runs.open(call, Geometry((8, 8)))

    for time in (3.0, 2.0, 1.0):
        runs.acquire()
        context = context_at(time)
        runs.release()
    runs.acquire()
    other = threading.Thread(target=texts.clear)
    other.start()
    other.join(timeout=30)
    assert not other.is_alive() and not texts and not ended and runs.contexts() == [context]
    runs.release()
    assert ended == [context] and runs.contexts() == []
