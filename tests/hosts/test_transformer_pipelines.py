"""Stock pipelines of transformers: guidance, the end of a run, and the same picture again."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
)

from gen_turbo import TurboProcessor, report
from gen_turbo.hosts.attach import NoEffectWarning
from tests import tiny_transformers
from tests.tiny_transformers import NUM_TEXT, random


def _autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=32, **blocks)


def flux():
    """Flux: one call per step, thousandths as time."""
    model = tiny_transformers.build("flux")
    model.register_to_config(in_channels=8)
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), _autoencoder(), None, None, None, None, model)
    latents = random(1, 64, 8)
    return pipe, {"prompt_embeds": random(1, NUM_TEXT, 32), "pooled_prompt_embeds": random(1, 16), "latents": latents}


def sd3():
    """SD3: guidance in one batch."""
    model = tiny_transformers.build("sd3")
    nothing = [None] * 6
    pipe = StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(), _autoencoder(), *nothing)
    texts = {"prompt_embeds": random(1, NUM_TEXT, 32), "negative_prompt_embeds": random(1, NUM_TEXT, 32, seed=3)}
    pooled = {"pooled_prompt_embeds": random(1, 16), "negative_pooled_prompt_embeds": random(1, 16, seed=3)}
    return pipe, {**texts, **pooled, "latents": random(1, 4, 16, 16)}


def pixart():
    """PixArt: guidance that the pipeline does not tell of."""
    model = tiny_transformers.build("pixart-alpha")
    pipe = PixArtAlphaPipeline(None, None, _autoencoder(), model, DDIMScheduler())
    texts = {"prompt_embeds": random(1, NUM_TEXT, 32), "negative_prompt_embeds": random(1, NUM_TEXT, 32, seed=3)}
    mask = torch.ones(1, NUM_TEXT)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "negative_prompt": None}
    return pipe, {**texts, **masks, "latents": random(1, 4, 16, 16), "use_resolution_binning": False}


PIPELINES = {"flux": flux, "sd3": sd3, "pixart": pixart}


@pytest.fixture(scope="module", params=PIPELINES)
def drawn(request):
    """A pipeline and a function that draws one picture."""
    pipe, call = PIPELINES[request.param]()
    pipe.set_progress_bar_config(disable=True)

    def draw(steps: int = 5) -> torch.Tensor:
        fixed = {"height": 32, "width": 32, "num_inference_steps": steps, "output_type": "latent"}
        return pipe(**call, **fixed).images

    return pipe, draw


@pytest.mark.parametrize("scope", ["attention", "block"])
def test_a_run_is_reduced_and_leaves_nothing(drawn, scope):
    """Catches an end of a run that is missed because the model is told other times than the scheduler."""
    pipe, draw = drawn
    stock = draw()
    pipe.set_attn_processor(TurboProcessor(0.4, scope=scope))
    first = draw()
    told = report(pipe)
    again = draw()
    pipe.reset_attn_processor()
    assert torch.equal(first, again) and not torch.equal(first, stock)
    assert told.remembered_bytes == 0 and told.most_remembered_bytes > 0
    assert torch.equal(draw(), stock)


def test_nothing_removed_is_the_same_picture(drawn):
    """Catches bookkeeping that disturbs a run."""
    pipe, draw = drawn
    stock = draw()
    pipe.set_attn_processor(TurboProcessor(0.0, attention_backend="native"))
    same = draw()
    pipe.reset_attn_processor()
    assert torch.equal(same, stock)


def test_a_run_without_effect_says_so(drawn):
    """Catches silence where every step was a full one."""
    pipe, draw = drawn
    pipe.set_attn_processor(TurboProcessor(0.4))
    with pytest.warns(NoEffectWarning, match="no token was removed in this run of 2 steps"):
        draw(2)
    pipe.reset_attn_processor()
