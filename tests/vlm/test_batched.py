"""Batches: operators do not grow with them, padding that nobody needs leaves, rows are what they are alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from gen_turbo import PARProcessor, TurboProcessor, attach, report
from gen_turbo.registry import METHODS
from gen_turbo.training.choosers import RandomChooser
from gen_turbo.vlm.counts import token_flops
from gen_turbo.vlm.routes import Prompt as Read
from gen_turbo.vlm.settings import Placed
from tests.vlm.test_generate import TOLERANCE
from tests.vlm.tiny_kit import IMAGE, ready
from tests.vlm.tiny_vlms import PROMPTS, VLMS, Prompt

TOKENS = 576
KEEP = 64


class Operators(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found[str(function)] += 1
        return function(*args, **(kwargs or {}))


def deep():
    """As many layers as LLaVA-1.5 7B, as many patches as CLIP-L/336, the smallest width."""
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=24, num_attention_heads=2, image_size=48, patch_size=2
    )
    text = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=32, num_attention_heads=2, vocab_size=100,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return ready(
        LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE))
    )


def operators(model, batch):
    """Operators of one prefill of a batch of prompts."""
    ids = torch.full((batch, TOKENS + 12), IMAGE)
    ids[:, :4], ids[:, -8:] = 5, 6
    pixels = torch.randn(batch, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), Operators() as counted:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels)
    return counted.found.total()


@pytest.mark.parametrize(
    ("name", "settings", "most"),
    [
        ("turbo_vit", {}, 1.25),
        ("turbo_vit", {"keep": 32, "beyond_half": "diverse"}, 1.25),
        ("turbo_vit", {"place": "pre_llm"}, 1.1),
        ("divprune", {}, 1.1),
        ("fastv", {}, 1.1),
        ("visionzip", {}, 1.1),
        ("vistog_vit", {}, 1.1),
        ("stride", {}, 1.1),
        ("pool", {}, 1.1),
        ("resize", {}, 1.1),
    ],
)
def test_operators_do_not_grow_with_the_batch(name, settings, most):
    """Catches work row by row, layouts made anew in every call, and a merge in every block of a deep tower."""
    model = deep()
    stock = operators(model, 1)
    with attach(model, METHODS[name](**{"keep": KEEP} | settings)):
        found = {}
        for batch in (1, 8, 16):
            # The first call of a shape makes the tables that later ones find.
            operators(model, batch)
            found[batch] = operators(model, batch)
    assert max(found.values()) <= most * stock, found[8] / stock
    assert found[16] == found[8]


@pytest.mark.parametrize("family", ["qwen2", "qwen2_5"])
def test_operators_of_a_packed_tower_do_not_grow_with_the_batch(family):
    """Catches images of a packed tower that are merged, or whose segments attend, one by one."""
    vlm = VLMS[family]
    model = vlm.make("sdpa")

    def count(images):
        given = vlm.images([images])
        with torch.no_grad(), Operators() as counted:
            model.model.visual(given["pixel_values"], grid_thw=given["image_grid_thw"])
        return counted.found.total()

    with attach(model, METHODS["turbo_vit"](0.5)):
        few, many = count(16), count(32)
    stock = count(32) - count(16)
    # Stock works out places image by image, and so does the first of the three blocks, before anything merged.
    assert many - few < stock


def test_padding_that_nobody_needs_leaves():
    """Catches rows that stay as long as the longest was before its image tokens left."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), Prompt([["i", "i", "i", 2], [6]]).inputs(vlm)
    seen = []
    handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[1]))
    stock = model(**inputs).logits
    with attach(model, TurboProcessor(keep=4)):
        found = model(**inputs).logits
        row = report(model).layers[0]
    handle.remove()
    assert seen == [50, 14] and found.shape == stock.shape
    # The row without an image reads the same six words as before.
    assert (found[1, -6:] - stock[1, -6:]).abs().max() < TOLERANCE
    assert (row.num_tokens, row.num_kept) == (48, 12)
    assert row.flops / row.stock_flops == pytest.approx(14 / 50)


