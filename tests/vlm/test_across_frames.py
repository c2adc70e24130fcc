"""Videos planned as a whole, `across_frames=True`: against slow right answers, and what it is for."""

from __future__ import annotations

import warnings

import pytest
import torch

from gen_turbo import TurboProcessor, attach, report
from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.eadaprune import EAdaPruneProcessor
from gen_turbo.methods.fastv import FastVProcessor
from gen_turbo.methods.pyramiddrop import PyramidDropProcessor
from gen_turbo.registry import METHODS
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.settings import Placed
from tests.vlm.test_generate import TOLERANCE, generate
from tests.vlm.test_videos import FAMILIES as WITH_VIDEOS
from tests.vlm.test_videos import FRAMES, GLM, LLAVA, MINICPM, VIDEO, call, last_logits, runs_of
from tests.vlm.tiny_kit import IMAGE
from tests.vlm.tiny_vlms import VLMS

# MiniCPM's features come frame by frame, of no known video.
FAMILIES = [family for family in WITH_VIDEOS if family not in MINICPM]


def videos_of(ids, family):
    """The columns of every image and of every video of a row, in order; a newline behind a video is its own."""
    size, joined, num_frames = 4 if family in LLAVA else 16, [], 0
    token = IMAGE if family in GLM else VIDEO
    for run in runs_of(ids, family):
        is_frame = len(run) == size and int(ids[run[0]]) == token
        if is_frame and num_frames % FRAMES:
            joined[-1] += run
        else:
            joined.append(run)
        num_frames += is_frame
    return joined


def plan_of(method, family):
    """What a method does to the tokens of one image or video."""
    side = 2 if family in LLAVA else 4

    def plan(tokens):
        count = tokens.shape[1] // side**2
        is_video = count == FRAMES
        grid = (side, side) if is_video or family not in LLAVA else None
        site = LayerInfo("pre_llm", method.ratio if tokens.shape[1] > 1 else 0.0, grid, num_frames=max(1, count))
        return method.plan(tokens, site if is_video else LayerInfo("pre_llm", site.ratio, grid), StepInfo())

    return plan


def still(given, family):
    """The call with a video of which every frame is the first."""
    pixels = given["pixel_values_videos"].clone()
    if family not in LLAVA:
        patches = pixels.view(FRAMES, -1, pixels.shape[-1])
        patches.copy_(patches[:1].clone().expand_as(patches))
    else:
        pixels.copy_(pixels[:, :1].clone().expand_as(pixels))
    return given | {"pixel_values_videos": pixels}


METHODS_OF_VIDEOS = [
    TurboProcessor(0.8, semantic="none", across_frames=True),
    METHODS["divprune"](0.7, across_frames=True),
    METHODS["random"](0.7, across_frames=True),
]


