"""Baselines for vision-language models: each against a slow loop from its paper, at any budget, on a real model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

from gen_turbo import TurboProcessor, attach, report
from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.divprune import DivPruneProcessor
from gen_turbo.methods.fastv import FastVProcessor
from gen_turbo.methods.pool import PoolProcessor
from gen_turbo.methods.stride import StrideProcessor
from gen_turbo.methods.turbo_vit import TurboVisionProcessor
from gen_turbo.methods.visionzip import VisionZipProcessor
from gen_turbo.tokens import select as selection
from gen_turbo.vlm.decoder import last_attention
from gen_turbo.vlm.settings import Placed
from tests.vlm import oracle
from tests.vlm.test_generate import TOLERANCE, generate
from tests.vlm.tiny_kit import TEXT, VISION
from tests.vlm.tiny_vlms import PROMPTS, VLMS

METHODS = [StrideProcessor, PoolProcessor, FastVProcessor, VisionZipProcessor, DivPruneProcessor, TurboVisionProcessor]


def pixtral() -> torch.nn.Module:
    """A LLaVA whose vision tower is of a kind that is not known."""
    vision, text = PixtralVisionConfig(**VISION), LlamaConfig(**TEXT)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


def features(count: int = 20, batch: int = 2) -> torch.Tensor:
    """Random tokens (B, N, 8)."""
    return torch.randn(batch, count, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kept", [14, 5, 1])
def test_any_budget_reaches_the_language_model(method, kept):
    """Catches a budget that is rounded in a method of its own, and beams or rows that share one plan."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["ragged_padded"].inputs(vlm)
    processor = method(1 - (kept - 0.5) / 16, **({"place": "pre_llm"} if method is TurboVisionProcessor else {}))
    with attach(model, processor):
        generate(model, inputs)
        rows = report(model).layers
    assert [(row.num_tokens, row.num_kept) for row in rows] == [(3 * 16, 3 * kept)]


@pytest.mark.parametrize("processor", [VisionZipProcessor(0.5), TurboProcessor(0.5, value_weight=10.0)])
def test_a_placed_method_still_reads_the_tower(processor):
    """Catches a wrapper that hides which attention a method asks for."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["even"].inputs(vlm)
    with attach(model, processor), torch.no_grad():
        own = model(**inputs).logits
    with attach(model, Placed(processor)), torch.no_grad():
        placed = model(**inputs).logits
    assert torch.equal(own, placed)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_fastv_reads_the_attention_of_the_last_token(attention):
    """Catches the wrong layer, head average, position or padding in the score, against attention that was made."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("eager"), PROMPTS["ragged_padded"].inputs(vlm)
    with torch.no_grad():
        maps = model(**inputs, output_attentions=True).attentions[1][:, :, -1].mean(1)
    model, seen = vlm.make(attention), []

    def hook(layer, args, kwargs):
        seen.append(last_attention(layer, args[0], kwargs["position_embeddings"], inputs["attention_mask"].bool()))

    handle = model.model.language_model.layers[1].register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        model(**inputs, position_ids=None)
    handle.remove()
    assert (seen[0] - maps).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["llava", "qwen2_5", "qwen3", "paligemma"])
