"""Videos: tokens of every frame are reduced as those of an image, against slow right answers, or it is told."""

from __future__ import annotations

import warnings

import pytest
import torch

from gen_turbo import TurboProcessor, attach, report
from gen_turbo.engine.base import NoEffectWarning
from gen_turbo.methods.divprune import DivPruneProcessor
from gen_turbo.methods.eadaprune import EAdaPruneProcessor
from gen_turbo.methods.pyramiddrop import PyramidDropProcessor
from gen_turbo.methods.turbo_vit import TurboVisionProcessor
from gen_turbo.methods.visionzip import VisionZipProcessor
from gen_turbo.vlm.settings import Placed
from tests.snapshots import differences, model_state
from tests.vlm import oracle
from tests.vlm.test_generate import TOLERANCE, generate
from tests.vlm.tiny_kit import IMAGE
from tests.vlm.tiny_vlms import VLMS

VIDEO = 98
FRAMES = 3
GLM = ("glm4v", "glm_ocr", "glm5")
QWEN = (
    "qwen2", "qwen2_5", "qwen3", "qwen3_moe", "qwen4", "exaone", "omni2_5", "omni3", "ernie", "compass", "cosmos",
    "clova", "lfm3", "muse", "muse_spark", *GLM,
)  # fmt: skip
GEMMA = ("gemma4", "gemma4_unified")
MINICPM = ("minicpm4_6", "minicpm4_7", "minicpm_ocr")
LLAVA = ("llava_onevision", "llava_next_video")
FAMILIES = (*QWEN, *GEMMA, *MINICPM, *LLAVA)
ALL_PARTS = ([2, "v", 3], [2, "v", 3, "i", 2, "v", 2], [3, "i", 2, "v", 2])
# GLM's models have one placeholder for images and frames, and take no prompt with both.
CASES = [(family, parts) for family in FAMILIES for parts in ALL_PARTS if not ("i" in parts and family in GLM)]


def call(family, parts, frames=FRAMES):
    """A call of one row: numbers of words, "i" for an image and "v" for a video of some frames."""
    is_qwen, generator = family in QWEN, torch.Generator().manual_seed(4)
    frame, video = 4 if family in LLAVA else 16, IMAGE if family in GLM else VIDEO
    sizes = {"i": VLMS[family].num_tokens, "v": frames * frame + (family == "llava_onevision")}
    # Times stand between the frames of a video in some families; one word stands for one.
    pause = [7] if family.startswith(("qwen3", "qwen4", "gemma4", "glm", "compass", "cosmos", "minicpm4_7")) else []
    tokens = {"i": [IMAGE] * sizes["i"], "v": [VIDEO] * sizes["v"]}
    if pause:
        tokens["v"] = [token for _ in range(frames) for token in [*pause, *[video] * frame]]
    if family == "glm5":
        tokens["v"] = [95, *tokens["v"], 94]
    ids = [token for part in parts for token in tokens.get(part, list(range(10, 10 + (part if part in (2, 3) else 0))))]
    given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
    if "i" in parts:
        given |= VLMS[family].images([parts.count("i")])
    if "v" in parts and is_qwen:
        # ERNIE counts every frame of the video; two make one of tokens.
        pairs = 2 if family == "ernie" else 1
        width = VLMS[family].images([1])["pixel_values"].shape[1] * pairs
        patches = torch.randn(parts.count("v") * frames * 64, width, generator=generator)
        given["pixel_values_videos"] = patches.view(len(patches) * pairs, -1)
        given["video_grid_thw"] = torch.tensor([[frames * pairs, 8, 8]] * parts.count("v"))
    elif "v" in parts and family in MINICPM:
        images = VLMS[family].images([parts.count("v") * frames])
        given |= {"pixel_values_videos": images["pixel_values"], "target_sizes_videos": images["target_sizes"]}
    elif "v" in parts and family in GEMMA:
        images = VLMS[family].images([parts.count("v") * frames])
        given |= {"pixel_values_videos": images["pixel_values"], "video_position_ids": images["image_position_ids"]}
        given["num_frames_per_video"] = torch.tensor([frames] * parts.count("v"))
    elif "v" in parts:
        given["pixel_values_videos"] = torch.randn(parts.count("v"), frames, 3, 32, 32, generator=generator)
    if family not in LLAVA:
        types = (given["input_ids"] == IMAGE).int() + 2 * (given["input_ids"] == VIDEO).int()
        given["mm_token_type_ids"] = 2 * types if video == IMAGE else types
        given |= {"moe_mm_token_type_ids": types.clamp(max=1)} if family == "ernie" else {}
    return given


