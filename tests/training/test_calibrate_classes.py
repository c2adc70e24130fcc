"""`gen-turbo calibrate par` on pipelines of the classes that people run, at tiny size."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)

from gen_turbo import PARProcessor, factory
from gen_turbo.api import denoiser
from gen_turbo.commands.cli import main
from gen_turbo.training.calibrate_denoiser import content
from gen_turbo.training.schedule import WHOLE
from gen_turbo.training.schedule_file import read
from tests import tiny_pipelines, tiny_transformers
from tests.snapshots import differences, model_state
from tests.tiny_hosts import sdxl_unet
from tests.tiny_transformers import NUM_TEXT, random

STEPS = 8
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
SHIFTING = {"use_dynamic_shifting": True, "shift": 3.0}


def sdxl():
    """SDXL: two texts and sizes beside the time."""
    unet = sdxl_unet()
    width, pooled = unet.config.cross_attention_dim, unet.config.projection_class_embeddings_input_dim - 6 * 8
    pipe = StableDiffusionXLPipeline(
        tiny_pipelines._autoencoder(), None, None, None, None, unet, EulerDiscreteScheduler(), add_watermarker=False
    )
    texts = {"prompt_embeds": random(1, NUM_TEXT, width), "negative_prompt_embeds": random(1, NUM_TEXT, width, seed=3)}
    return pipe, {
        **texts,
        "pooled_prompt_embeds": random(1, pooled),
        "negative_pooled_prompt_embeds": random(1, pooled, seed=3),
    }


def flux():
    """Flux as published: times that depend on the size of the image."""
    pipe, call = tiny_pipelines.flux()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(**SHIFTING)
    pipe.vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=2, **BLOCKS).eval()
    assert isinstance(pipe, FluxPipeline)
    return pipe, {name: given for name, given in call.items() if name != "latents"}


def sd3():
    """SD3."""
    pipe, call = tiny_pipelines.sd3()
    assert isinstance(pipe, StableDiffusion3Pipeline)
    return pipe, {name: given for name, given in call.items() if name != "latents"}


def wan():
    """Wan: a video, in calls of its own for each guidance branch."""
    torch.manual_seed(0)
    shape = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    shape |= {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    model = tiny_transformers.build("wan")
    pipe = WanPipeline(None, None, AutoencoderKLWan(**shape).eval(), scheduler, transformer=model)
    texts = {"prompt_embeds": random(1, NUM_TEXT, 32), "negative_prompt_embeds": random(1, NUM_TEXT, 32, seed=3)}
    return pipe, {**texts, "num_frames": 5}


def prompted(pipe, texts):
    """The pipeline with ready embeddings in place of what its text encoders would make of a prompt."""

    class Prompted(type(pipe)):
        def __call__(self, prompt=None, **given):
            return super().__call__(**texts, **given)

    pipe.__class__ = Prompted
    if isinstance(pipe.vae, AutoencoderKL):
        pipe.vae.register_to_config(shift_factor=0.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("make", [sdxl, flux, sd3, wan], ids=lambda make: make.__name__)
def test_a_class_is_calibrated_within_the_images_it_states(make, tmp_path, capsys, monkeypatch):
    """Catches what reads images of a pipeline of videos, sets times that need a size, or runs more than it says."""
    pipe = prompted(*make())
    # Bound before, or its first import would bind the stand-in for every later test.
    import_module("gen_turbo.commands.caption")
    monkeypatch.setattr(factory, "build_pipeline", lambda config: pipe)
    model, calls = denoiser(pipe), [0]
    handle = model.register_forward_pre_hook(lambda *given: calls.__setitem__(0, calls[0] + 1))
    output = tmp_path / "own.yaml"
    size = ["height=32", "width=32", "checkpoint=none"]
    command = ["calibrate", "par", "--config", "sd15", *size, "--prompts", "1", "--steps", str(STEPS)]
    code = main([*command, "--budgets", "0.75", "0.5", "--inner", "none", "--output", str(output)])
    said = capsys.readouterr()
    assert code == 0, said.err
    handle.remove()
    file = read(output)
    assert file.num_calls >= STEPS and all(schedule.skips for schedule in file.schedules)
    assert any(WHOLE in schedule.skips for schedule in file.schedules)

    # The scale of the configuration, which a schedule of branches holds for.
    given = {"num_inference_steps": STEPS, "height": 32, "width": 32, "output_type": "np", "guidance_scale": 7.5}
    before = model_state(model)

    def draw():
        made = content(pipe("a circle", generator=torch.Generator().manual_seed(0), **given))
        return np.asarray(made)

    stock = draw()
    pipe.set_attn_processor(PARProcessor(budget=0.8, schedule=str(output), inner=None))
    assert not np.array_equal(draw(), stock)
    pipe.reset_attn_processor()
    assert np.array_equal(draw(), stock)
    assert [key for key in differences(before, model_state(model)) if key != "random"] == []
