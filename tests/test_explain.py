"""`gen-turbo explain`: what is drawn is what the method did, and nothing stays behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from gen_turbo import TurboProcessor, attach, scenes
from gen_turbo.commands.cli import main
from gen_turbo.commands.explain import explain_reading
from gen_turbo.config import CaptionConfig
from gen_turbo.factory import build_processor
from gen_turbo.overlay import SIDE_PX, arrows_panel, groups_panel, heat_panel, kept_panel, layers_strip, sheet
from gen_turbo.pipelines import tiny_vlm
from gen_turbo.pipelines.caption import CaptionPipeline
from gen_turbo.tokens.select import pool_cells
from tests.snapshots import differences, model_state

CELL = SIDE_PX // 4


@pytest.fixture(scope="module")
def pipe():
    """The embedded architecture with 64 patches and random weights."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = tiny_vlm.make_model(16)
    torch.set_rng_state(state)
    config = CaptionConfig(checkpoint="", prompt=tiny_vlm.CAPTION_PROMPT, max_new_tokens=2)
    return CaptionPipeline(model, tiny_vlm.make_processor(16), config)


@pytest.fixture
def image():
    """A scene with two objects."""
    return scenes.render("a red circle left of a blue square on a white background", 3)


def middle(panel: Image.Image, token: int) -> np.ndarray:
    """The colour in the middle of a token of a 4 x 4 grid, off the centre, where no dot is."""
    return np.asarray(panel)[token // 4 * CELL + CELL // 4, token % 4 * CELL + CELL // 4].astype(int)


def test_groups_have_one_tint_and_lines_between():
    """Catches rows and columns exchanged, and tints that do not follow the slots."""
    slots = np.array([[0, 0, 1, 1], [0, 0, 2, 2], [3, 3, 2, 2], [3, 3, 4, 2]])
    panel = groups_panel(Image.new("RGB", (40, 40), "white"), slots)
    colors = {slot: {tuple(middle(panel, token)) for token in np.flatnonzero(slots == slot)} for slot in range(5)}
    assert all(len(found) == 1 for found in colors.values())
    assert len(set.union(*colors.values())) == 5 and colors[4] == {(255, 255, 255)}
    dark = np.asarray(panel).sum(2) < 100
    assert dark[10, 2 * CELL] and not dark[10, CELL] and dark[CELL, 3 * CELL] and not dark[2 * CELL, 3 * CELL + 5]


def test_dropped_tokens_are_dark():
    """Catches kept and dropped tokens exchanged."""
    is_kept = np.zeros((4, 4), dtype=bool)
    is_kept[1, 2] = True
    panel = kept_panel(Image.new("RGB", (40, 40), "white"), is_kept)
    assert middle(panel, 6).tolist() == [255] * 3
    assert all(middle(panel, token).max() < 100 for token in range(16) if token != 6)


def test_arrows_end_at_the_anchor():
    """Catches arrows between tokens that have nothing to do with each other."""
    slots = np.arange(16).reshape(4, 4)
    slots[0, 3] = 0
    slots = np.unique(slots, return_inverse=True)[1].reshape(4, 4)
    panel = np.asarray(arrows_panel(Image.new("RGB", (40, 40), "white"), slots, [t for t in range(16) if t != 3]))
    inked = np.argwhere(panel.astype(int).sum(2) < 700)
    assert abs(inked[:, 0] - CELL // 2).max() <= 4
    assert inked[:, 1].min() <= CELL // 2 <= inked[:, 1].min() + 4 and abs(inked[:, 1].max() - 3.5 * CELL) <= 4


def test_heat_is_blue_below_and_red_above():
    """Catches a colour scale that is upside down."""
    panel = heat_panel(Image.new("RGB", (40, 40), "white"), np.arange(16.0).reshape(4, 4))
    low, high = middle(panel, 0), middle(panel, 15)
    assert low[2] > low[0] and high[0] > high[2]


def test_a_sheet_holds_its_panels_and_layers():
    """Catches panels that overlap, and a strip that is cut off."""
    panel = Image.new("RGB", (SIDE_PX, SIDE_PX), "red")
    strip = layers_strip([True, False, True], SIDE_PX)
    page = np.asarray(sheet([("a", panel), ("b", panel)], strip))
    assert (page == [255, 0, 0]).all(2).sum() == 2 * SIDE_PX**2
    assert len(np.unique(np.asarray(strip)[20, [30, 94, 158]], axis=0)) == 2


@pytest.mark.parametrize("method", ["turbo", "turbo_vit", "vistog", "vistog_vit", "random", "fastv", "pool", "par"])
def test_every_method_leaves_a_trace_and_a_stock_model(pipe, image, method):
    """Catches a trace of another size than what was kept, and an attachment or a recorder that stays."""
    options = {"router": "random", "tokens": 0.5, "layers": 3} if method == "par" else {"ratio": 0.5}
    processor = build_processor({"method": method, **options})
    pipe(image)
    before, own = model_state(pipe.vlm), dict(vars(processor))
    trace = explain_reading(pipe, processor, image)
    assert differences(before, model_state(pipe.vlm)) == [] and vars(processor) == own
    assert trace.grid == (8, 8) and len(trace.slot) == 64 and len(trace.anchors) == 32
    assert trace.is_dropping == (method in ("fastv", "par"))
    assert (trace.degree is not None) == method.startswith("turbo")
    assert (trace.runs is not None and sum(trace.runs) == 3) == (method == "par")
    if method == "vistog_vit":
        assert torch.equal(trace.slot, pool_cells((8, 8), 32).slot_BN[0])


def test_the_information_degree_is_turbos(pipe, image):
    """Catches a heat map of something else than weight * N * A - R, or of another image's tokens."""
    processor, seen = TurboProcessor(0.5, value_weight=0.5), {}
    trace = explain_reading(pipe, processor, image)

    class Listening(TurboProcessor):
        def plan(self, tokens, site, frame):
            seen.update(tokens=tokens[0], value=site.semantic("self")[0])
            return super().plan(tokens, site, frame)

    with attach(pipe, Listening(0.5, value_weight=0.5)):
        pipe(image)
    for token in (0, 17, 63):
        cosines = torch.cosine_similarity(seen["tokens"][token], seen["tokens"], dim=-1)
        cosines[token] = -1
        expected = 0.5 * 64 * seen["value"][token] / seen["value"].sum() - cosines.max()
        assert abs(trace.degree[token] - expected) < 1e-4


def test_the_command_writes_a_image(pipe, image, tmp_path, capsys):
    """Catches a command that does not pass its settings on."""
    pipe.vlm.save_pretrained(tmp_path / "vlm")
    pipe.preparer.save_pretrained(tmp_path / "vlm")
    image.save(tmp_path / "in.png")
    given = ["explain", "--image", str(tmp_path / "in.png"), "--processor", "pool", "--output", str(tmp_path / "o.png")]
    assert main([*given, f"checkpoint={tmp_path / 'vlm'}", "processor.ratio=0.75"]) == 0
    assert "16 of 64 tokens stay" in capsys.readouterr().out
    with Image.open(tmp_path / "o.png") as page:
        assert page.width == 2 * SIDE_PX + 8


def test_a_denoiser_is_explained_at_its_finest_tokens(tiny_checkpoint, image, tmp_path, capsys):
    """Catches plans of a coarse layer, and images that are not encoded."""
    image.save(tmp_path / "in.png")
    given = [
        "explain",
        "--image",
        str(tmp_path / "in.png"),
        "--processor",
        "turbo",
        "--output",
        str(tmp_path / "o.png"),
    ]
    assert main([*given, "--config", "tiny", f"checkpoint={tiny_checkpoint}"]) == 0
    assert "1229 of 4096 tokens stay" in capsys.readouterr().out
    with Image.open(tmp_path / "o.png") as page:
        assert page.width == 4 * SIDE_PX + 3 * 8


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"--image": "none.png"}, "none.png"),
        ({"--output": "o.jpg"}, "--output must be a .png file; got o.jpg"),
        ({"--config": "caption-generate"}, "caption-generate has no setting 'processor'"),
        ({"--processor": "null"}, "give one with --processor"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(image, tmp_path, monkeypatch, capsys, changed, words):
    """Catches a traceback, and minutes of loading before a wrong name is noticed."""
    monkeypatch.chdir(tmp_path)
    image.save("in.png")
    given = {"--image": "in.png", "--processor": "pool", **changed}
    assert main(["explain", *(text for pair in given.items() for text in pair)]) == 2
    assert words in capsys.readouterr().err
