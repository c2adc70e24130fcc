"""Benchmarks of images, schedules and loading on a diffusion transformer."""

from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gen_turbo import attach, load_pipeline, report
from gen_turbo.bench.block_caches import first_block_cache
from gen_turbo.bench.catalogue import quality_catalogue
from gen_turbo.bench.records import load
from gen_turbo.bench.settings import Method, OutputCache, Setting, fitting
from gen_turbo.bench.studio import fingerprint, fit_positions
from gen_turbo.commands.cli import main
from gen_turbo.metrics.cost import count_cost
from gen_turbo.pipelines import tiny, tiny_dit
from gen_turbo.training.schedule_file import read
from tests.engine.families import relative
from tests.stated import TurboProcessor
from tests.tiny_hosts import sd15_unet
from tests.tiny_pipelines import sd3_with_text
from tests.tiny_transformers import build, run

LAYERS = 2
IMAGE, WORDS, PADDING = 64, 20, 256
SETTINGS = [
    Method("block", "turbo", "turbo", {"ratio": 0.5, "restore": "copy", "match_every": 1, "scope": "block"}),
    OutputCache("cache", "cache", 2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of Stable Diffusion 3 without its third text encoder."""
    path = tmp_path_factory.mktemp("sd3")
    sd3_with_text().save_pretrained(path)
    return path


def _latents(pipe: object) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 3, "guidance_scale": 3.0, "generator": generator, "output_type": "latent"}
    return pipe("a large red circle on a gray background", height=32, width=32, **call).images


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_a_setting_saves_attention_and_leaves_nothing(setting: Setting) -> None:
    """Catches a setting that does nothing on joint attention, or changes what is measured after it."""
    model = build("sd3")
    with count_cost(model) as full:
        stock = run("sd3", model)
    before = {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
    with count_cost(model) as cost, setting.applied(model):
        changed = run("sd3", model)
    assert not torch.equal(changed, stock)
    assert cost.attention_flops(full.top_self_attention()) < full.attention_flops(full.top_self_attention())
    with suppress(KeyboardInterrupt), setting.applied(model):
        raise KeyboardInterrupt
    assert torch.equal(run("sd3", model), stock)
    assert before == {name: model.get_submodule(name).processor for name in before}


def test_what_only_fits_unets_is_left_out_of_a_transformer() -> None:
    """Catches a run over everything that ends in a package for UNets, and a second level that is the first again."""
    catalogue = quality_catalogue(25)
    sets = [{s.name for s in fitting(catalogue, [], model)} for model in (sd15_unet(), build("sd3"))]
    gone = sets[0] - sets[1]
    assert {name.split("-")[0] for name in gone if not name.endswith("2levels")} == {"tomesd", "deepcache"}
    assert {"tomesd-r0.5", "deepcache-k2", "turbo-copy-r0.5-2levels", "block-copy-r0.5-2levels"} <= gone
    scopes = {f"{name}-r{r}" for name in ("attention-correct", "block-correct", "block-copy", "kv-correct")
              for r in (0.3, 0.4, 0.5, 0.6, 0.7)}  # fmt: skip
    assert scopes | {"cache-k2", "steps-16", "turbo-default"} <= sets[1]


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("tomesd-r0.5", "works on UNets alone"),
        ("deepcache-*", "works on UNets alone"),
        ("turbo-par-b0.5", "no schedule of 25 steps ships for it"),
        ("block-copy-r0.5-2levels", "it merges to downsample 2, and the model has"),
    ],
)
def test_what_does_not_fit_says_why_when_it_is_named(pattern: str, why: str) -> None:
    """Catches a setting that is asked for and silently not measured."""
    with pytest.raises(ValueError, match=f"does not fit this SD3Transformer2DModel: .*{why}"):
        fitting(quality_catalogue(25), [pattern, "turbo-default"], build("sd3"))


def test_a_pattern_takes_what_fits() -> None:
    """Catches a pattern that is refused because one of its settings does not fit."""
    names = [s.name for s in fitting(quality_catalogue(25), ["block-copy-r0.5*"], build("sd3"))]
    assert names == ["block-copy-r0.5"]


def test_schedules_that_ship_are_measured_on_their_model() -> None:
    """Catches schedules that are left out of the comparison on the very model that they were made for."""
    unet = load_pipeline("tiny", processor=None, device="cpu").unet
    names = [setting.name for setting in fitting(quality_catalogue(25), ["turbo-par-*"], unet)]
    assert len(names) >= 2


def test_quality_measures_a_transformer(folder: Path, tmp_path: Path) -> None:
    """Catches counts of the UNet that is not there, and an image that is not of the pipeline in the folder."""
    arguments = ["--pipeline", str(folder), "--records", str(tmp_path), "--work", str(tmp_path / "work")]
    arguments += ["--steps", "4", "--captions", "1", "--settings", "stock", "cache-k2", "block-copy-r0.5"]
    assert main(["bench", "quality", "--timed", "1", *arguments]) == 0
    by_name = {record.setting: record for record in load(tmp_path, "quality")}
    full = by_name["stock"].counts
    assert full["top_attention_flops"] == full["attention_flops"] == full["stock_attention_flops"]
    assert full["top_tokens_least"] == IMAGE + WORDS + PADDING
    assert by_name["cache-k2"].counts["top_attention_flops"] * 2 == full["top_attention_flops"]
    assert by_name["block-copy-r0.5"].counts["top_tokens_least"] == IMAGE // 2 + WORDS + 1
    assert by_name["block-copy-r0.5"].values["psnr_db"][0] < by_name["stock"].values["psnr_db"][0]


def test_the_first_block_decides_about_the_others() -> None:
    """Catches a cache that never repeats, repeats at any change, or leaves its hooks behind."""
    model = build("sd3")
    calls: list[int] = []
    inner = model.transformer_blocks[1].attn.register_forward_pre_hook(lambda *_: calls.append(1))
    stock = run("sd3", model)
    num_calls = len(calls)
    for threshold, times in ((0.0, num_calls), (1e6, 1)):
        calls.clear()
        with first_block_cache(model, threshold):
            cached = run("sd3", model)
        assert len(calls) == times
        assert torch.equal(cached, stock) == (threshold == 0)
    inner.remove()
    assert not any("forward" in vars(block) for block in model.transformer_blocks)


def test_positions_of_larger_images_lie_between_the_known_ones() -> None:
    """Catches positions of a larger image that are those of its corner, and a smaller image that gets new ones."""
    model = tiny_dit.make_transformer()
    known = model.pos_embed.pos_embed.clone()
    fit_positions(model, tiny.LATENT_SIZE)
    assert torch.equal(model.pos_embed.pos_embed, known)
    fit_positions(model, 2 * tiny.LATENT_SIZE)
    side = 2 * tiny.LATENT_SIZE // tiny_dit.PATCH
    table = model.pos_embed.pos_embed.reshape(side, side, -1)
    pooled = table.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).mean((1, 3))
    assert relative(pooled, known.reshape(pooled.shape)) < 0.05
    assert model(
        hidden_states=torch.zeros(1, 4, 2 * tiny.LATENT_SIZE, 2 * tiny.LATENT_SIZE),
        encoder_hidden_states=torch.zeros(1, 3, 128), pooled_projections=torch.zeros(1, 128), timestep=torch.ones(1),
    ).sample.shape[-1] == 2 * tiny.LATENT_SIZE  # fmt: skip


def test_either_text_encoder_changes_the_fingerprint() -> None:
    """Catches records of two models that differ in their second text encoder and share images."""
    pipe = sd3_with_text()
    seen = {fingerprint(pipe)}
    for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.transformer, pipe.vae):
        with torch.no_grad():
            next(part.parameters()).add_(1)
        seen.add(fingerprint(pipe))
    assert len(seen) == 5


def test_the_configuration_loads_such_a_checkpoint_and_reduces_it(folder: Path) -> None:
    """Catches a checkpoint without a third text encoder that cannot be loaded, and padding that stays in the text."""
    pipe = load_pipeline("tiny-dit", checkpoint=str(folder), device="cpu", processor=TurboProcessor(0.4))
    pipe.set_progress_bar_config(disable=True)
    _latents(pipe)
    told = report(pipe)
    assert f"text: {WORDS + PADDING} -> {WORDS + 1} tokens" in str(told)
    assert [layer.num_tokens for layer in told.layers] == [IMAGE] * LAYERS
    assert all(0 < layer.num_kept < IMAGE and layer.num_reduced for layer in told.layers)


def test_merging_the_padding_changes_nothing_but_rounding() -> None:
    """Catches padding that is dropped or counts once, which moves these latents by a quarter."""
    pipe, latents = sd3_with_text(), []
    for text_ratio in (None, 0.0):
        with attach(pipe, TurboProcessor(0.4, text_ratio=text_ratio)):
            latents.append(_latents(pipe))
    assert relative(*latents) < 1e-5 < 1e-4 < relative(latents[1], _latents(pipe))


def test_a_transformer_is_calibrated(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a calibration that knows the units of a UNet alone."""
    output = tmp_path / "own.yaml"
    command = ["calibrate", "par", "--config", "tiny-dit", f"checkpoint={folder}", "height=32", "width=32"]
    command += ["--steps", "4", "--prompts", "1", "--budgets", "0.6", "--inner", "none", "--output", str(output)]
    assert main(command) == 0, capsys.readouterr().err
    (schedule,) = read(output).schedules
    blocks = {f"transformer_blocks.{index}" for index in range(LAYERS)}
    assert schedule.skips and set(schedule.skips) <= blocks | {"output"}


def test_the_embedded_transformer_loads() -> None:
    """Catches weights that are missing from the package or of another architecture."""
    pipe = load_pipeline("tiny-dit", device="cpu")
    assert pipe.transformer.config.sample_size == tiny.LATENT_SIZE and report(pipe).layers
