"""Turbo in the vision tower: the published algorithm by index, fewer tokens in every block, the grid restored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gen_turbo import IdentityProcessor, RandomProcessor, ToMeProcessor, TurboProcessor, attach, report
from gen_turbo.api import attachments
from gen_turbo.factory import build_processor
from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.turbo_vit import TurboVisionProcessor
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.settings import Placed
from gen_turbo.vlm.tower import Tower
from tests.snapshots import differences, model_state
from tests.vlm import oracle, tower_oracle
from tests.vlm.test_generate import STEPS, TOLERANCE, generate
from tests.vlm.tiny_kit import pixels
from tests.vlm.tiny_vlms import PROMPTS, VLMS

TOWERS = ["llava", "llava_siglip"]
PACKED = ["qwen2", "qwen2_5", "qwen3", "qwen3_moe", "omni3", "qwen4", "compass"]
PUBLISHED = TurboVisionProcessor(num_removed=3, alpha=0.5, scale=30.0)


def tower_of(model):
    """The vision tower and, per image, what enters its blocks."""
    return model.model.vision_tower


@torch.no_grad()
def states_before(tower, images):
    """Embeddings (B, N, C) that enter the first block."""
    x = tower.embeddings(images)
    return tower.pre_layrnorm(x) if hasattr(tower, "pre_layrnorm") else x


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", TOWERS)
def test_the_published_algorithm_by_index_and_value(family, attention):
    """Catches another split, metric, score, weight or order of merging than the paper's, and sizes left out."""
    model, images = VLMS[family].make(attention), pixels(2)
    tower, x = tower_of(model), states_before(tower_of(model), images)
    leading = x.shape[1] - 16
    used = len(tower.encoder.layers) - 1
    with attach(model, PUBLISHED):
        out = tower(images, output_hidden_states=True).hidden_states[used]
        plan = _plan(model)
    for row in range(2):
        expected, _, members = tower_oracle.encode(x[row], tower.encoder.layers[:used], leading, 3, 15.0)
        for slot, tokens in enumerate(members):
            assert (out[row, tokens] - expected[slot]).abs().max() < TOLERANCE
            if slot >= leading:
                assert plan.slot_BN[row, [token - leading for token in tokens]].eq(slot - leading).all()
    assert plan.num_slots == 16 - 3 * used


def _plan(model):
    """The tower's plan on the images of its last call, one row each."""
    plans = attachments(model)[0].stage(Tower).encoded().plans
    return TokenMap(*(torch.cat([getattr(one, name) for one in plans]) for name in ("slot_BN", "anchor_BM")))


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize(
    "processor",
    [
        PUBLISHED,
        TurboVisionProcessor(0.75),
        TurboVisionProcessor(0.5, semantic="self"),
        TurboVisionProcessor(0.9, beyond_half="diverse"),
        *(Placed(method(0.5), place="tower") for method in (TurboProcessor, ToMeProcessor, RandomProcessor)),
    ],
    ids=["published", "ratio", "self", "diverse", "turbo", "tome", "random"],
)
def test_every_block_runs_on_fewer_tokens(family, processor):
    """Catches merging that only perturbs features, and a schedule that misses the ratio."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["padded"].inputs(vlm)
    seen, layers = [], tower_of(model).encoder.layers
    handles = [layer.mlp.fc1.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[1])) for layer in layers]
    with attach(model, processor):
        model(**inputs)
        rows = {row.name: row for row in report(model).layers}
    for handle in handles:
        handle.remove()
    assert seen == sorted(seen, reverse=True) and seen[0] < seen[-1] + 16
    assert rows["model.language_model"].num_kept == 2 * (seen[-1] - _leading(model))
    if not getattr(processor, "num_removed", 0):
        assert rows["model.language_model"].num_kept == 2 * (16 - int(16 * processor.ratio))


def _leading(model):
    return int(hasattr(tower_of(model).embeddings, "class_embedding"))


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_language_model_reads_each_slot_once(family, prompt):
    """Catches copies that stay in the prompt, and slots of one image dropped from another."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS[prompt].inputs(vlm)
    with attach(model, PUBLISHED):
        new, logits, _ = generate(model, inputs)
        features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
        plan = _plan(model)

    def planned(tokens):
        rows = [row for row, one in enumerate(features) if torch.equal(one, tokens[0])]
        return type(plan)(plan.slot_BN[rows[:1]], plan.anchor_BM[rows[:1]])

    expected = oracle.generated_logits(model, vlm, inputs, new, oracle.Method(planned, 0, False), (list(features), []))
    assert logits.shape[1] == STEPS and (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", [*TOWERS, *PACKED])
@pytest.mark.parametrize(
    "processor",
    [TurboVisionProcessor(0.0), Placed(IdentityProcessor(0.5), place="tower"), TurboVisionProcessor(threshold=40)],
)
def test_nothing_merged_is_bit_identical(family, processor):
    """Catches sizes of one becoming a mask, and a residual computed another way."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["padded"].inputs(vlm)
    stock = generate(model, inputs)[1]
    with attach(model, processor):
        assert torch.equal(generate(model, inputs)[1], stock)


@pytest.mark.parametrize("family", [*TOWERS, *PACKED])
def test_detach_restores_the_tower(family):
    """Catches leftovers in blocks, attention and mergers, also after an exception in the middle of the tower."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    generate(model, inputs)
    before = model_state(model)
    # An image moves the offset of later positions in the stock model too.
    own = {"model.rope_deltas"} if family in PACKED else set()
    with attach(model, PUBLISHED):
        generate(model, inputs)
    assert set(differences(before, model_state(model))) <= own
    with pytest.raises(RuntimeError), attach(model, PUBLISHED):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:, :2]})
    assert set(differences(before, model_state(model))) <= own


