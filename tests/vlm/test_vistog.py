"""VisToG in real towers: isolation, the masked form, fewer tokens for the language model, and the way back."""

from __future__ import annotations

import pytest
import torch

from gen_turbo import attach, report
from gen_turbo.api import attachments
from gen_turbo.factory import build_processor
from gen_turbo.methods.pool import PoolProcessor
from gen_turbo.methods.vistog_vit import VisToGVisionProcessor
from gen_turbo.tokens.select import pool_cells
from gen_turbo.training.vistog import VisToGArtefact
from gen_turbo.vlm.cache_argument import cache_in
from gen_turbo.vlm.grouping import Grouping
from tests.snapshots import differences, model_state
from tests.vlm import oracle
from tests.vlm.test_blip import MODELS, run
from tests.vlm.test_generate import STEPS, TOLERANCE, generate
from tests.vlm.tiny_kit import pixels
from tests.vlm.tiny_vlms import PROMPTS, VLMS

FAMILIES = ["llava", "llava_siglip", "paligemma"]


def shake(part, seed=0):
    """Gives the learned parts of an attachment weights that are far from their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in part.grouping.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.5)
        part.grouping.log_locality.fill_(-2.0)
    return part


def grouping_of(model):
    """The stage between tower and projector."""
    return attachments(model)[0].stage(Grouping)


def attached(model, processor, seed=0):
    """An attachment with shaken weights."""
    attachment = attach(model, processor)
    shake(grouping_of(model), seed)
    return attachment


def projector_of(model):
    """What reads the patches."""
    return model.model.multi_modal_projector


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_does_not_see_semantic_tokens(family, attention):
    """Catches an image that attends to the semantic tokens behind it, and states that still hold them."""
    model, images = VLMS[family].make(attention), pixels(2)
    tower = model.model.vision_tower
    stock = tower(images, output_hidden_states=True)
    with attached(model, VisToGVisionProcessor(0.5)):
        out = tower(images, output_hidden_states=True)
    assert (out.last_hidden_state - stock.last_hidden_state).abs().max() < TOLERANCE
    for ours, theirs in zip(out.hidden_states, stock.hidden_states, strict=True):
        assert (ours is None and theirs is None) or (ours - theirs).abs().max() < TOLERANCE


@pytest.mark.parametrize("first_block", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_run_under_a_mask(family, first_block):
    """Catches keys of another block, semantic tokens that miss the image or each other, and a missing last norm."""
    model, images = VLMS[family].make("sdpa"), pixels(2)
    tower, seen = model.model.vision_tower, {}
    with attached(model, VisToGVisionProcessor(0.5, first_block=first_block)), torch.no_grad():
        part = grouping_of(model)
        layer = part.grouping.register_forward_pre_hook(lambda m, args: seen.update(groups=args[0], patches=args[1]))
        model.get_image_features(pixel_values=images)
        layer.remove()
        grouping = part.grouping
    blocks, enters = tower.encoder.layers, {}
    hook = blocks[0].register_forward_pre_hook(lambda m, args, kwargs: enters.update(x=args[0]), with_kwargs=True)
    tower(images)
    hook.remove()
    used = part._facts.last_block(model) % len(blocks) + 1
    x, leading = enters["x"], enters["x"].shape[1] - 16
    with torch.no_grad():
        for index, block in enumerate(blocks[:used]):
            if index == first_block:
                x = torch.cat([x, grouping.enter(x[:, leading:], (4, 4))], 1)
            mask = torch.zeros(x.shape[1], x.shape[1])
            mask[: leading + 16, leading + 16 :] = -torch.inf
            x = block(x, attention_mask=mask[None, None])
        x = tower.post_layernorm(x) if family == "paligemma" else x
    assert (seen["groups"] - x[:, leading + 16 :]).abs().max() < TOLERANCE
    assert (seen["patches"] - x[:, leading : leading + 16]).abs().max() < TOLERANCE


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_language_model_reads_groups_alone(family, prompt):
    """Catches placeholders, positions, masks or caches that do not shrink with the groups, at any step or row."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS[prompt].inputs(vlm)
    rows = []
    hook = projector_of(model).register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[1]))
    with attached(model, VisToGVisionProcessor(num_tokens=5)):
        new, logits, out = generate(model, inputs)
        features = list(model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output)
        seats = grouping_of(model).encoded().plans[0]
        assert report(model).layers[0].num_kept == 5 * len(features)
    hook.remove()
    columns = int((inputs["input_ids"] != 99).sum(1).max()) + 5 * max(row.count("i") for row in PROMPTS[prompt].rows)
    if prompt == "one":
        assert cache_in(out).layers[0].keys.shape[2] == columns + STEPS - 1
    expected = oracle.generated_logits(
        model, vlm, inputs, new, oracle.Method(lambda x: seats, 0, False), (features, [])
    )
    assert logits.shape[1] == STEPS and (logits - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_projector_reads_groups_alone(family):
    """Catches a projector that still runs on every patch."""
    model, rows = VLMS[family].make("sdpa"), []
    first = next(module for module in projector_of(model).modules() if isinstance(module, torch.nn.Linear))
    hook = first.register_forward_pre_hook(lambda m, args: rows.append(args[0].shape[1]))
    with attached(model, VisToGVisionProcessor(num_tokens=6)):
        model.get_image_features(pixel_values=pixels(2))
    hook.remove()
    assert rows == [6]


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_it_is_pooling_before_the_projector(family, ratio):
    """Catches an untrained state that is worse than pooling at the same number."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["padded"].inputs(vlm)
    logits = []
    for processor in (VisToGVisionProcessor(ratio), PoolProcessor(ratio, place="projector")):
        with attach(model, processor):
            logits.append(generate(model, inputs)[1])
    assert (logits[0] - logits[1]).abs().max() < TOLERANCE
    assert (logits[0] - generate(model, inputs)[1]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_untrained_features_are_those_of_pooled_patches(family):
    """Catches pooling of something else than what the projector reads, or in other cells."""
    model, images, seen = VLMS[family].make("sdpa"), pixels(2), {}
    projector, cells = projector_of(model), pool_cells((4, 4), 5)
    hook = projector.register_forward_pre_hook(lambda m, args: seen.update(patches=args[0]))
    model.get_image_features(pixel_values=images)
    hook.remove()
    expected = projector(cells.merge(seen["patches"]))
    with attach(model, VisToGVisionProcessor(num_tokens=5)):
        found = torch.stack(list(model.get_image_features(pixel_values=images).pooler_output))
    assert (cells.select(found) - expected).abs().max() < TOLERANCE


def test_images_of_a_batch_keep_their_own_groups():
    """Catches one image's groups in another's places."""
    vlm = VLMS["llava"]
    model, images = vlm.make("sdpa"), pixels(3)
    with attached(model, VisToGVisionProcessor(0.6)):
        together = model.get_image_features(pixel_values=images).pooler_output
        slots = grouping_of(model).slots()
        for row in range(3):
            alone = model.get_image_features(pixel_values=images[row : row + 1]).pooler_output
            assert (alone[0] - together[row]).abs().max() < TOLERANCE
            assert torch.equal(grouping_of(model).slots()[0], slots[row])
    assert not torch.equal(slots[0], slots[1])


def test_runs_repeat_and_sizes_may_change():
    """Catches noise at inference, and groups kept from the run before."""
    vlm = VLMS["llava"]
    model = vlm.make("sdpa")
    first, second = PROMPTS["ragged"].inputs(vlm), PROMPTS["one"].inputs(vlm)
    with attached(model, VisToGVisionProcessor(0.5)):
        runs = [generate(model, inputs)[1] for inputs in (first, second, first)]
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [{"ratio": 0.0}, {"ratio": 0.0, "num_tokens": 4}])
def test_ratio_zero_is_bit_identical(family, settings):
    """Catches pooling into cells of one patch, and a number of tokens that overrules the ratio 0."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["padded"].inputs(vlm)
    stock = generate(model, inputs)[1]
    with attach(model, VisToGVisionProcessor(**settings)):
        assert torch.equal(generate(model, inputs)[1], stock)


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_restores_everything(family):
    """Catches a projector that keeps its new forward, also after an exception in the middle of the tower."""
    vlm = VLMS[family]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    generate(model, inputs)
    before = model_state(model)
    with attached(model, VisToGVisionProcessor(0.5)):
        generate(model, inputs)
    assert differences(before, model_state(model)) == []
    with pytest.raises(RuntimeError), attached(model, VisToGVisionProcessor(0.5)):
        model(**inputs | {"pixel_values": inputs["pixel_values"][:, :2]})
    assert differences(before, model_state(model)) == []


@pytest.mark.parametrize("name", MODELS)
def test_cross_attention_reads_class_token_and_groups(name):
    """Catches a text side with a mask of the old length, and groups without the norm behind the tower."""
    model = MODELS[name]()
    tower, stock, images = model.vision_model, run(name, model), pixels(2)
    full = tower(images).last_hidden_state
    with attached(model, VisToGVisionProcessor(num_tokens=6)):
        part, seen = grouping_of(model), {}
        hook = part.grouping.register_forward_pre_hook(lambda m, args: seen.update(groups=args[0], patches=args[1]))
        shorter = tower(images).last_hidden_state
        hook.remove()
        reduced = run(name, model)
        assert report(model).layers[0].num_kept == 12
    assert (seen["patches"] - full[:, 1:]).abs().max() < TOLERANCE
    assert shorter.shape[1] == 7 and (shorter[:, :1] - full[:, :1]).abs().max() < TOLERANCE
    assert (seen["groups"].mean(-1) - tower.post_layernorm.bias.mean()).abs().max() < 1e-4
    handle = tower.register_forward_hook(lambda m, a, out: out.__setitem__("last_hidden_state", shorter))
    expected = run(name, model)
    handle.remove()
    assert (reduced - expected).abs().max() < TOLERANCE < (reduced - stock).abs().max()
    assert torch.equal(run(name, model), stock)


def test_weights_are_for_one_model_and_one_number(tmp_path):
    """Catches weights that are taken by a model they were not trained for."""
    model, path = VLMS["llava"].make("sdpa"), tmp_path / "a.safetensors"
    with attached(model, VisToGVisionProcessor(num_tokens=5)):
        part = grouping_of(model)
        connector = part.copy_connector(model)
        with torch.no_grad():
            connector.linear_1.weight.mul_(1.5)
        VisToGArtefact(part.grouping, connector.state_dict(), part.probe(model), {}).save(path)
        expected = model.get_image_features(pixel_values=pixels(1)).pooler_output[0]
    with attach(model, VisToGVisionProcessor(weights=str(path))):
        assert torch.equal(model.get_image_features(pixel_values=pixels(1)).pooler_output[0], expected)
    half = model.half()
    with attach(half, VisToGVisionProcessor(weights=str(path))):
        found = half.get_image_features(pixel_values=pixels(1).half()).pooler_output[0]
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    with pytest.raises(ValueError, match="trained for num_tokens=5; got 6"):
        attach(model, VisToGVisionProcessor(weights=str(path), num_tokens=6))
    other = VLMS["llava"].make("sdpa")
    with torch.no_grad():
        other.model.vision_tower.encoder.layers[0].mlp.fc1.weight += 0.1
    with pytest.raises(ValueError, match="another model"):
        attach(other, VisToGVisionProcessor(weights=str(path)))
    with pytest.raises(ValueError, match="there is no artefact 'none'"):
        attach(other, VisToGVisionProcessor(weights="embedded:none"))


@pytest.mark.parametrize("family", ["llava_next", "internvl", "idefics3", "qwen2_5"])
def test_other_connectors_are_refused(family):
    """Catches groups that are shuffled, tiled or packed as if they were patches."""
    model = VLMS[family].make("sdpa")
    before = model_state(model)
    with pytest.raises(ValueError, match=r"no projector that reads plain patches; use the method turbo"):
        attach(model, VisToGVisionProcessor(0.5))
    assert differences(before, model_state(model)) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_tokens": 16}, "num_tokens must be below the 16 patches"),
        ({"ratio": 0.01}, "none of the 16 patches of an image would leave"),
        ({"num_tokens": 5, "first_block": 2}, "one of the 2 blocks that the projector reads; got 2"),
    ],
)
def test_numbers_that_do_not_fit_the_model_are_named(settings, words):
    """Catches a failure inside the tower at the first image."""
    with pytest.raises(ValueError, match=words):
        attach(VLMS["llava"].make("sdpa"), VisToGVisionProcessor(**settings))


def test_wrong_settings_are_named():
    """Catches places where semantic tokens have no meaning."""
    for settings in ({"place": "pre_llm"}, {"combine": "prune"}, {"num_tokens": -1}, {"first_block": -1}):
        with pytest.raises(ValueError, match="got"):
            VisToGVisionProcessor(**settings)


@pytest.mark.parametrize("number", [64, 128, 192])
def test_the_papers_numbers_are_presets(number):
    """Catches a preset with a key that the method does not know."""
    processor = build_processor(f"configs/preset/vistog_llava_{number}.yaml")
    assert processor == VisToGVisionProcessor(num_tokens=number)
