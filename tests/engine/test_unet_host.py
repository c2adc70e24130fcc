"""The UNet host on real classes: nothing at ratio 0, a shorter sequence above, exact restoration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0
from stated import TurboProcessor
from torch.overrides import TorchFunctionMode

from gen_turbo import IdentityProcessor, RandomProcessor, ToMeProcessor, attach, report
from tests.snapshots import differences, model_state
from tests.tiny_hosts import UNETS, run_unet, sd_pipeline, unet_inputs

ABOVE_ZERO = [TurboProcessor(0.5), TurboProcessor(0.5, restore="copy"), ToMeProcessor(0.5), RandomProcessor(0.5)]


class KeyLengths(TorchFunctionMode):
    """Records how many keys each attention call really sees, and lets the call through."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.seen.append(args[1].shape[-2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("size", [(16, 16), (18, 26), (15, 9)])
@pytest.mark.parametrize("processor", [TurboProcessor(0.0), IdentityProcessor(0.5), ToMeProcessor(0.0)])
def test_nothing_removed_is_bit_identical(name, size, processor):
    """Catches a wrapper that loses an argument or computes even the identity another way."""
    unet, inputs = UNETS[name](), unet_inputs(size=size)
    stock = run_unet(unet, **inputs)
    with attach(unet, processor):
        assert torch.equal(run_unet(unet, **inputs), stock)


@pytest.mark.parametrize("name", UNETS)
@pytest.mark.parametrize("size", [(16, 16), (18, 26), (15, 9)])
@pytest.mark.parametrize("processor", ABOVE_ZERO, ids=["corrected", "copied", "tome", "random"])
def test_fewer_tokens_really_reach_attention(name, size, processor):
    """Catches a method that only perturbs the image, and SDXL being left alone in silence."""
    unet, inputs = UNETS[name](), unet_inputs(size=size)
    stock = run_unet(unet, **inputs)
    with attach(unet, processor), KeyLengths() as keys:
        reduced = run_unet(unet, **inputs)
        rows = [layer for layer in report(unet).layers if layer.status == "reduced"]
    assert reduced.shape == stock.shape and not torch.equal(reduced, stock)
    for row in rows:
        assert row.num_kept == row.num_tokens - int(row.num_tokens * 0.5)
        assert row.num_reduced > 0 and keys.seen.count(row.num_kept) >= row.num_reduced


@pytest.mark.parametrize(("name", "downsample"), [("sd15", 1), ("sd2", 1), ("sdxl", 2)])
def test_the_finest_level_with_attention_is_reached(name, downsample):
    """Catches a fixed level, which finds nothing on SDXL."""
    unet = UNETS[name]()
    with attach(unet, TurboProcessor(0.5)):
        levels = {layer.downsample for layer in report(unet).layers if layer.status == "reduced"}
    assert levels == {downsample}


def test_ratios_by_level_choose_the_layers():
    """Catches level arithmetic that is wrong on the way up."""
    unet = UNETS["sd15"]()
    with attach(unet, TurboProcessor(max_downsample=0, ratios={2: 0.5})) as attachment:
        run_unet(unet, **unet_inputs())
        rows = [layer for layer in report(unet).layers if layer.status == "reduced"]
    assert len(attachment.layers) == 3 and {row.num_tokens for row in rows} == {64}
    assert {row.grid for row in rows} == {(8, 8)}


@pytest.mark.parametrize("name", UNETS)
def test_detach_restores_every_object(name):
    """Catches leftovers: hooks, attributes, new processor objects, draws from the global generator."""
    unet = UNETS[name]()
    before = model_state(unet)
    attachment = attach(unet, TurboProcessor(0.5))
    run_unet(unet, **unet_inputs())
    attachment.detach()
    attachment.detach()
    assert differences(before, model_state(unet)) == []


def test_detach_restores_after_an_exception():
    """Catches restoration that only happens when nothing goes wrong."""
    unet = UNETS["sd15"]()
    before = model_state(unet)
    with pytest.raises(RuntimeError), attach(unet, TurboProcessor(0.5)):
        run_unet(unet, **unet_inputs() | {"encoder_hidden_states": torch.zeros(2, 6, 7)})
    assert differences(before, model_state(unet)) == []


