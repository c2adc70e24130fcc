"""UNets of videos: layers over space run on merged tokens frame by frame, layers over time as they are."""

from __future__ import annotations

import pytest
import torch
from stated import TurboProcessor

from gen_turbo import IdentityProcessor, PARProcessor, attach, report
from tests.engine.families import relative
from tests.snapshots import differences, model_state
from tests.tiny_family import random
from tests.tiny_hosts import TEXT_WIDTH
from tests.tiny_video_unets import SIDE, VIDEO_UNETS

TIMES, FRAMES = (900, 700, 500), 3
SCOPES = ("attention", "block")


def made(name: str) -> torch.nn.Module:
    """The model, with the same weights every time."""
    torch.manual_seed(0)
    model = VIDEO_UNETS[name]().eval()
    with torch.no_grad():
        for part, weight in model.named_parameters():
            # Made as zeros, which would hide what layers over time see.
            if "proj_out.weight" in part or "mix_factor" in part:
                weight.copy_(random(*weight.shape) * 0.1)
    return model


@torch.no_grad()
def run(name: str, model: torch.nn.Module, guided: bool = False, batch: int = 2) -> torch.Tensor:
    """Calls the model once per time on latents that change slowly; both rows are of one video where guided."""
    shape = (FRAMES, 4) if name == "svd" else (4, FRAMES)
    latents = random(1, *shape, SIDE, SIDE).repeat(2, 1, 1, 1, 1) if guided else random(batch, *shape, SIDE, SIDE)
    text = random(len(latents), 5, TEXT_WIDTH)
    # AnimateDiff's pipeline repeats the text for each frame, the others repeat it inside.
    given: dict[str, object] = {"encoder_hidden_states": text.repeat_interleave(FRAMES if name == "motion" else 1, 0)}
    if name == "svd":
        given["added_time_ids"] = torch.ones(len(latents), 3)
    steps = enumerate(TIMES)
    return torch.stack([model(latents * (1 - 0.05 * i), time, **given, return_dict=False)[0] for i, time in steps])


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", VIDEO_UNETS)
def test_frames_are_reduced_and_time_stays(name, scope):
    """Catches layers over time that merge frames, frames taken for a grid, and what does not come off again."""
    model = made(name)
    stock, untouched = run(name, model), model_state(model)
    for reducer in (IdentityProcessor(0.4, scope=scope), TurboProcessor(0.0, scope=scope)):
        with attach(model, reducer):
            assert torch.equal(run(name, model), stock)
    with attach(model, TurboProcessor(0.4, scope=scope, restore="copy")):
        reduced = run(name, model)
        rows = report(model).layers
    of_space = {row.name for row in rows if row.status == "reduced"}
    assert of_space and all(".attentions." in name and "temporal" not in name for name in of_space)
    assert {(row.grid, row.num_tokens, row.num_kept) for row in rows if row.name in of_space} == {
        ((SIDE, SIDE), SIDE**2, SIDE**2 - int(SIDE**2 * 0.4))
    }
    assert 0 < relative(reduced, stock) < 0.8
    assert differences(untouched, model_state(model)) == [] and torch.equal(run(name, model), stock)


@pytest.mark.parametrize("name", VIDEO_UNETS)
def test_every_frame_has_a_map_that_its_branches_share(name, monkeypatch):
    """Catches one frame's map for all, and maps of the unconditional rows."""
    seen = []
    plan = TurboProcessor.plan

    def noted(self, tokens, site, frame):
        found = plan(self, tokens, site, frame)
        seen.append(len(found.slot_BN))
        return found

    monkeypatch.setattr(TurboProcessor, "plan", noted)
    model = made(name)
    for guided, num_maps in ((False, 2 * FRAMES), (True, FRAMES)):
        seen.clear()
        with attach(model, TurboProcessor(0.4, restore="copy")):
            run(name, model, guided)
        assert set(seen) == {num_maps}


@pytest.mark.parametrize("name", VIDEO_UNETS)
def test_a_corrected_run_is_nearer_than_a_copied_one(name):
    """Catches residuals that are added to another frame."""
    model = made(name)
    stock = run(name, model)
    error = {}
    for restore in ("copy", "residual"):
        with attach(model, TurboProcessor(0.4, restore=restore)):
            error[restore] = relative(run(name, model)[-1], stock[-1])
    assert error["residual"] < error["copy"]


def test_whole_calls_can_be_left_out():
    """Catches a forecast in the shape of frames as rows."""
    model = made("motion")
    stock = run("motion", model)
    with attach(model, PARProcessor(0.5)):
        assert run("motion", model).shape == stock.shape