def test_the_portable_weight_is_the_papers_at_its_size():
    """Catches a penalty that is not c * alpha * A at N = 16 / (c * alpha) and one that ignores the block."""
    tokens = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    value = torch.rand(1, 16, generator=torch.Generator().manual_seed(1))
    value = value / value.sum()

    site = LayerInfo("x", 0.4, semantic=lambda kind: value)
    raw = TurboVisionProcessor(0.4, alpha=0.1, scale=30.0).plan(tokens, site, StepInfo())
    portable = TurboVisionProcessor(0.4, value_weight=3.0 / 16).plan(tokens, site, StepInfo())
    late = TurboVisionProcessor(0.4, alpha=0.1, scale=30.0, beta=0.0, gamma=0).plan(tokens, site, StepInfo(num_plans=2))
    none = TurboVisionProcessor(0.4, semantic="none").plan(tokens, site, StepInfo())
    assert torch.equal(raw.slot_BN, portable.slot_BN)
    assert torch.equal(late.slot_BN, none.slot_BN) and not torch.equal(raw.slot_BN, none.slot_BN)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "configs" / "preset").glob("turbo_vit*.yaml")))
def test_released_settings_build(path):
    """Catches a preset with a key or value that the method does not know."""
    processor = build_processor(str(path))
    assert isinstance(processor, TurboVisionProcessor)
    assert (processor.alpha, processor.beta, processor.gamma, processor.place) == (5.0, 1.0, 0, "tower")
    assert processor.num_removed in (16, 30, 40)


def test_blip_settings_leave_the_published_number_of_tokens():
    """Catches a count off by the class token: 577 tokens become 217 in twelve blocks."""
    processor, left = TurboVisionProcessor(num_removed=30, semantic="none"), 576
    for block in range(12):
        tokens = torch.randn(1, left, 4, generator=torch.Generator().manual_seed(block))
        left = processor.plan(tokens, LayerInfo("x", 0.1), StepInfo(num_plans=block)).num_slots
    assert left + 1 == 217


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "path", "used"),
    [
        ("llava_next", "model.vision_tower", 2),
        ("llava_onevision", "model.vision_tower", 3),
        ("aya", "model.vision_tower", 3),
        ("gemma3", "model.vision_tower", 3),
        ("internvl", "model.vision_tower", 3),
        ("idefics3", "model.vision_model", 3),
        ("smolvlm", "model.vision_model", 3),
        ("paligemma", "model.vision_tower", 3),
    ],
)
def test_every_tower_merges_as_published_and_is_restored(family, path, used, attention):
    """Catches blocks of other names, scales on residuals, masks of whole images, and norms on the wrong side."""
    vlm = VLMS[family]
    model, inputs = vlm.make(attention), PROMPTS["padded"].inputs(vlm)
    tower, seen = model.get_submodule(path), {}
    blocks = list(getattr(tower.encoder, "layers", None) or tower.encoder.layer)
    with attach(model, PUBLISHED), torch.no_grad():
        handles = [
            blocks[0].register_forward_pre_hook(lambda m, a, k: seen.update(x=a[0]), with_kwargs=True),
            tower.encoder.register_forward_hook(lambda m, a, out: seen.update(y=out.last_hidden_state)),
        ]
        logits = generate(model, inputs)[1]
        for handle in handles:
            handle.remove()
        kept = [row.num_kept for row in report(model).layers if row.name.startswith(path)]
    leading = seen["x"].shape[1] % 4
    assert kept == [seen["x"].shape[1] - leading - 3 * (block + 1) for block in range(used)]
    assert seen["y"].shape == seen["x"].shape and torch.isfinite(logits).all()
    # Those that nothing reads are left out.
    tokens, _, members = tower_oracle.encode(seen["x"][1], blocks[:used], leading, 3, 15.0, used)
    for slot, places in enumerate(members):
        assert (seen["y"][1, places] - tokens[slot]).abs().max() < TOLERANCE
