"""Every family and variant: nothing at ratio 0, a shorter sequence above, exact restoration."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from stated import TurboProcessor

import gen_turbo
from gen_turbo import ToMeProcessor, attach, report
from tests.engine.coverage import read
from tests.engine.families import COLUMNS, NAMES, Keys, cell, family, relative
from tests.tiny_transformers import FAMILIES, NUM_TEXT, build, random, run
from tests.tiny_video_unets import VIDEO_UNETS

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")

TRANSFORMERS = tuple(FAMILIES)
SHARED = (
    "flux",
    "flux2",
    "chroma",
    "hunyuan-video",
    "hunyuan-dit",
    "cogview4",
    "qwen-image",
    "wan",
    "wan-vace",
    "skyreels-v2-forcing",
    "hunyuan-video-1.5",
    "qwen-image-2.1",
    "cogvideox-rotary",
    "mochi",
)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", NAMES)
def test_every_cell_of_the_table_is_so(name, column):
    """Catches a setting that does nothing on a family, changes ratio 0, or leaves something; and a stale table."""
    assert read()[name, column] == cell(name, column)


def test_the_table_has_no_empty_cell():
    """Catches a family or a setting that nobody checked."""
    cells = read()
    assert set(cells) == {(name, column) for name in NAMES for column in COLUMNS}
    assert all(value.strip() for value in cells.values())


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_odd_grids_and_single_images(name):
    """Catches a square root of the number of tokens, and a batch of two that is taken for granted."""
    model, run_model = family(name)
    # diffusers' DiT is square: it takes the root itself. Two have a time for each of 64 tokens.
    grid = {"dit": (6, 6), "wan-ti2v": (4, 16), "ltx2-split": (4, 16)}.get(name, (6, 10))
    shape = {"batch": 1, "grid": grid}
    stock = run_model(**shape)
    with attach(model, TurboProcessor(0.4, restore="copy")):
        reduced = run_model(**shape)
        grids = {layer.grid for layer in report(model).layers if layer.status == "reduced"}
    assert reduced.shape == stock.shape and 0 < relative(reduced, stock) < 0.5 and grids == {grid}


@pytest.mark.parametrize("name", SHARED)
def test_one_plan_serves_the_batch_where_positions_have_no_batch_axis(name):
    """Catches one plan per row, for which the rotary table has no row."""
    plans = _plans_of(name, FAMILIES[name])
    assert {len(plan.slot_BN) for plan in plans} == {FAMILIES[name].num_frames}


@pytest.mark.parametrize("name", ["pixart-alpha", "sd3"])
def test_guidance_halves_share_one_plan_without_a_pipeline(name):
    """Catches two plans for one image, where the batch is the latents twice."""
    latents = random(1, *FAMILIES[name].latents((8, 8))).repeat(2, 1, 1, 1)
    assert {len(plan.slot_BN) for plan in _plans_of(name, FAMILIES[name], latents=latents)} == {1}
    assert {len(plan.slot_BN) for plan in _plans_of(name, FAMILIES[name])} == {2}


def _plans_of(name, kind, **kwargs):
    plans = []

    class Watching(TurboProcessor):
        def plan(self, tokens, site, frame):
            plans.append(super().plan(tokens, site, frame))
            return plans[-1]

    model = build(name)
    with attach(model, Watching(0.4)):
        run(name, model, **kwargs)
    return plans


@pytest.mark.parametrize("name", ["wan", "mochi", "ltx-video", "ltx2", "kandinsky5", "wan-vace"])
def test_no_slot_crosses_frames(name):
    """Catches merging one frame's last row into the next frame's first, and a map of a control stream for the video."""
    plans = {id(p): p for p in _plans_of(name, FAMILIES[name])}.values()
    assert len(plans) == (2 if name == "wan-vace" else 1)
    assert all(plan.num_tokens == 64 and len(plan.slot_BN) % 3 == 0 for plan in plans)


@pytest.mark.parametrize("name", ["ltx2", "ltx2-split"])
def test_sound_asks_the_merged_video_and_is_not_merged(name):
    """Catches a block of six attentions in which sound reads every token, or tables of another length than the keys."""
    model, run_model = family(name)
    num_sound, num_words = 4, NUM_TEXT
    seen = {}
    for scope in ("attention", "block", "model"):
        with attach(model, TurboProcessor(0.4, restore="copy", scope=scope)), Keys() as keys:
            run_model(times=(900,))
        seen[scope] = keys.seen[:6]
    full, short = 3 * 64, 3 * 39
    beside = [(num_sound, num_sound), (num_sound, num_words)]
    within = [(short, short), beside[0], (full, num_words), beside[1], (full, num_sound), (num_sound, full)]
    whole = [(short, short), beside[0], (short, num_words), beside[1], (short, num_sound), (num_sound, short)]
    assert seen == {"attention": within, "block": whole, "model": whole}


def test_positions_are_taken_by_anchor(monkeypatch):
    """Catches averaged rotary tables, whose rows have another length than one."""
    model, seen = build("flux"), []
    block = model.single_transformer_blocks[0]
    inner = block.attn.processor

    def watch(processor, attn, *args, **kwargs):
        seen.append(kwargs["image_rotary_emb"] if "image_rotary_emb" in kwargs else args[3])
        return original(processor, attn, *args, **kwargs)

    original = type(inner).__call__
    watch.__signature__ = __import__("inspect").signature(original)
    monkeypatch.setattr(type(inner), "__call__", watch)
    with attach(model, TurboProcessor(0.4, restore="copy")):
        run("flux", model, times=(900,))
    lengths = {len(cosine) for cosine, _ in seen}
    assert lengths == {5 + 39}
    for cosine, sine in seen:
        assert torch.allclose(cosine**2 + sine**2, torch.ones(()), atol=1e-5)


def test_a_corrected_step_between_equal_full_steps_is_exact():
    """Catches detail that is remembered for other tokens: on latents that do not change, nothing may be lost."""
    for name in ("sd3", "flux", "wan", "lumina2", "flux2", "wan-vace", "wan-animate", "ltx2", "hunyuan-image"):
        for scope in ("attention", "block", "model"):
            model = build(name)
            latents = random(1, *FAMILIES[name].latents((8, 8)))
            with (
                attach(model, TurboProcessor(0.4, extrapolation_order=0, scope=scope, warmup_steps=1)),
                torch.no_grad(),
            ):
                outputs = [_call(name, model, latents, time) for time in (500.0, 499.999)]
            assert relative(outputs[1], outputs[0]) < 1e-3


def _call(name, model, latents, time):
    kind = FAMILIES[name]
    return model(hidden_states=latents, **kind.inputs(1, (8, 8)), **kind.time(time, 1), return_dict=False)[0]


def test_what_is_not_supported_names_what_is():
    """Catches a bare refusal, and silence on a diffusers model that no host knows."""
    from diffusers import PriorTransformer

    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "embedding_dim": 16}
    with pytest.raises(ValueError, match=r"PriorTransformer is not supported; supported: .*Flux.*Wan"):
        attach(PriorTransformer(**shape, num_embeddings=4), ToMeProcessor(0.4))


def test_what_is_supported_is_of_the_model_s_library():
    """Catches a refusal that buries a language model's reader under the names of all denoisers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    small = CLIPTextConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ValueError, match="CLIPTextModel is not supported; supported: .*Llava") as caught:
        attach(CLIPTextModel(small), ToMeProcessor(0.4))
    assert "Transformer2DModel" not in str(caught.value)


