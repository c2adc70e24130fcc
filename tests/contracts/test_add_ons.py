"""What people hang on a stock pipeline, real IP-Adapter, LoRA and ControlNet, together with an attached processor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from stated import TurboProcessor

from gen_turbo import IdentityProcessor, attach, report
from tests.engine.families import family
from tests.snapshots import differences, model_state
from tests.tiny_hosts import image as image_of_steps
from tests.tiny_hosts import sd_pipeline
from tests.tiny_pipelines import control_pipeline, ip_adapter_pipeline, prompt_image, save_lora

NOTHING = [TurboProcessor(0.0), IdentityProcessor(0.4)]
SOMETHING = [TurboProcessor(0.4), TurboProcessor(0.4, restore="copy")]
ONE_OF_EACH = [NOTHING[0], SOMETHING[0]]


def image(pipe, **kwargs):
    """An image in three steps: two in full and one with remembered detail."""
    return image_of_steps(pipe, steps=3, **kwargs)


def num_reduced(pipe) -> int:
    """How many layers have run on fewer tokens."""
    return sum(layer.num_reduced > 0 for layer in report(pipe).layers)


def load_adapter(pipe, folder: Path) -> None:
    """Loads what `ip_adapter_pipeline` saved, as users do."""
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name="adapter.safetensors")


def adapted_image(pipe):
    """An image whose prompt is a text and an image."""
    return image(pipe, ip_adapter_image=prompt_image())


@pytest.mark.parametrize("settings", [{}, {"merge_span": 0}], ids=["block", "span"])
def test_what_removes_nothing_stands_beside_a_cache(settings):
    """Catches the identity refused with scope="block" beside a cache of diffusers, which it does not touch."""
    model, run = family("flux")
    model.enable_cache(FirstBlockCacheConfig(threshold=0.05))

    def cached():
        model._reset_stateful_cache()
        with model.cache_context("cond"):
            return run(times=(900, 899))

    stock = cached()
    with attach(model, IdentityProcessor(0.4, scope="block", **settings)):
        assert torch.equal(cached(), stock)
    with attach(model, TurboProcessor(0.4, scope="block")), pytest.raises(ValueError, match="cache that is on"):
        cached()


def test_ip_adapter_loaded_before_and_then_attached(tmp_path):
    """Catches a lost image prompt, and a detach that installs fresh processors in place of the adapter's."""
    pipe = ip_adapter_pipeline(tmp_path)
    load_adapter(pipe, tmp_path)
    stock, before = adapted_image(pipe), model_state(pipe.unet)
    for processor in NOTHING:
        with attach(pipe, processor):
            assert torch.equal(adapted_image(pipe), stock)
    for processor in SOMETHING:
        with attach(pipe, processor):
            assert not torch.equal(adapted_image(pipe), stock)
            assert num_reduced(pipe) == 3
    assert [key for key in differences(before, model_state(pipe.unet)) if key != "random"] == []


@pytest.mark.parametrize("processor", ONE_OF_EACH, ids=["nothing", "corrected"])
def test_ip_adapter_loaded_while_attached(tmp_path, processor):
    """Catches a processor that does not survive being made anew from its class, or swallows the image prompt."""
    reference = ip_adapter_pipeline(tmp_path)
    load_adapter(reference, tmp_path)
    stock = adapted_image(reference)
    with attach(reference, processor):
        expected = adapted_image(reference)
    pipe = ip_adapter_pipeline(tmp_path)
    without = image(pipe)
    attachment = attach(pipe, processor)
    load_adapter(pipe, tmp_path)
    assert {layer.name for layer in report(pipe).layers if layer.status == "reduced"} == set(attachment.layers)
    assert torch.equal(adapted_image(pipe), expected)
    attachment.detach()
    assert torch.equal(adapted_image(pipe), stock)
    pipe.unload_ip_adapter()
    assert torch.equal(image(pipe), without)


def test_the_adapters_processors_stay_where_they_are(tmp_path):
    """Catches wrapping cross-attention, whose weights would then leave the module tree."""
    pipe = ip_adapter_pipeline(tmp_path)
    load_adapter(pipe, tmp_path)
    keys, owned = list(pipe.unet.state_dict()), dict(pipe.unet.attn_processors)
    with attach(pipe, TurboProcessor(0.4)):
        for name, processor in pipe.unet.attn_processors.items():
            if isinstance(owned[name], IPAdapterAttnProcessor2_0):
                assert processor is owned[name]
        assert list(pipe.unet.state_dict()) == keys


@pytest.mark.parametrize("processor", ONE_OF_EACH, ids=["nothing", "corrected"])
def test_lora_before_while_and_after(tmp_path, processor):
    """Catches projections that a binding has kept from before the LoRA, and a LoRA that detaching takes along."""
    save_lora(tmp_path)
    reference = sd_pipeline()
    without = image(reference)
    reference.load_lora_weights(tmp_path)
    stock = image(reference)
    with attach(reference, processor):
        expected = image(reference)
    assert not torch.equal(stock, without)
    assert torch.equal(expected, stock) == (processor.ratio == 0)
    pipe = sd_pipeline()
    attachment = attach(pipe, processor)
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(image(pipe), expected)
    attachment.detach()
    assert torch.equal(image(pipe), stock)
    pipe.unload_lora_weights()
    assert torch.equal(image(pipe), without)


def test_a_fused_lora_reaches_reduced_attention(tmp_path):
    """Catches weights that were copied when the processor was attached."""
    save_lora(tmp_path)
    pipe = sd_pipeline()
    pipe.load_lora_weights(tmp_path)
    pipe.set_attn_processor(TurboProcessor(0.4))
    loose = image(pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    # Adding the LoRA to the weights rounds otherwise than adding its output.
    assert torch.allclose(image(pipe), loose, atol=1e-3)
    reduced = image(pipe)
    pipe.reset_attn_processor()
    assert not torch.equal(image(pipe), reduced)


def test_controlnet_guides_a_reduced_unet():
    """Catches a root hook that loses the residuals of the ControlNet, and a reducer that lands in the ControlNet."""
    pipe = control_pipeline()
    stock, uncontrolled = (image(pipe, image=prompt_image(), controlnet_conditioning_scale=s) for s in (1.0, 0.0))
    before = [model_state(model) for model in (pipe.unet, pipe.controlnet)]
    for processor in NOTHING:
        with attach(pipe, processor):
            assert torch.equal(image(pipe, image=prompt_image()), stock)
    for processor in SOMETHING:
        with attach(pipe, processor) as attachment:
            reduced = image(pipe, image=prompt_image())
            free = image(pipe, image=prompt_image(), controlnet_conditioning_scale=0.0)
            assert num_reduced(pipe) == len(attachment.layers) == 3
        assert not torch.equal(reduced, stock)
        assert (reduced - stock).norm() < (stock - uncontrolled).norm() and not torch.equal(reduced, free)
    after = [model_state(model) for model in (pipe.unet, pipe.controlnet)]
    changed = [key for a, b in zip(before, after, strict=True) for key in differences(a, b) if key != "random"]
    assert changed == []
