"""The two pipeline methods, and that no run leaves anything for the next."""

from __future__ import annotations

import pytest
import torch
from stated import TurboProcessor

from gen_turbo import IdentityProcessor, attach, report
from gen_turbo.api import NoEffectWarning
from tests.snapshots import differences, model_state
from tests.tiny_hosts import image, sd_pipeline


@pytest.fixture(scope="module")
def pipe():
    """One pipeline for all tests of this file."""
    return sd_pipeline()


@pytest.fixture(autouse=True)
def _detached(pipe):
    yield
    pipe.reset_attn_processor()


def test_the_users_line_works_and_comes_off(pipe):
    """Catches a pipeline method that changes nothing, or leaves something."""
    stock, before = image(pipe), model_state(pipe.unet)
    pipe.set_attn_processor(TurboProcessor(0.4))
    assert not torch.equal(image(pipe), stock)
    pipe.reset_attn_processor()
    assert torch.equal(image(pipe), stock)
    assert [key for key in differences(before, model_state(pipe.unet)) if key != "random"] == []


@pytest.mark.parametrize("processor", [TurboProcessor(0.0), IdentityProcessor(0.4)])
def test_nothing_removed_is_the_same_image(pipe, processor):
    """Catches bookkeeping that disturbs the run."""
    stock = image(pipe)
    pipe.set_attn_processor(processor)
    assert torch.equal(image(pipe), stock)


@pytest.mark.parametrize("processor", [TurboProcessor(0.5), TurboProcessor(0.5, restore="copy", match_every=2)])
def test_same_seed_same_image_whatever_ran_before(pipe, processor):
    """Catches plans or remembered detail that survive a run, a size, a batch, a seed or an interruption."""
    pipe.set_attn_processor(processor)
    first = image(pipe, seed=3)
    image(pipe, seed=4)
    image(pipe, seed=3, height=48, width=24)
    image(pipe, seed=3, num_images_per_prompt=2, guidance_scale=1.0)

    def stop(pipeline, step, time, kwargs):
        if step == 1:
            raise RuntimeError("stopped by the user")
        return {}

    with pytest.raises(RuntimeError, match="stopped by the user"):
        image(pipe, seed=5, callback_on_step_end=stop)
    assert torch.equal(image(pipe, seed=3), first)


def test_samples_do_not_depend_on_each_other(pipe):
    """Catches one plan for images that differ."""
    pipe.set_attn_processor(TurboProcessor(0.5))
    prompts = ["a large red circle", "a small blue cross"]
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    both = pipe(prompts, num_inference_steps=4, generator=generators, output_type="np").images
    alone = image(pipe, seed=1, prompt=prompts[1])[0]
    # Batched matrix products round otherwise than single ones.
    assert torch.allclose(torch.from_numpy(both[1]), alone, atol=1e-4)


def test_what_a_run_remembers_dies_with_it(pipe):
    """Catches memory that is held between images."""
    pipe.set_attn_processor(TurboProcessor(0.5))
    image(pipe)
    told = report(pipe)
    assert told.remembered_bytes == 0 and told.most_remembered_bytes > 0


def test_a_memory_limit_is_kept(pipe):
    """Catches a limit that is only reported."""
    pipe.set_attn_processor(TurboProcessor(0.5, memory_limit_mb=0.1))
    image(pipe)
    told = report(pipe)
    assert 0 < told.most_remembered_bytes <= 1e5
    pipe.set_attn_processor(TurboProcessor(0.5, memory_limit_mb=0.0))
    with pytest.warns(NoEffectWarning, match="no token was removed in this run of 4 steps"):
        with_none = image(pipe)
    pipe.reset_attn_processor()
    assert torch.equal(with_none, image(pipe))


def test_a_run_without_effect_says_so(pipe):
    """Catches silence where every step was a full one."""
    pipe.set_attn_processor(TurboProcessor(0.5))
    with pytest.warns(NoEffectWarning, match="restore='copy'"):
        image(pipe, steps=2)
    pipe.set_attn_processor(TurboProcessor(0.5, restore="copy"))
    image(pipe, steps=2)


def test_a_late_start_is_a_run_of_its_own(pipe):
    """Catches a clock that takes the first step for the highest time."""
    unet = pipe.unet
    inputs = {"encoder_hidden_states": torch.zeros(1, 6, 32)}
    with attach(unet, TurboProcessor(0.5)), torch.no_grad():
        sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        for time in (900, 800):
            unet(sample, torch.tensor(time), **inputs)
        first = unet(sample, torch.tensor(950), **inputs).sample
    with torch.no_grad():
        assert torch.equal(first, unet(sample, torch.tensor(950), **inputs).sample)


def test_replacing_a_processor_keeps_the_stock_one_underneath(pipe):
    """Catches wrapping the wrapper."""
    stock = image(pipe)
    for ratio in (0.3, 0.5):
        pipe.set_attn_processor(TurboProcessor(ratio))
    pipe.set_attn_processor(None)
    assert torch.equal(image(pipe), stock)


def test_a_processor_that_cannot_work_leaves_the_attached_one(pipe):
    """Catches losing what was attached when its replacement is refused."""
    pipe.set_attn_processor(TurboProcessor(0.5))
    reduced = image(pipe)
    with pytest.raises(ValueError, match="downsample factors"):
        pipe.set_attn_processor(TurboProcessor(ratios={16: 0.5}))
    assert torch.equal(image(pipe), reduced)
