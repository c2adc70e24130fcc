"""Guidance by calls of its own: each branch remembers for itself, however the caller holds its tensors."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanPipeline
from stated import TurboProcessor
from torch import Tensor, nn

from gen_turbo import attach, report
from tests import tiny_transformers
from tests.tiny_family import NUM_TEXT, random
from tests.tiny_pipelines import flux, latents_of
from tests.tiny_transformers import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")

KINDS: dict[str, dict[str, object]] = {"residual": {}, "copied": {"restore": "copy", "match_every": 2}}


class Loop(DiffusionPipeline):
    """Calls a transformer once for each text in every step, on latents that depend on nothing but the step."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        texts: list[Tensor],
        steps: int,
        is_anew: bool,
        stays: tuple[int, int] = (0, 99),
        begins: tuple[int, int] = (1, 0),
    ) -> list[list[Tensor]]:
        outputs: list[list[Tensor]] = [[] for _ in texts]
        self.scheduler.set_timesteps(steps)
        latents = random(1, *FAMILIES["pixart-alpha"].latents((8, 8)))
        for step, time in enumerate(self.scheduler.timesteps):
            for number, text in enumerate(texts):
                if step >= stays[1] and number != stays[0]:
                    continue
                if step < begins[1] and number == begins[0]:
                    continue
                given = {"encoder_hidden_states": text.clone() if is_anew else text, "timestep": time.expand(1)}
                outputs[number].append(self.transformer(latents * (1 - 0.05 * step), **given, return_dict=False)[0])
        return outputs


def loop(scheduler: Any = DDIMScheduler) -> Loop:
    """The loop over a tiny PixArt."""
    return Loop(tiny_transformers.build("pixart-alpha"), scheduler())


TEXTS = [random(1, NUM_TEXT, 32), random(1, NUM_TEXT, 32, seed=3)]


@pytest.mark.parametrize("scheduler", [DDIMScheduler, diffusers.HeunDiscreteScheduler])
@pytest.mark.parametrize("is_anew", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_branches_of_guidance_are_kept_apart(scheduler, is_anew, kind):
    """Catches one memory for both branches, and branches taken for runs where their tensors are made in every step."""
    pipe = loop(scheduler)
    with attach(pipe, TurboProcessor(0.4, **KINDS[kind])):
        alone = [pipe([text], 8, is_anew)[0] for text in TEXTS]
        both = pipe(TEXTS, 8, is_anew)
        assert report(pipe).remembered_bytes == 0
    for branch, expected in zip(both, alone, strict=True):
        assert all(map(torch.equal, branch, expected))


@pytest.mark.parametrize("is_anew", [False, True])
@pytest.mark.parametrize("kept", [0, 1])
def test_a_branch_that_is_dropped_does_not_take_the_other_ones_place(kept, is_anew):
    """Catches branches told apart by whose turn it is where one of them is called no more."""
    pipe = loop()
    with attach(pipe, TurboProcessor(0.4)):
        alone = pipe(TEXTS[kept : kept + 1], 8, is_anew)[0]
        both = pipe(TEXTS, 8, is_anew, stays=(kept, 4))
    assert all(map(torch.equal, both[kept], alone))


@pytest.mark.parametrize("scheduler", [DDIMScheduler, diffusers.EulerDiscreteScheduler])
@pytest.mark.parametrize("is_anew", [False, True])
@pytest.mark.parametrize(("late", "start"), [*itertools.product((0, 1), (1, 2, 5))])
def test_a_branch_that_begins_later_is_one_of_its_own(late, start, is_anew, scheduler):
    """Catches a second branch, its conditions made in every step, that goes on with the memory of the first."""
    pipe, first = loop(scheduler), TEXTS[1 - late : 2 - late]
    with attach(pipe, TurboProcessor(0.4)):
        alone = pipe(first, 10, is_anew)[0]
        both = pipe(TEXTS, 10, is_anew, begins=(late, start))
        assert report(pipe).remembered_bytes == 0
    assert all(map(torch.equal, both[1 - late], alone)) and len(both[late]) == 10 - start


def test_flux_with_true_guidance():
    """Catches a pipeline of two calls in every step whose run ends at half, or never."""
    pipe, call = flux()
    pipe.set_progress_bar_config(disable=True)
    call |= {"negative_prompt_embeds": random(1, NUM_TEXT, 32, seed=3), "true_cfg_scale": 2.0}
    call |= {"negative_pooled_prompt_embeds": random(1, 16, seed=3)}
    with attach(pipe, TurboProcessor(0.4)):
        first = latents_of(pipe, call, 8)
        told = report(pipe)
        assert torch.equal(latents_of(pipe, call, 8), first)
    rows = [row for row in told.layers if row.status == "reduced"]
    assert {(row.num_full, row.num_reduced) for row in rows} == {(8, 8)} and told.remembered_bytes == 0


def two_models() -> tuple[WanPipeline, dict[str, Any]]:
    """A pipeline of which one model runs the noisy steps and another one the last."""
    models = [tiny_transformers.build("wan") for _ in range(2)]
    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), *models, boundary_ratio=0.5)
    pipe.set_progress_bar_config(disable=True)
    texts = {"prompt_embeds": TEXTS[0], "negative_prompt_embeds": TEXTS[1], "num_frames": 9}
    return pipe, {**texts, "latents": random(1, 4, 3, 16, 16), "height": 128, "width": 128, "output_type": "latent"}


def test_two_models_share_a_run():
    """Catches residuals of the model of the noisy steps, held after the one of the last steps has taken over."""
    pipe, call = two_models()
    with attach(pipe, TurboProcessor(0.4, warmup_steps=1)):
        first = pipe(**call, num_inference_steps=10).frames
        assert report(pipe).remembered_bytes == 0 < report(pipe).most_remembered_bytes
        assert torch.equal(pipe(**call, num_inference_steps=10).frames, first)


def test_both_of_two_models_are_reported():
    """Catches calls of a model whose run another model ends, missing in the report until it is called again."""
    pipe, call = two_models()
    with attach(pipe, TurboProcessor(0.4, warmup_steps=1)):
        pipe(**call, num_inference_steps=10)
        rows = [row for row in report(pipe).layers if row.status == "reduced"]
    assert {row.num_full + row.num_reduced for row in rows} == {10}
