"""Images beside the target: a region and a map of its own for each, as editing models are given them."""

from __future__ import annotations

import warnings
import weakref

import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from diffusers.models.transformers.transformer_flux2 import (
    Flux2KVAttnProcessor,
    Flux2KVCache,
    Flux2KVParallelSelfAttnProcessor,
)
from PIL import Image

import gen_turbo
from gen_turbo import IdentityProcessor, TurboProcessor, attach, report
from gen_turbo.api import adapter_of
from gen_turbo.engine.base import NoEffectWarning
from gen_turbo.engine.graphs import GraphsWarning
from tests.engine.cuda import stand_in
from tests.engine.families import relative
from tests.tiny_family import random
from tests.tiny_flux import flux2_inputs, flux_inputs, image_positions, longcat_inputs
from tests.tiny_images import qwen
from tests.tiny_transformers import FAMILIES, build

TARGET, REFERENCES = (8, 8), ((6, 10), (4, 4))
NUM_TARGET, NUM_REFERENCES = 64, (60, 16)
TIMES = (900, 700, 500)
NAMES = ("flux", "flux2", "longcat-image", "qwen-image", "qwen-image-edit", "qwen-image-layered")
SCOPES = ("attention", "block", "model")


def model_of(name: str) -> torch.nn.Module:
    """A tiny model that takes references."""
    torch.manual_seed(0)
    if name == "qwen-image-edit":
        return qwen(zero_cond_t=True).eval()
    if name == "qwen-image-layered":
        return qwen(use_layer3d_rope=True).eval()
    return build(name)


def inputs_of(name: str, batch: int = 2) -> dict[str, object]:
    """A call with two references of other sizes than the target's; of two layers and one reference where layered."""
    if name.startswith("qwen"):
        first = [(1, *TARGET)] * 2 if name == "qwen-image-layered" else [(1, *TARGET)]
        shapes = first + [(1, *grid) for grid in REFERENCES[len(first) - 1 :]]
        inputs = FAMILIES["qwen-image"].inputs(batch, TARGET) | {"img_shapes": [shapes] * batch}
        return inputs | {"hidden_states": random(batch, sum(h * w for _, h, w in shapes), 16)}
    make = {"flux": flux_inputs, "flux2": flux2_inputs, "longcat-image": longcat_inputs}[name]
    inputs = make(batch, TARGET)
    ids = inputs["img_ids"]
    start = {"longcat-image": 7}.get(name, 0)
    parts = [image_positions(*grid, 10 * (i + 1), start) for i, grid in enumerate(REFERENCES)]
    more = torch.cat(parts)
    if ids.ndim == 3:
        more = torch.cat([more, torch.zeros(len(more), 1)], 1).repeat(batch, 1, 1)
    inputs["img_ids"] = torch.cat([ids, more], -2)
    return inputs | {"hidden_states": random(batch, NUM_TARGET + sum(NUM_REFERENCES), 8)}


@torch.no_grad()
def run(model: torch.nn.Module, inputs: dict[str, object]) -> torch.Tensor:
    """Calls the model once per time, the target changing slowly and the references not."""
    tokens, outputs = inputs["hidden_states"], []
    for step, time in enumerate(TIMES):
        target = tokens[:, :NUM_TARGET] * (1 - 0.05 * step)
        sample = torch.cat([target, tokens[:, NUM_TARGET:]], 1)
        told = {"timestep": torch.full((len(tokens),), time / 1000)}
        outputs.append(model(**inputs | {"hidden_states": sample} | told, return_dict=False)[0])
    return torch.stack(outputs)