@pytest.mark.parametrize("method", METHODS_OF_VIDEOS, ids=["turbo", "divprune", "random"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_whole_video_is_one_set_of_tokens(family, method):
    """Catches frames planned apart, tokens between the times of frames counted wrong, and positions of other tokens."""
    model, given = VLMS[family].make("sdpa"), call(family, [2, "v", 3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with attach(model, method):
            logits = model(**given).logits[0, -1]
            row = report(model).layers[0]
    videos = videos_of(given["input_ids"][0], family)
    assert len(videos[0]) == FRAMES * (4 if family in LLAVA else 16)
    assert row.num_kept == sum(len(run) - int(len(run) * method.ratio) * (len(run) > 1) for run in videos)
    is_merged = getattr(method, "combine", "merge") == "merge"
    expected = last_logits(model, family, given, plan_of(method, family), videos, is_merged)
    assert float((logits - expected).abs().max()) < TOLERANCE
    with attach(model, type(method)(method.ratio)):
        assert float((logits - model(**given).logits[0, -1]).abs().max()) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["turbo", "divprune", "random"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_still_video_is_read_once(family, name):
    """Catches a place of a still video that is read twice, or lost, where one token of each would do: random loses."""
    model, given = VLMS[family].make("sdpa"), still(call(family, [2, "v", 3]), family)
    video, *rest = videos_of(given["input_ids"][0], family)
    size = len(video) // FRAMES

    def kept_places(method):
        kept, where = [], attach(model, method)
        where.parts[0].watch(lambda first, images, reduction: kept.append(reduction.keep_BL[0]))
        with where:
            logits = model(**given).logits[0, -1]
        return {place % size for place, column in enumerate(video) if kept[0][column]}, logits

    method = METHODS[name](1 - 1 / FRAMES, across_frames=True)
    places, logits = kept_places(method)
    assert (places == set(range(size))) == (name != "random")
    if name == "turbo":
        # The first frame alone, at its own places.
        expected = last_logits(model, family, given, first_only(size), [video, *rest])
        assert float((logits - expected).abs().max()) < TOLERANCE
        apart, _ = kept_places(METHODS[name](1 - 1 / FRAMES))
        assert apart != set(range(size))


def first_only(size):
    """A plan by which every token of a video joins the one of its place in the first frame."""

    def plan(tokens):
        own = torch.arange(tokens.shape[1])[None]
        return TokenMap(own, own) if tokens.shape[1] == 1 else TokenMap(own % size, own[:, :size])

    return plan


LATER = [
    PyramidDropProcessor(0.75, cuts=[1, 2], across_frames=True),
    EAdaPruneProcessor(energy=0.6, across_frames=True),
    FastVProcessor(0.5, layer=2, across_frames=True),
    METHODS["divprune"](keep=9, adaptive=True, across_frames=True),
    Placed(TurboProcessor(0.5, across_frames=True), place="decoder", layer=2),
]


@pytest.mark.parametrize("method", LATER, ids=["pyramiddrop", "eadaprune", "fastv", "adaptive", "cut"])
@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "llava_onevision"])
@torch.no_grad()
def test_stages_budgets_and_cuts_take_whole_videos(family, method):
    """Catches cuts that know frames alone, a budget of each frame, and features that were made before the call."""
    model, given = VLMS[family].make("sdpa"), call(family, [2, "v", 3, "v", 2])
    with attach(model, method):
        _, logits, _ = generate(model, given)
        first = model(**given).logits[:, -1]
        row = report(model).layers[-1]
    videos = [run for run in videos_of(given["input_ids"][0], family) if len(run) > 1]
    assert len(videos) == 2 and row.num_tokens == int((given["input_ids"] == VIDEO).sum())
    assert float((logits[:, 0] - first).abs().max()) < TOLERANCE
    extra = row.num_tokens - sum(map(len, videos))
    if method.keep is not None:
        assert row.num_kept == 2 * method.keep + extra
    elif not isinstance(method, EAdaPruneProcessor):
        assert row.num_kept == sum(len(run) - int(len(run) * method.ratio) for run in videos) + extra
    else:
        assert row.num_kept < row.num_tokens


@pytest.mark.parametrize(
    ("family", "method", "where"),
    [
        ("llava", TurboProcessor(0.5, across_frames=True), "models whose videos are known frame by frame"),
        ("qwen2_5", METHODS["pool"](across_frames=True), "methods that look at several frames"),
        ("qwen2_5", METHODS["tome"](across_frames=True), "methods that look at several frames"),
        ("qwen2_5", METHODS["visionzip"](across_frames=True), "read no attention of the tower"),
        ("qwen2_5", Placed(TurboProcessor(0.5, across_frames=True), place="tower"), "place='pre_llm'"),
        ("qwen2_5", METHODS["par"](tokens=0.5, across_frames=True), "methods without a router"),
    ],
)
def test_what_cannot_look_across_frames_is_refused(family, method, where):
    """Catches a video that runs frame by frame though it was asked for otherwise."""
    with pytest.raises(ValueError, match=f"across_frames=True has no effect.*{where}"):
        attach(VLMS[family].make("sdpa"), method)
