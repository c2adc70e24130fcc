"""UNets of videos: layers over space run on merged tokens frame by frame, layers over time as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers import UNet3DConditionModel, UNetMotionModel, UNetSpatioTemporalConditionModel
from stated import TurboProcessor

from gen_turbo import IdentityProcessor, PARProcessor, attach, report
from tests.engine.families import relative
from tests.snapshots import differences, model_state
from tests.tiny_family import random
from tests.tiny_hosts import TEXT_WIDTH

TIMES, FRAMES, SIDE = (900, 700, 500), 3, 16
SHAPE = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "sample_size": SIDE,
}
SCOPES = ("attention", "block")


def motion() -> torch.nn.Module:
    """AnimateDiff: motion modules behind the attention of SD 1.5."""
    return UNetMotionModel(
        **SHAPE, norm_num_groups=4, cross_attention_dim=TEXT_WIDTH, num_attention_heads=2,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), motion_num_attention_heads=2,
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )  # fmt: skip


def model_scope() -> torch.nn.Module:
    """ModelScope: an attention over time behind each one over space."""
    return UNet3DConditionModel(
        **SHAPE, norm_num_groups=4, cross_attention_dim=TEXT_WIDTH, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip


def svd() -> torch.nn.Module:
    """Stable Video Diffusion: frames before channels, a block over time inside of each transformer."""
    return UNetSpatioTemporalConditionModel(
        **{**SHAPE, "block_out_channels": (32, 64)}, cross_attention_dim=TEXT_WIDTH, num_attention_heads=(2, 4),
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )  # fmt: skip


MODELS: dict[str, Callable[[], torch.nn.Module]] = {"motion": motion, "model_scope": model_scope, "svd": svd}


def made(name: str) -> torch.nn.Module:
    """The model, with the same weights every time."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
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
@pytest.mark.parametrize("name", MODELS)
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


@pytest.mark.parametrize("name", MODELS)
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


@pytest.mark.parametrize("name", MODELS)
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