def runs_of(ids, family):
    """The columns of every image and of every frame of a row, in order; a newline behind a video is its own."""
    frame, size = 4 if family in LLAVA else 16, VLMS[family].num_tokens
    found, at = [], 0
    while at < len(ids):
        token = int(ids[at])
        if token not in (IMAGE, VIDEO):
            at += 1
            continue
        left = next((n for n in range(at, len(ids)) if ids[n] != token), len(ids)) - at
        length = min(left, size if token == IMAGE else frame)
        found.append(list(range(at, at + length)))
        at += length
    return found


@torch.no_grad()
def last_logits(model, family, given, plan, runs=None, is_merged=True):
    """Logits after one row whose images and frames, or other runs, have a plan each, everything recomputed."""
    seen = {}
    text = model.get_submodule(VLMS[family].text)
    hook = text.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    model(**given)
    hook.remove()
    ids, hidden = given["input_ids"][0], seen["inputs_embeds"][0]
    marks, deep = seen.get("visual_pos_masks"), seen.get("deepstack_visual_embeds") or []
    streams = [hidden, *(torch.zeros_like(hidden).masked_scatter(marks[0, :, None], level) for level in deep)]
    positions = seen.get("position_ids")
    positions = torch.arange(len(ids))[None] if positions is None else positions
    # Qwen's text positions stand in front of those in three axes.
    positions = positions[1:] if positions.ndim == 3 and len(positions) == 4 else positions
    keep, out = [True] * len(ids), [stream.clone() for stream in streams]
    for run in runs or runs_of(ids, family):
        made = plan(hidden[run][None].detach())
        for stream, target in zip(streams, out, strict=True):
            target[[run[anchor] for anchor in made.anchor_BM[0].tolist()]] = oracle.reduce_row(
                stream[run], made, is_merged
            )
        for place, column in enumerate(run):
            keep[column] = place in made.anchor_BM[0].tolist()
    columns = [column for column in range(len(ids)) if keep[column]]
    hidden, *added = (stream[columns] for stream in out)
    depth = text.config.num_hidden_layers
    more = {}
    if family in GEMMA:
        of_run = {column: number for number, run in enumerate(runs_of(ids, family)) for column in run}
        blocks = torch.tensor([of_run.get(column, -1) for column in columns])
        more = {"blocks": blocks}
    if "per_layer_inputs" in seen:
        more["inputs"] = text.project_per_layer_inputs(hidden[None], seen["per_layer_inputs"][:, columns])
    if "moe_mm_token_type_ids" in given:
        more = {"experts": given["moe_mm_token_type_ids"][:, columns]}
    if VLMS[family].is_whole:
        return oracle.whole_logits(model, text, hidden, positions[..., columns], ids[columns])
    done = oracle.run_layers(text, hidden[None], positions[..., columns], 0, depth, 0, added, **more)
    return oracle.logits_of(model, text, done)


def reducer_plan(method, family):
    """What a method does to the tokens of one image or frame."""
    grids = {16: (4, 4), 4: (2, 2)}
    if family in LLAVA:
        # Tiles with newlines make no grid, but a frame does.
        grids = {4: (2, 2)}
    return lambda tokens: method.plan_tokens(tokens, grid=grids.get(tokens.shape[1]) if tokens.shape[1] > 1 else None)