def test_what_cannot_be_reduced_says_why():
    """Catches a convolution over a grid that merging has made irregular, and a refusal that leaves hope."""
    from diffusers import SanaTransformer2DModel

    shape = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1, "sample_size": 8}
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    model = SanaTransformer2DModel(**shape, **cross, caption_channels=16)
    with pytest.raises(ValueError, match="SanaTransformer2DModel cannot be reduced: its linear attention convolves"):
        attach(model, ToMeProcessor(0.4))


def test_text_only_layers_and_cross_attention_are_left_alone():
    """Catches merging words."""
    left = {
        "lumina2": "context_refiner.0.attn",
        "z-image": "context_refiner.0.attention",
        "wan": "blocks.0.attn2",
        "pixart-alpha": "transformer_blocks.0.attn2",
    }
    for name, layer in left.items():
        model = build(name)
        with attach(model, TurboProcessor(0.4)):
            assert {layer.name: layer.status for layer in report(model).layers}[layer] == "not over image tokens"


def test_a_family_is_an_entry_in_one_file():
    """Catches an engine, a method or a command that asks for a class of models; benches count published ones."""
    from gen_turbo.models.families import ADAPTERS

    package = Path(gen_turbo.__file__).parent
    sources = {path.relative_to(package): path.read_text() for path in package.rglob("*.py")}
    for name in (model for adapter in ADAPTERS for model in adapter.models):
        found = [path for path, text in sources.items() if re.search(rf"\b{name}\b", text) and path.parts[0] != "bench"]
        assert len(found) == 1 and found[0].parts[0] == "models", (name, found)


def test_names_are_all_here():
    """Catches a family that is in the table of adapters and in no test."""
    from gen_turbo.models.families import ADAPTERS

    tested = {type(family(name)[0]).__name__ for name in NAMES} | {
        type(make()).__name__ for make in VIDEO_UNETS.values()
    }
    assert tested == {model for adapter in ADAPTERS for model in adapter.models}
