"""Turbo with the semantic value that the prompt gives, on real UNets and a real pipeline."""

from __future__ import annotations

import math

import pytest
import torch
from stated import TurboProcessor

from gen_turbo import attach
from gen_turbo.method import LayerInfo, StepInfo
from tests.tiny_hosts import UNETS, image, run_unet, sd_pipeline, unet_inputs

# Softmax in float32 against Python's float64.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


class Watching(TurboProcessor):
    """Keeps what it planned from, and plans."""

    def plan(self, tokens, site, frame):
        self.seen = tokens, site.name, site.semantic("text")
        return super().plan(tokens, site, frame)


def oracle(cross, tokens, text, words):
    """Mean over heads of the attention of each token (N, C) to some of the text tokens (T, D), by loops."""
    q, k = (tokens @ cross.to_q.weight.T).tolist(), (text @ cross.to_k.weight.T).tolist()
    width = len(q[0]) // cross.heads
    values = []
    for row in q:
        shares = []
        for start in range(0, len(row), width):
            part = slice(start, start + width)
            logits = [sum(a * b for a, b in zip(row[part], key[part], strict=True)) / math.sqrt(width) for key in k]
            weights = [math.exp(logit) for logit in logits]
            shares.append(sum(weights[t] for t in words) / sum(weights))
        values.append(sum(shares) / len(shares))
    return torch.tensor(values)


@pytest.mark.parametrize("name", UNETS)
def test_the_value_equals_the_loop(name):
    """Catches a softmax over image tokens, a missing scale, the beginning of the text or zero padding as words."""
    unet, inputs = UNETS[name](), unet_inputs(batch=1)
    text = inputs["encoder_hidden_states"]
    text[:, 4:] = 0
    processor = Watching(0.5, semantic="text")
    with attach(unet, processor):
        run_unet(unet, **inputs)
    tokens, layer, value = processor.seen
    cross = unet.get_submodule(layer.replace("attn1", "attn2"))
    with torch.no_grad():
        torch.testing.assert_close(value[0], oracle(cross, tokens[0], text[0], [1, 2, 3]), **ROUNDING)


def test_with_guidance_only_the_prompt_is_asked():
    """Catches the text of the unconditional half, which says nothing of the image."""
    pipe, values, texts = sd_pipeline(), [], []
    pipe.unet.register_forward_pre_hook(
        lambda model, args, kwargs: texts.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    processor = Watching(0.5, semantic="text", restore="copy")
    pipe.set_attn_processor(processor)
    image(pipe, guidance_scale=4.0, steps=2)
    tokens, layer, values = processor.seen
    cross = pipe.unet.get_submodule(layer.replace("attn1", "attn2"))
    words = range(1, texts[0].shape[1])
    with torch.no_grad():
        expected = [oracle(cross, tokens[0, :5], text, words) for text in texts[0]]
    assert len(texts[0]) == 2 and values.shape[0] == 1
    torch.testing.assert_close(values[0, :5], expected[1], **ROUNDING)
    assert not torch.allclose(values[0, :5], expected[0], **ROUNDING)


@pytest.mark.parametrize("restore", ["copy", "residual"])
def test_another_prompt_keeps_other_tokens(restore):
    """Catches a value that is asked for and then not used, or that a run keeps for the next."""
    pipe = sd_pipeline()
    processor = Watching(0.5, semantic="text", value_weight=5.0, restore=restore)
    pipe.set_attn_processor(processor)
    images, values = [], []
    for prompt in ("a large red circle", "a small blue cross", "a large red circle"):
        images.append(image(pipe, prompt=prompt))
        values.append(processor.seen[2])
    assert torch.equal(images[0], images[2])
    assert not torch.allclose(values[0], values[1])


def test_a_token_that_the_text_means_never_leaves():
    """Catches the wrong sign: the most meant of equal tokens must be the one that stays."""
    tokens = torch.ones(1, 64, 8)
    value = torch.full((1, 64), 0.1)
    value[:, 9] = 0.9
    site = LayerInfo("here", 0.5, (8, 8), semantic=lambda kind: value if kind == "text" else None)
    plan = TurboProcessor(0.5, semantic="text", value_weight=0.05).plan(tokens, site, StepInfo())
    assert 9 in plan.anchor_BM


def test_no_text_is_an_error_and_not_a_silence():
    """Catches a setting that does nothing where a model has no text for it."""
    tokens = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0))
    site = LayerInfo("down_blocks.0.attn1", 0.5, (8, 8), semantic=lambda kind: None)
    processor = TurboProcessor(0.5, semantic="text")
    with pytest.raises(ValueError, match=r"found no text at down_blocks\.0\.attn1.*use semantic='self' or 'none'"):
        processor.plan(tokens, site, StepInfo())


def test_a_block_without_cross_attention_has_no_text():
    """Catches a cross-attention that is remembered from an earlier attachment."""
    unet, inputs = UNETS["sd15"](), unet_inputs()
    with attach(unet, TurboProcessor(0.5, semantic="text")) as attachment:
        run_unet(unet, **inputs)
    for layer in attachment.layers:
        unet.get_submodule(layer.removesuffix(".attn1")).attn2 = None
    with attach(unet, TurboProcessor(0.5, semantic="text")), pytest.raises(ValueError, match="found no text"):
        run_unet(unet, **inputs)


def test_a_plan_without_a_model_takes_redundancy_alone():
    """Catches `plan_tokens` failing for want of a text."""
    tokens = torch.randn(1, 64, 8, generator=torch.Generator().manual_seed(0))
    plans = [TurboProcessor(0.5, semantic=kind).plan_tokens(tokens, grid=(8, 8)) for kind in ("text", "none")]
    assert torch.equal(plans[0].slot_BN, plans[1].slot_BN)
