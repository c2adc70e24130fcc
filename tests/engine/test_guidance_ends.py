"""Guidance that a callback turns off in mid run: the branch that is left goes on with what it remembers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.callbacks import SD3CFGCutoffCallback, SDCFGCutoffCallback
from stated import TurboProcessor
from torch import Tensor, nn

from gen_turbo import attach, report
from tests import tiny_hosts, tiny_transformers
from tests.engine.cuda import stand_in
from tests.engine.pipelines import made
from tests.tiny_transformers import FAMILIES, random

STEPS, AT, NUM = 10, 5, 2
KINDS: dict[str, dict[str, object]] = {
    "residual": {"full_every": 3, "match_every": 2},
    "copied": {"restore": "copy", "match_every": 3},
    "keys": {"kv_only": True, "proportional_attention": True},
    "block": {"scope": "block"},
    "spans": {"scope": "block", "merge_span": 0},
}


class Guided(DiffusionPipeline):
    """Calls a model on two images twice in one batch, and from one step on, on some of its rows alone.

    The latents depend on nothing but the step, so that no row knows of the others.
    """

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, name: str, rows: slice | None = None) -> list[Tensor]:
        outputs = []
        self.scheduler.set_timesteps(STEPS)
        if name in tiny_hosts.UNETS:
            given = tiny_hosts.unet_inputs(2 * NUM)
            latents, argument = given.pop("sample"), "sample"
        else:
            given, argument = FAMILIES[name].inputs(2 * NUM, (8, 8)), "hidden_states"
            latents = random(NUM, *FAMILIES[name].latents((8, 8)))
        latents, text = torch.cat([latents[:NUM]] * 2), given.pop("encoder_hidden_states")
        for step, time in enumerate(self.scheduler.timesteps):
            if step == AT and rows is not None:
                latents, text = latents[rows], text[rows]
                given = {key: _rows(value, rows) for key, value in given.items()}
            told = {"timestep": time if argument == "sample" else time.expand(len(latents))}
            call = {argument: latents * (1 - 0.05 * step), "encoder_hidden_states": text, **told, **given}
            outputs.append(self.transformer(**call, return_dict=False)[0])
        return outputs


def _rows(value: Any, rows: slice) -> Any:
    if isinstance(value, dict):
        return {key: _rows(item, rows) for key, item in value.items()}
    return value[rows] if isinstance(value, Tensor) and len(value) == 2 * NUM else value


def guided(name: str) -> Guided:
    """The loop over a tiny model."""
    model = tiny_hosts.UNETS[name]() if name in tiny_hosts.UNETS else tiny_transformers.build(name)
    return Guided(model, DDIMScheduler())


@pytest.mark.parametrize("rows", [slice(NUM, None), slice(0, NUM)], ids=["conditional", "unconditional"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sd15", "sd3", "pixart-alpha"])
def test_the_branch_that_is_left_goes_on_where_it_is(name, kind, rows):
    """Catches memory that begins anew, that of the other branch, or of another sample, and a rhythm that is lost."""
    pipe, settings = guided(name), dict(KINDS[kind])
    if rows.start == 0:
        # The conditional rows, which a map made anew goes by, are gone.
        settings["match_every"] = 0
    with attach(pipe, TurboProcessor(0.4, **settings)):
        whole = pipe(name)
        cut = pipe(name, rows)
        assert report(pipe).remembered_bytes == 0
    stock = guided(name)(name)
    for step in range(AT, STEPS):
        expected = whole[step][rows]
        error = (expected - stock[step][rows]).norm()
        # A batch of another size is summed in another order.
        assert (cut[step] - expected).norm() <= 1e-3 * error + 1e-6 * expected.norm()
    assert max((whole[step] - stock[step]).norm() for step in range(AT, STEPS)) > 0


CUTOFFS = {"unet": SDCFGCutoffCallback, "sd3": SD3CFGCutoffCallback}


@pytest.mark.parametrize("name", CUTOFFS)
def test_the_callbacks_of_diffusers_cost_no_full_step(name):
    """Catches full steps after the change, and memory of the whole batch that is held after the run."""
    pipe, draw = made(name)
    callback = CUTOFFS[name](cutoff_step_ratio=None, cutoff_step_index=AT - 1)
    counts = []
    for kwargs in ({}, {"callback_on_step_end": callback}):
        with attach(pipe, TurboProcessor(0.4, full_every=8)):
            draw(STEPS, **kwargs)
            told = report(pipe)
        counts.append({(row.num_full, row.num_reduced) for row in told.layers if row.status == "reduced"})
        assert told.remembered_bytes == 0 < told.most_remembered_bytes
    assert counts[0] == counts[1] and all(reduced > full for full, reduced in counts[0])


@pytest.mark.parametrize("kind", ["residual", "copied"])
def test_graphs_go_on_too(kind, monkeypatch):
    """Catches buffers of an earlier run that stay as they were, and graphs that read what is no longer written."""
    pipe, draw = made("unet")
    processor = TurboProcessor(0.4, **KINDS[kind])
    call = {"callback_on_step_end": SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=AT - 1)}
    with attach(pipe, processor, graphs=False):
        expected = [draw(STEPS, seed=seed, **call) for seed in range(3)]
    cuda = stand_in(monkeypatch)
    with attach(pipe, processor, graphs=True):
        for seed in range(3):
            cuda.since()
            assert torch.equal(draw(STEPS, seed=seed, **call), expected[seed])
        assert cuda.since() == (0, STEPS)


def test_other_text_begins_anew():
    """Catches a smaller batch of another prompt that is taken for a branch by its size."""
    pipe, draw = made("unet")

    def other(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step == AT - 1:
            pipe._guidance_scale = 0.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1] + 1
        return kwargs

    with attach(pipe, TurboProcessor(0.4, full_every=8)):
        draw(STEPS, callback_on_step_end=other, callback_on_step_end_tensor_inputs=["prompt_embeds"])
        rows = [row for row in report(pipe).layers if row.status == "reduced"]
    # Two at the beginning, and two of the new prompt.
    assert {row.num_full for row in rows} == {4}