def test_what_a_cut_saves_is_counted_from_its_layer_on():
    """Catches savings in layers that ran in full."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    with attach(model, Placed(TurboProcessor(keep=4), place="decoder", layer=3)):
        model(**inputs)
        row = report(model).layers[0]
    assert row.flops / row.stock_flops == pytest.approx(1 - 1 / 4 * 12 / 23)


def test_rows_without_a_image_keep_their_words():
    """Catches words that leave a row because another row has an image."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), Prompt([[2, "i", 9], [9]]).inputs(vlm)
    alone = model(input_ids=inputs["input_ids"][1:, -9:]).logits
    with attach(model, TurboProcessor(0.6, text_ratio=0.5)):
        found = model(**inputs).logits
    assert (found[1, -9:] - alone[0]).abs().max() < TOLERANCE


def test_random_routes_are_those_of_the_prompt_alone():
    """Catches a draw that depends on the other rows of a batch or on its padding, and one that is always the same."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["ragged_padded"].inputs(vlm)
    one = {"input_ids": inputs["input_ids"][1:2], "attention_mask": inputs["attention_mask"][1:2]}
    real = one["attention_mask"][0].bool()
    one = {name: value[:, real] for name, value in one.items()} | {"pixel_values": inputs["pixel_values"][2:3]}
    for mode in ("drop", "mask"):
        with attach(model, PARProcessor(router="random", tokens=0.5, layers=2, mode=mode)):
            together = model(**inputs, use_cache=False).logits[1, -1]
            alone = model(**one, use_cache=False).logits[0, -1]
        assert (together - alone).abs().max() < TOLERANCE
    mark = torch.ones(1, 12, dtype=torch.bool)
    reads = [Read(torch.zeros(1, 12, 4), mark, mark & (torch.arange(12) >= skip)) for skip in (0, 1)]
    scores = [RandomChooser(6)(read) for read in reads]
    assert not torch.equal(scores[0].token_BL, scores[1].token_BL)


@pytest.mark.parametrize("place", ["pre_llm", "decoder"])
def test_adaptive_budgets_share_what_there_is(place):
    """Catches budgets that are all the same or do not add up, and a plain image that keeps more than busy ones."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), Prompt([[2, "i", 5]] * 4).inputs(vlm)
    inputs["pixel_values"][0] = 0.1
    kept = []
    with attach(model, Placed(METHODS["divprune"](keep=6, adaptive=True), place=place, combine="prune")) as attachment:
        attachment.parts[0].watch(lambda first, images, reduction: kept.append(reduction.lengths()))
        model(**inputs)
    assert len(set(kept[0])) > 1 and sum(kept[0]) == 4 * 6
    assert kept[0][0] == min(kept[0])


def test_of_experts_those_are_counted_that_a_token_is_sent_to():
    """Catches experts left out of the cost of a layer, and all of them counted."""
    text = VLMS["qwen3_moe"].make().model.language_model
    attention, experts = 2 * 32 * 32 + 2 * 32 * 16, 2 * 3 * 32 * 16
    assert token_flops(text, first=2) == 2 * 2 * (attention + 4 * 32 + experts)


@pytest.mark.parametrize("family", VLMS)
@pytest.mark.parametrize("name", ["turbo", "tome", "vistog", "random", "divprune", "stride", "pool"])
def test_any_method_keeps_as_few_tokens_as_asked(name, family):
    """Catches a cap at three of four tokens, and numbers that repeated merging misses."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    for settings in ({"keep": 1}, {"ratio": 0.97}, {"keep": 2}):
        with attach(model, METHODS[name](**settings)):
            model(**inputs)
            row = report(model).layers[0]
        assert row.num_kept == settings.get("keep", vlm.num_tokens - int(vlm.num_tokens * 0.97))
