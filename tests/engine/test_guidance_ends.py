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
    def __call__(self, name: str, rows: slice | None = None, text: Tensor | None = None) -> list[Tensor]:
        outputs = []
        self.scheduler.set_timesteps(STEPS)
        if name in tiny_hosts.UNETS:
            given = tiny_hosts.unet_inputs(2 * NUM)
            latents, argument = given.pop("sample"), "sample"
        else:
            given, argument = FAMILIES[name].inputs(2 * NUM, (8, 8)), "hidden_states"
            latents = random(NUM, *FAMILIES[name].latents((8, 8)))
        latents, own = torch.cat([latents[:NUM]] * 2), given.pop("encoder_hidden_states")
        text = own if text is None else text
        for step, time in enumerate(self.scheduler.timesteps):
            if step == AT and rows is not None:
                latents, text = latents[rows], text[rows]
                given = {key: _rows(value, rows) for key, value in given.items()}
            num = len(latents)
            told = {"timestep": time} if argument == "sample" else FAMILIES[name].time(int(time), num)
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
@pytest.mark.parametrize("name", ["sd15", "sd3", "pixart-alpha", "lumina2"])
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


def test_a_branch_of_the_same_step_has_its_own_memory():
    """Catches a call on the conditional rows beside that of the batch, taken for what is left of the batch."""
    pipe, draw = made("sd3")
    counts = []
    skipping = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.3, "skip_layer_guidance_stop": 0.8}
    for kwargs in ({}, skipping):
        with attach(pipe, TurboProcessor(0.4, full_every=8)):
            draw(STEPS, **kwargs)
            counts.append([(row.num_full, row.num_reduced) for row in report(pipe).layers if row.status == "reduced"])
    # Layer 1 is left out of the four calls beside; two of these are full ones of their own.
    (full, reduced), *_ = counts[0]
    assert counts[1][0] == (full + 2, reduced + 2)


@pytest.mark.parametrize(("num_words", "num_full"), [(3, 3), (7, 4)])
def test_merged_text_of_another_length_begins_anew(num_words, num_full):
    """Catches residuals of more text than the branch has alone, for the text of the other one was longer."""
    pipe = guided("sd3")
    text = torch.cat([random(NUM, 16, 32, seed=3), random(NUM, 16, 32)])
    for rows, count in ((text[:NUM], num_words), (text[NUM:], 4)):
        rows[:, count:] = 0
    with attach(pipe, TurboProcessor(0.4, full_every=8, text_ratio=None)):
        whole, told = pipe("sd3", text=text), report(pipe)
        assert told.text_tokens == (16, max(num_words, 4) + 1)
        before = {row.num_full for row in told.layers if row.status == "reduced"}
        cut = pipe("sd3", slice(NUM, None), text)
        after = {row.num_full for row in report(pipe).layers if row.status == "reduced"}
    assert (before, after) == ({3}, {3 + num_full})
    if num_full == 3:
        torch.testing.assert_close(cut[-1], whole[-1][NUM:], rtol=1e-4, atol=1e-4)