class Planned(TurboProcessor):
    """Notes the grids that are planned for, and at which ratio."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.seen: list[tuple[tuple[int, int], float]] = []

    def plan(self, tokens, site, frame):
        self.seen.append((site.grid, site.ratio))
        return super().plan(tokens, site, frame)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_removed_is_bit_identical(name):
    """Catches regions that reorder tokens."""
    model, inputs = model_of(name), inputs_of(name) | {"timestep": torch.full((2,), 0.5)}
    stock = run(model, inputs)
    for scope in SCOPES:
        for reducer in (TurboProcessor(0.0, scope=scope), IdentityProcessor(0.4, scope=scope)):
            with attach(model, reducer):
                assert torch.equal(run(model, inputs), stock)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_region_has_a_grid_and_a_map_of_its_own(name, scope):
    """Catches a call that loses its grid, and tokens of the target that are merged with those of a reference."""
    model, inputs = model_of(name), inputs_of(name) | {"timestep": torch.full((2,), 0.5)}
    stock = run(model, inputs)
    processor = Planned(0.4, restore="copy", scope=scope, reference_ratio=0.6)
    with attach(model, processor) as attachment:
        reduced = run(model, inputs)
        rows = [row for row in report(model).layers if row.status == "reduced"]
        text = str(report(model))
        context = attachment.parts[0].root.runs.contexts()[0]
        (base,) = {id(base): base for base in context.maps.values()}.values()
    assert reduced.shape == stock.shape and 0 < relative(reduced, stock) < 0.8
    ends = [64, 64, 16] if name == "qwen-image-layered" else [NUM_TARGET, *NUM_REFERENCES]
    ratios = [0.4, 0.4, 0.6] if name == "qwen-image-layered" else [0.4, 0.6, 0.6]
    kept = [n - int(n * ratio) for n, ratio in zip(ends, ratios, strict=True)]
    assert {row.grid for row in rows} == {TARGET} and "not run yet" not in text
    assert {(row.num_tokens, row.num_kept) for row in rows} == {(sum(ends), sum(kept))}
    region = torch.repeat_interleave(torch.arange(len(ends)), torch.tensor(ends))
    by_slot = torch.repeat_interleave(torch.arange(len(ends)), torch.tensor(kept))
    assert torch.equal(by_slot[base.slot_BN], region.expand_as(base.slot_BN))
    assert torch.equal(region[base.anchor_BM], by_slot.expand_as(base.anchor_BM))


@pytest.mark.parametrize("places", [((0, 0), (0, 0)), ((0, 8), (6, 8)), ((8, 0), (0, 8))])
@pytest.mark.parametrize("grids", [((7, 9), (5, 11), (3, 13)), ((5, 5), (5, 5), (5, 5)), ((8, 8), (1, 18), (6, 1))])
def test_references_of_one_number_are_images_of_their_own(grids, places):
    """Catches two references of FLUX.1 Kontext taken for one, wherever their rows begin, or for frames of a video."""
    from gen_turbo.models.families.flux import FLUX

    parts = [image_positions(*grids[0])]
    for grid, place in zip(grids[1:], places, strict=True):
        parts.append(image_positions(*grid, 1) + torch.tensor([0.0, *place]))
    geometry = FLUX.geometry(build("flux"), inputs_of("flux") | {"img_ids": torch.cat(parts), "timestep": 1})
    assert [(region.num_frames, region.grid) for region in geometry.regions] == [(1, grid) for grid in grids]


def test_references_are_planned_for_once_a_run():
    """Catches a map of what does not change that is made anew in every step, and one that outlives its run."""
    model, inputs = model_of("flux2"), inputs_of("flux2")
    processor = Planned(0.4, restore="copy", match_every=1, scope="attention")
    with attach(model, processor):
        run(model, inputs)
        assert [grid for grid, _ in processor.seen] == [TARGET, *REFERENCES, TARGET, TARGET]
        other = inputs | {"hidden_states": random(2, NUM_TARGET + sum(NUM_REFERENCES), 8, seed=9)}
        again = run(model, other)
    with attach(model, TurboProcessor(0.4, restore="copy", match_every=1, scope="attention")):
        assert torch.equal(run(model, other), again)


def test_references_need_a_model_that_takes_them():
    """Catches a setting that nobody reads."""
    with pytest.raises(ValueError, match="reference_ratio=0.5 has no references in SD3Transformer2DModel"):
        attach(build("sd3"), TurboProcessor(0.4, reference_ratio=0.5))
    with pytest.raises(ValueError, match="reference_ratio=0.5 reduces nothing beside ratio=0"):
        attach(build("flux"), TurboProcessor(0.0, reference_ratio=0.5))
    with pytest.raises(ValueError, match="reference_ratio must be a fraction of tokens, 0 <= reference_ratio < 1"):
        TurboProcessor(0.4, reference_ratio=1.0)


def test_a_run_that_merges_nothing_names_the_references_too():
    """Catches a ratio of references that stays without effect and a warning that speaks of the image alone."""
    with (
        attach(model_of("flux2"), gen_turbo.TurboProcessor(0.4, reference_ratio=0.6)) as attachment,
        pytest.warns(NoEffectWarning, match=r"no image tokens and no references \(reference_ratio=0.6\)"),
    ):
        run(attachment.parts[0].model, inputs_of("flux2"))


@pytest.mark.parametrize("scope", SCOPES)
def test_cached_references_keep_their_keys(scope):
    """Catches the keys of klein-kv's references being merged, and its first call, which writes them, running short."""
    model = _klein_kv()
    stock, whole = _denoised(model)
    inside = [{"kv_only": True}, {"proportional_attention": True, "text_ratio": 0.4}] if scope == "attention" else []
    warm = [{"warmup_steps": 1} | settings for settings in ({"text_ratio": 0.4}, *inside)]
    for settings in ({"restore": "copy"}, *warm):
        with attach(model, TurboProcessor(0.4, scope=scope, **settings)):
            reduced, cache = _denoised(model)
            rows = [row for row in report(model).layers if row.status == "reduced"]
        if "text_ratio" not in settings:
            assert torch.equal(reduced[0], stock[0])
            assert all(torch.equal(a, b) for a, b in zip(cache, whole, strict=True))
        assert 0 < relative(reduced[1:], stock[1:]) < 0.8
        assert {(row.num_tokens, row.num_kept, row.grid) for row in rows} == {(64, 39, TARGET)}
    assert torch.equal(_denoised(model)[0], stock)