@pytest.mark.parametrize(("family", "parts"), CASES)
@torch.no_grad()
def test_frames_are_reduced_as_images_are(family, parts):
    """Catches frames planned as one image, features of videos taken for images, and another order than the prompt's."""
    model, given = VLMS[family].make("sdpa"), call(family, parts)
    method = TurboProcessor(0.5, semantic="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(model, method), torch.no_grad():
            logits = model(**given).logits[0, -1]
            row = report(model).layers[0]
    runs = runs_of(given["input_ids"][0], family)
    assert row.num_tokens == sum(map(len, runs))
    assert row.num_kept == sum(len(run) - len(run) // 2 for run in runs)
    expected = last_logits(model, family, given, reducer_plan(method, family))
    assert float((logits - expected).abs().max()) < TOLERANCE
    assert float((logits - model(**given).logits[0, -1]).abs().max()) > 10 * TOLERANCE


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "llava_onevision"])
def test_generate_goes_on_from_reduced_frames(family):
    """Catches features made before the call, as `generate` makes them, whose frames nobody finds."""
    model, given = VLMS[family].make("sdpa"), call(family, [2, "v", 3, "i", 2])
    with attach(model, DivPruneProcessor(0.5)), torch.no_grad():
        _, logits, _ = generate(model, given)
        first = model(**given).logits[:, -1]
        row = report(model).layers[0]
    assert row.num_kept < row.num_tokens
    assert float((logits[:, 0] - first).abs().max()) < TOLERANCE


@pytest.mark.parametrize("method", [PyramidDropProcessor(0.75, cuts=[1, 2]), EAdaPruneProcessor(energy=0.6)])
@pytest.mark.parametrize("family", ["qwen3", "llava_onevision"])
def test_stages_and_budgets_take_frames(family, method):
    """Catches frames that only a plan before the language model knows."""
    model, given = VLMS[family].make("sdpa"), call(family, [2, "v", 3, "i", 2])
    with attach(model, method), torch.no_grad():
        model(**given)
        row = report(model).layers[-1]
    assert 0 < row.num_kept < row.num_tokens == sum(map(len, runs_of(given["input_ids"][0], family)))


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "llava_onevision"])
def test_nothing_removed_is_bit_identical_and_detach_exact(family):
    """Catches a wrapper of the video encoder that changes features, or stays."""
    model, given = VLMS[family].make("sdpa"), call(family, [2, "v", 3, "i", 2])
    stock = model(**given).logits
    # The first call leaves hooks of transformers' own, and every call of Qwen's the places that it counted.
    deltas, before = getattr(model.model, "rope_deltas", None), model_state(model)
    with attach(model, TurboProcessor(0.0)):
        assert torch.equal(model(**given).logits, stock)
    if deltas is not None:
        model.model.rope_deltas = deltas
    assert differences(before, model_state(model)) == []


@pytest.mark.parametrize("method", [TurboVisionProcessor(0.5), VisionZipProcessor(0.5)])
@pytest.mark.parametrize("parts", [[2, "v", 3], [2, "v", 3, "i", 2]])
def test_what_leaves_videos_in_full_says_so(method, parts):
    """Catches a video that runs in full in silence, beside images too."""
    model, given = VLMS["qwen2_5"].make("sdpa"), call("qwen2_5", parts)
    with attach(model, method), torch.no_grad(), pytest.warns(NoEffectWarning, match="video is read in full"):
        model(**given)


@pytest.mark.parametrize(("family", "frames"), [("qwen2_5", 1), ("qwen3", 1), ("qwen3", 3), ("llava_onevision", 3)])
def test_the_tower_reads_videos_in_full_too(family, frames):
    """Catches frames that merge in a tower like images, where no token leaves and a warning says: in full."""
    method = Placed(TurboProcessor(0.5), place="tower")
    for parts in ([2, "v", 3], [2, "v", 3, "i", 2]):
        model, given = VLMS[family].make("sdpa"), call(family, parts, frames)
        with torch.no_grad():
            stock = model(**given).logits
            with attach(model, method), pytest.warns(NoEffectWarning, match="video is read in full"):
                logits = model(**given).logits
                rows = report(model).layers
        assert torch.equal(logits, stock) == ("i" not in parts)
        assert any(row.num_reduced for row in rows) == ("i" in parts)
        # The frames stand before the image: what a token knows of them alone is stock's, within rounding.
        end = int((given["input_ids"][0] == VIDEO).nonzero()[-1]) + 1
        assert float((logits[:, :end] - stock[:, :end]).abs().max()) < TOLERANCE


def test_a_cut_in_the_decoder_takes_frames():
    """Catches frames that a cut keeps because no tower has seen them."""
    model, given = VLMS["qwen2_5"].make("sdpa"), call("qwen2_5", [2, "v", 3])
    with attach(model, Placed(TurboProcessor(0.5), place="decoder", layer=2)), torch.no_grad():
        model(**given)
        row = report(model).layers[0]
    assert (row.num_tokens, row.num_kept) == (FRAMES * 16, FRAMES * 8)