def test_every_layer_keeps_its_processor():
    """Catches replacing processors, where an IP-Adapter keeps its weights and diffusers compares classes."""
    unet = UNETS["sd15"]()
    before = unet.attn_processors
    with attach(unet, TurboProcessor(0.5)):
        assert all(processor is before[name] for name, processor in unet.attn_processors.items())
        unet.set_default_attn_processor()


def test_a_second_attachment_raises_and_changes_nothing():
    """Catches stacking one wrapper on another."""
    unet = UNETS["sd15"]()
    with attach(unet, TurboProcessor(0.5)):
        before = model_state(unet)
        with pytest.raises(ValueError, match=r"already has a TurboProcessor attached; call gen_turbo.detach first"):
            attach(unet, ToMeProcessor(0.5))
        assert differences(before, model_state(unet)) == []


@pytest.mark.parametrize(
    ("processor", "error", "words"),
    [
        (TurboProcessor(ratios={8: 0.5}), ValueError, r"ratios names downsample factors \[8\].*at \[1, 2, 4\]"),
        (TurboProcessor(max_downsample=0), ValueError, "no layer would be reduced"),
        (
            TurboProcessor(layer_ratios={"up.*": 0.5}),
            ValueError,
            r"layer_ratios names 'up.\*', .*there are: down_blocks",
        ),
        (TurboProcessor(layer_ratios={"*.attn2": 0.5}), ValueError, r"which is no layer of UNet2D.* can be reduced"),
        ("turbo", TypeError, "expected a processor such as TurboProcessor"),
    ],
)
def test_what_cannot_work_raises_before_anything_changes(processor, error, words):
    """Catches a half-attached model."""
    unet = UNETS["sd15"]()
    before = model_state(unet)
    with pytest.raises(error, match=words):
        attach(unet, processor)
    assert differences(before, model_state(unet)) == []


def test_an_unsupported_model_is_refused_by_name():
    """Catches silence on a model that no host knows."""
    with pytest.raises(ValueError, match="Linear is not supported; supported: UNet2DConditionModel"):
        attach(torch.nn.Linear(2, 2), TurboProcessor(0.5))


def test_processors_set_while_attached_run_on_merged_tokens():
    """Catches a layer that is lost to whoever sets another processor, and one that detaching takes along."""
    unet, inputs = UNETS["sd15"](), unet_inputs()
    stock = run_unet(unet, **inputs)
    attachment = attach(unet, TurboProcessor(0.5))
    reduced = run_unet(unet, **inputs)
    unet.fuse_qkv_projections()
    fused = unet.attn_processors
    with KeyLengths() as keys:
        assert torch.allclose(run_unet(unet, **inputs), reduced, atol=1e-5)
    assert 128 in keys.seen
    attachment.detach()
    assert unet.attn_processors == fused and torch.allclose(run_unet(unet, **inputs), stock, atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_set_on_the_model_itself_it_says_what_to_do(name):
    """Catches another algorithm that runs in silence where nothing was attached."""
    unet = UNETS[name]()
    unet.set_attn_processor(TurboProcessor(0.4))
    with pytest.raises(TypeError, match=r"pipe\.set_attn_processor\(TurboProcessor\(\.\.\.\)\)"):
        run_unet(unet, **unet_inputs())
    unet.set_attn_processor(AttnProcessor2_0())
    with attach(unet, TurboProcessor(0.4)):
        run_unet(unet, **unet_inputs())


def test_guidance_halves_share_one_plan():
    """Catches one plan per row, which makes the two halves disagree on which tokens exist."""
    pipe = sd_pipeline()
    plans = []

    class Watching(TurboProcessor):
        def plan(self, tokens, site, frame):
            plans.append(super().plan(tokens, site, frame))
            return plans[-1]

    pipe.set_attn_processor(Watching(0.5))
    pipe("a large red circle", num_inference_steps=3, guidance_scale=4.0, output_type="np", num_images_per_prompt=3)
    assert [plan.slot_BN.shape[0] for plan in plans] == [3]