@pytest.mark.parametrize("kind", [TurboProcessor, gen_turbo.TurboProcessor])
def test_cached_references_cannot_be_reduced(kind):
    """Catches a ratio of references that klein-kv's calls never read, also where the cost model takes no layer."""
    model = _klein_kv()
    with (
        attach(model, kind(0.4, warmup_steps=1, reference_ratio=0.6)),
        pytest.raises(
            ValueError, match="reference_ratio=0.6 has no effect, for the call keeps the keys of its referen"
        ),
    ):
        _denoised(model)


def test_objects_that_calls_hand_on_are_in_no_graph(monkeypatch):
    """Catches a graph, and the references' keys with it, that is kept for the object of every run; also a stale one."""
    stand_in(monkeypatch)
    alive, made = weakref.WeakSet(), Flux2KVCache.__init__

    def noted(self, *args, **kwargs):
        alive.add(self)
        made(self, *args, **kwargs)

    monkeypatch.setattr(Flux2KVCache, "__init__", noted)
    model = _klein_kv()
    for reducer in (IdentityProcessor(0.4), TurboProcessor(0.4, warmup_steps=1, scope="block")):
        with attach(model, reducer, graphs=False):
            expected, _ = _denoised(model)
        with attach(model, reducer, graphs=True), warnings.catch_warnings():
            warnings.simplefilter("ignore", GraphsWarning)
            assert all(torch.equal(_denoised(model)[0], expected) for _ in range(3))
            assert report(model).graphs == "its calls hand on an object, here of the class Flux2KVCache"
            assert not alive


