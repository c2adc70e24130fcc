"""Turbo in Qwen's vision towers: units of patches by index and value, windows, deepstack, sizes mixed in one call."""

from __future__ import annotations

import pytest
import torch

from gen_turbo import RandomProcessor, TurboProcessor, attach, report
from gen_turbo.api import attachments
from gen_turbo.methods.turbo_vit import TurboVisionProcessor
from gen_turbo.methods.visionzip import VisionZipProcessor
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.packed import PackedTower
from gen_turbo.vlm.settings import Placed
from tests.vlm import oracle, packed_oracle
from tests.vlm.test_generate import STEPS, TOLERANCE, generate
from tests.vlm.tiny_vlms import PROMPTS, VLMS

QWEN = ["qwen2", "qwen2_5", "qwen3", "qwen3_moe", "omni3", "qwen4", "compass"]
PUBLISHED = TurboVisionProcessor(num_removed=3, alpha=0.5, scale=30.0)
SIZES = [(8, 8), (4, 12), (8, 8)]


def images(sizes=SIZES, frames=1):
    """Patches of images of several sizes, in patches."""
    count = sum(frames * height * width for height, width in sizes)
    patches = torch.randn(count, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(4))
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[frames, *size] for size in sizes])}


def slow(model, given):
    """Features, inner features by level and slots of every image, one at a time."""
    found, at = [], 0
    for _, height, width in given["image_grid_thw"].tolist():
        pixels = given["pixel_values"][at : at + height * width]
        found.append(packed_oracle.encode(model.model.visual, pixels, height, width, 3, 15.0))
        at += height * width
    return found


@pytest.mark.parametrize(("family", "attention"), [*((family, "sdpa") for family in QWEN), ("qwen2_5", "eager")])
def test_the_published_algorithm_on_units_by_index_and_value(family, attention):
    """Catches a unit torn apart, positions or windows of the wrong unit, sizes left out, images mixed up."""
    model, given = VLMS[family].make(attention), images()
    with attach(model, PUBLISHED), torch.no_grad():
        out = model.get_image_features(**given)
        plans = attachments(model)[0].stage(PackedTower).encoded().plans
    for index, (features, deep, slots) in enumerate(slow(model, given)):
        assert (out.pooler_output[index] - features).abs().max() < TOLERANCE
        for level, inner in enumerate(deep):
            assert (out.deepstack_features[level][index] - inner).abs().max() < TOLERANCE
        assert plans[index].anchor_BM[0].tolist() == [anchor for anchor, _ in slots]
        for slot, (_, members) in enumerate(slots):
            assert plans[index].slot_BN[0, members].eq(slot).all()
    assert [plan.num_slots for plan in plans] == [16 - 9, 12 - 9, 16 - 9]


@pytest.mark.parametrize("prompt", ["one", "ragged_padded"])
@pytest.mark.parametrize("family", QWEN)
def test_generate_equals_the_oracle(family, prompt):
    """Catches copies that stay in the prompt, inner features of another unit, and slots of another image."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS[prompt].inputs(vlm)
    with attach(model, PUBLISHED):
        new, logits, _ = generate(model, inputs)
        kept = {row.name: row.num_kept for row in report(model).layers}["model.language_model"]
    found = slow(model, inputs)
    features = [one[0] for one in found]
    deep = [list(level) for level in zip(*(one[1] for one in found), strict=True)]

    def planned(tokens):
        index = next(index for index, one in enumerate(features) if torch.equal(one, tokens[0]))
        destination = torch.arange(16)
        for anchor, members in found[index][2]:
            destination[members] = anchor
        return TokenMap.from_destinations(destination[None])

    expected = oracle.generated_logits(model, vlm, inputs, new, oracle.Method(planned), (features, deep))
    assert logits.shape[1] == STEPS and (logits - expected).abs().max() < TOLERANCE
    assert kept == len(found) * 7


@pytest.mark.parametrize("processor", [TurboVisionProcessor(0.75), Placed(TurboProcessor(0.5), place="tower"),
                                       Placed(RandomProcessor(0.5), place="tower")])  # fmt: skip
@pytest.mark.parametrize("family", QWEN)
def test_every_block_runs_on_fewer_tokens(family, processor):
    """Catches merging that only perturbs features, and a schedule that misses the ratio of an image."""
    model, seen = VLMS[family].make(), []
    blocks = model.model.visual.blocks
    handles = [block.mlp.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape[0])) for block in blocks]
    with attach(model, processor):
        model.get_image_features(**images())
        plans = attachments(model)[0].stage(PackedTower).encoded().plans
    for handle in handles:
        handle.remove()
    assert seen == sorted(seen, reverse=True) and seen[0] < 4 * 44
    assert [plan.num_slots for plan in plans] == [n - int(n * processor.ratio) for n in (16, 12, 16)]
    assert seen[-1] == 4 * sum(plan.num_slots for plan in plans)


@pytest.mark.parametrize("family", QWEN)
def test_videos_pass_as_they_are(family):
    """Catches frames merged as if they were one image, and state of the last images used on a video."""
    model, video = VLMS[family].make(), images([(4, 8)], frames=3)
    call = {"pixel_values_videos": video["pixel_values"], "video_grid_thw": video["image_grid_thw"]}
    with torch.no_grad():
        stock = model.get_video_features(**call).pooler_output
        with attach(model, PUBLISHED):
            model.get_image_features(**images())
            attached = model.get_video_features(**call).pooler_output
    assert all(torch.equal(one, other) for one, other in zip(stock, attached, strict=True))


@pytest.mark.parametrize("family", QWEN)
def test_hidden_states_are_restored(family):
    """Catches recorded states that are shorter than the image."""
    model, given = VLMS[family].make(), images()
    with attach(model, PUBLISHED), torch.no_grad():
        out = model.get_image_features(**given, output_hidden_states=True)
    assert [state.shape[0] for state in out.hidden_states] == [4 * 44] * len(out.hidden_states)
    assert out.last_hidden_state.shape[0] == 4 * 44


@pytest.mark.parametrize("family", QWEN)
def test_the_gate_reads_the_towers_attention(family):
    """Catches attention in the order of windows, or of other patches, given to a method before the language model."""
    vlm, seen = VLMS[family], []
    model, inputs = vlm.make(), PROMPTS["even"].inputs(vlm)

    class Watching(VisionZipProcessor):
        def plan(self, tokens, site, frame):
            seen.append(site.semantic("self"))
            return super().plan(tokens, site, frame)

    with attach(model, Watching(0.5, semantic="self")), torch.no_grad():
        model(**inputs)
    for image in range(2):
        pixels = inputs["pixel_values"][64 * image : 64 * (image + 1)]
        units = packed_oracle.begin(model.model.visual, pixels, 8, 8)
        full = getattr(model.model.visual, "fullatt_block_indexes", range(3))
        with torch.no_grad():
            for index, block in enumerate(model.model.visual.blocks):
                added, _, received = packed_oracle.attend(units, block, index in full)
                for unit, more in zip(units, added, strict=True):
                    unit.x = unit.x + more
                    unit.x = unit.x + block.mlp(block.norm2(unit.x))
        for unit, value in zip(units, received, strict=True):
            assert abs(float(seen[0][image, unit.members[0]]) - value) < TOLERANCE
