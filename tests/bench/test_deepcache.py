"""The package DeepCache as a baseline, on a real tiny pipeline."""

import pytest
import torch

from gen_turbo.bench.catalogue import quality_catalogue
from gen_turbo.bench.settings import DeepCache
from tests.snapshots import differences, model_state
from tests.tiny_hosts import sd15_unet, sd_pipeline


def test_it_skips_the_deep_layers_and_leaves_nothing():
    """Catches a baseline that is not on, and one whose wrappers stay for the next setting."""
    pipe = sd_pipeline()
    pipe.set_progress_bar_config(disable=True)
    before, calls = model_state(pipe.unet), []
    hook = pipe.unet.mid_block.resnets[0].register_forward_hook(lambda *a: calls.append(1))

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe("a circle", num_inference_steps=4, generator=generator, output_type="pt").images

    stock = draw()
    with DeepCache("deepcache", "deepcache", 2).applied(pipe):
        cached = draw()
    hook.remove()
    assert len(calls) == 4 + 2
    assert not torch.equal(cached, stock) and torch.equal(draw(), stock)
    assert [key for key in differences(before, model_state(pipe.unet)) if "_hooks" not in key] == []


def test_a_bare_model_is_refused():
    """Catches a baseline that reads the step of no scheduler."""
    with pytest.raises(ValueError, match="needs a pipeline with a scheduler; got a UNet2DConditionModel"):
        DeepCache("deepcache", "deepcache", 2).applied(sd15_unet()).__enter__()


def test_names_are_unique():
    """Catches two settings whose records would replace each other."""
    names = [setting.name for setting in quality_catalogue(25)]
    assert len(names) == len(set(names))