def _klein_kv() -> Flux2Transformer2DModel:
    model = build("flux2")
    for block in model.transformer_blocks:
        block.attn.set_processor(Flux2KVAttnProcessor())
    for block in model.single_transformer_blocks:
        block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
    return model


@torch.no_grad()
def _denoised(model: Flux2Transformer2DModel) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Steps as FLUX.2 klein-kv's pipeline makes them: references before the target once, and cached then."""
    inputs, reference = flux2_inputs(1, TARGET), random(1, NUM_REFERENCES[0], 8, seed=3)
    places = torch.cat([image_positions(*REFERENCES[0], 10), torch.zeros(NUM_REFERENCES[0], 1)], 1)[None]
    outputs, cache = [], None
    for step, time in enumerate((900, 700, 500, 300)):
        sample = random(1, NUM_TARGET, 8) * (1 - 0.05 * step)
        told = {"timestep": torch.full((1,), time / 1000), "return_dict": False}
        if cache is None:
            ids = torch.cat([places, inputs["img_ids"]], 1)
            first = {"hidden_states": torch.cat([reference, sample], 1), "img_ids": ids}
            extract = {"kv_cache_mode": "extract", "num_ref_tokens": NUM_REFERENCES[0]}
            output, cache = model(**inputs | first | told | extract)
        else:
            cached = {"hidden_states": sample, "kv_cache": cache, "kv_cache_mode": "cached"}
            output = model(**inputs | cached | told)[0]
        outputs.append(output)
    layers = [*cache.double_block_caches, *cache.single_block_caches]
    return torch.stack(outputs), [x for layer in layers for x in (layer.k_ref, layer.v_ref)]


def test_the_pipeline_of_klein_with_a_reference():
    """Catches regions that the positions of a real pipeline do not show, and a run whose steps are not found."""
    pipe = _klein()
    image = Image.fromarray(random(64, 96, 3).mul(50).add(128).clamp(0, 255).byte().numpy())
    stock = _drawn(pipe, image)
    with attach(pipe, TurboProcessor(0.4, scope="block", warmup_steps=1, reference_ratio=0.6)):
        reduced = _drawn(pipe, image)
        rows = report(pipe).layers
    num_reference = rows[0].num_tokens - 256
    assert num_reference > 256 and {row.grid for row in rows} == {(16, 16)}
    assert {row.num_kept for row in rows} == {256 - int(256 * 0.4) + num_reference - int(num_reference * 0.6)}
    assert {(row.num_reduced, row.num_full) for row in rows} == {(2, 2)}
    assert 0 < relative(reduced, stock) < 0.5 and torch.equal(_drawn(pipe, image), stock)


def _klein() -> Flux2KleinPipeline:
    model = build("flux2")
    model.register_to_config(in_channels=8)
    shape = {"block_out_channels": (8,), "layers_per_block": 1, "latent_channels": 2, "norm_num_groups": 4}
    kinds = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    parts = {"vae": AutoencoderKLFlux2(**shape, **kinds, sample_size=32), "text_encoder": None, "tokenizer": None}
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = Flux2KleinPipeline(scheduler=scheduler, **parts, transformer=model, is_distilled=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _drawn(pipe: Flux2KleinPipeline, image: Image.Image) -> torch.Tensor:
    size = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
    generator = torch.Generator().manual_seed(0)
    return pipe(image=image, prompt_embeds=random(1, 5, 32), generator=generator, **size).images


@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_a_default_device_is_not_where_images_are_told_apart(name):
    """Catches numbers made on PyTorch's default device, which positions on the host are compared with."""
    model, inputs = model_of(name), inputs_of(name) | {"timestep": torch.full((2,), 0.5)}
    adapter = adapter_of(model)
    expected = adapter.geometry(model, inputs)
    with torch.device("meta"):
        assert adapter.geometry(model, inputs) == expected