def test_fastv_generates_as_the_oracle(family):
    """Catches a plan that differs between images of one call, and scores of another family's attention."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["padded"].inputs(vlm)
    plans = []

    class Watching(FastVProcessor):
        def plan(self, tokens, site, frame):
            plans.append(super().plan(tokens, site, frame))
            return plans[-1]

    with attach(model, Watching(0.5, layer=2)):
        new, logits, _ = generate(model, inputs)
    assert len(plans) == 1 and len(plans[0].slot_BN) == 2
    for row in range(2):
        plan = type(plans[0])(plans[0].slot_BN[row : row + 1], plans[0].anchor_BM[row : row + 1])
        method = oracle.Method(lambda tokens, plan=plan: plan, 2, False)
        expected = oracle.generated_logits(model, vlm, inputs, new, method)
        assert (logits[row] - expected[row]).abs().max() < TOLERANCE


def test_divprune_is_greedy_max_min():
    """Catches another first token, similarity for distance, and a kept token chosen again."""
    x = features()
    plan = DivPruneProcessor(0.7).plan(x, LayerInfo("x", 0.7), StepInfo())
    for row in range(2):
        distance = 1 - torch.cosine_similarity(x[row][:, None], x[row][None], dim=-1)
        others = [[float(distance[i, j]) for j in range(20) if j != i] for i in range(20)]
        kept = [max(range(20), key=lambda i: min(others[i]))]
        while len(kept) < 6:
            left = [i for i in range(20) if i not in kept]
            kept.append(max(left, key=lambda i: min(float(distance[i, j]) for j in kept)))
        assert plan.anchor_BM[row].tolist() == sorted(kept)
        nearest = [min(range(6), key=lambda m: float(distance[t, sorted(kept)[m]])) for t in range(20)]
        assert plan.slot_BN[row].tolist() == nearest


def test_visionzip_keeps_dominant_and_merges_the_rest():
    """Catches dominant tokens that receive others, targets among the dominant, and tokens joined to another target."""
    x, value = features(), torch.rand(2, 20, generator=torch.Generator().manual_seed(2))
    processor = VisionZipProcessor(0.6, contextual=0.375)
    plan = processor.plan(x, LayerInfo("x", 0.6, semantic=lambda kind: value if kind == "class" else None), StepInfo())
    for row in range(2):
        order = sorted(range(20), key=lambda i: -float(value[row, i]))
        dominant, rest = order[:5], sorted(order[5:])
        targets = [rest[0], rest[5], rest[10]]
        members = {token: [token] for token in (*dominant, *targets)}
        for token in set(rest) - set(targets):
            cosine = {t: float(torch.cosine_similarity(x[row, token], x[row, t], dim=0)) for t in targets}
            members[max(cosine, key=cosine.get)].append(token)
        for slot, anchor in enumerate(plan.anchor_BM[row].tolist()):
            assert sorted(members[anchor]) == (plan.slot_BN[row] == slot).nonzero()[:, 0].tolist()


def test_visionzip_takes_the_class_token_of_the_tower():
    """Catches attention of another block, of patches among themselves, or of another image when beams repeat it."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("eager"), PROMPTS["padded"].inputs(vlm)
    seen = []

    class Watching(VisionZipProcessor):
        def plan(self, tokens, site, frame):
            seen.append(site.semantic("class"))
            return super().plan(tokens, site, frame)

    with attach(model, Watching(0.5)):
        generate(model, inputs, num_beams=2)
    with torch.no_grad():
        maps = model.model.vision_tower(inputs["pixel_values"], output_attentions=True).attentions
    expected = maps[1][:, :, 0, 1:].mean(1).repeat_interleave(2, 0)
    assert (seen[0] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("kept", [1, 2, 7, 23, 59, 60])
@pytest.mark.parametrize("grid", [(6, 10), (10, 6), (1, 60), (60, 1)])
def test_pooled_cells_are_rectangles_of_like_size(grid, kept):
    """Catches cells that are empty, ragged or lost when the budget does not divide the grid."""
    plan = selection.pool_cells(grid, kept)
    slots = plan.slot_BN.view(grid)
    assert plan.num_slots == kept and plan.sizes().min() >= 1
    for slot in range(kept):
        cell = (slots == slot).nonzero()
        height, width = (cell.amax(0) - cell.amin(0) + 1).tolist()
        assert height * width == len(cell)


def test_spaced_tokens_are_evenly_spaced():
    """Catches a stride that leaves the end of the image out."""
    assert selection.keep_spaced(16, 4).anchor_BM.tolist() == [[2, 6, 10, 14]]
    gaps = selection.keep_spaced(100, 37).anchor_BM.diff()
    assert gaps.min() >= 2 and gaps.max() <= 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FastVProcessor(place="pre_llm"), "place must be 'decoder', got 'pre_llm'"),
        (lambda: StrideProcessor(place="roof"), "one of input, tower, projector, pre_llm, decoder; got 'roof'"),
        (lambda: StrideProcessor(combine="glue"), "combine must be 'merge' or 'prune'"),
        (lambda: StrideProcessor(layer=0), "layer must be at least 1"),
        (lambda: VisionZipProcessor(contextual=2.0), "contextual must be a fraction"),
        (lambda: selection.keep_spaced(4, 0), "cannot keep 0 of 4 tokens"),
        (lambda: VisionZipProcessor(0.5).plan_tokens(features()), "reads the attention of a vision tower"),
        (lambda: attach(pixtral(), TurboVisionProcessor(0.5)), "vision tower of this Llava.* use place='pre_llm'"),
        (lambda: attach(VLMS["llava"].make("sdpa"), FastVProcessor(layer=4)), "layer=4 is not one of the 4 layers"),
    ],
)
def test_wrong_use_says_what_is_wrong(make, words):
    """Catches settings that are clipped or ignored."""
    with pytest.raises(ValueError, match=words):
        make()
