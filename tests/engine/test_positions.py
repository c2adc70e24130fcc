"""Rotary tables that stay the same are made, and their rows taken, once a run, and again after any change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from stated import TurboProcessor
from torch import Tensor, nn

from gen_turbo import attach, report
from gen_turbo.engine.positions import PositionMaker
from tests.engine.families import family

NAMES = ("flux", "chroma", "wan", "wan-vace", "skyreels-v2", "hunyuan-video", "hunyuan-video-1.5", "hunyuan-image")
TIMES = (900, 800, 700, 600)
SCOPES: dict[str, dict[str, Any]] = {
    "copied": {"restore": "copy"},
    "residual": {},
    "block": {"scope": "block", "restore": "copy", "match_every": 2},
}


def makers(attachment: Any) -> list[PositionMaker]:
    """What stands in front of modules that make positions."""
    return attachment.parts[0].root.arrangement.makers


def without_memory(attachment: Any) -> None:
    """Lets every step make its positions anew."""
    for maker in makers(attachment):
        maker.remove()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("name", NAMES)
def test_they_are_made_once_a_run_and_give_the_same(name, scope):
    """Catches tables of another shape or value, rows of an older map, tables made in every step, and any that stay."""
    model, run = family(name)
    with attach(model, TurboProcessor(0.4, **SCOPES[scope])) as attachment:
        (maker,) = makers(attachment)
        calls: list[object] = []
        maker.inner = _noted(maker.inner, calls)
        remembered = run(times=TIMES), run(times=TIMES, grid=(8, 16)), run(times=TIMES)
        assert len(calls) == 3
        attachment.parts[0].root.runs.forget()
        assert report(model).remembered_bytes == 0
        without_memory(attachment)
        anew = run(times=TIMES), run(times=TIMES, grid=(8, 16)), run(times=TIMES)
    assert all(torch.equal(a, b) for a, b in zip(remembered, anew, strict=True))


def _noted(function: Callable[..., Any], calls: list[object]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    return call


def flux_run(model: nn.Module, change: Callable[[dict[str, Any], int], None]) -> list[Tensor]:
    """The results of four steps, before each of which something may happen to the arguments."""
    torch.manual_seed(0)
    config = model.config
    rows = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"), -1).view(64, 2)
    ids = torch.cat([torch.zeros(64, 1), rows], 1)
    given = {
        "hidden_states": torch.randn(1, 64, config.in_channels),
        "encoder_hidden_states": torch.randn(1, 6, config.joint_attention_dim),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim),
        "img_ids": ids,
        "txt_ids": torch.zeros(6, 3),
        "guidance": torch.ones(1) if config.guidance_embeds else None,
    }
    results = []
    for number, time in enumerate(TIMES):
        change(given, number)
        with torch.no_grad():
            results.append(model(**given, timestep=torch.tensor([time / 1000]), return_dict=False)[0])
    return results


def moved(given: dict[str, Any], number: int) -> None:
    """Other positions from the third step on."""
    if number == 2:
        given["img_ids"] = given["img_ids"] + 1


def written(given: dict[str, Any], number: int) -> None:
    """The same, written into the same tensor."""
    if number == 2:
        given["img_ids"] += 1


def as_inference(given: dict[str, Any], number: int) -> None:
    """Tensors of inference mode, written to where nobody counts it."""
    with torch.inference_mode():
        if number == 0:
            given["img_ids"] = given["img_ids"].clone()
        moved(given, number) if number != 2 else given["img_ids"].add_(1)


@pytest.mark.parametrize("change", [moved, written, as_inference])
def test_other_positions_in_mid_run_are_seen(change):
    """Catches tables that are kept by the number of steps, or by an argument that has changed in place."""
    model, _ = family("flux")
    with attach(model, TurboProcessor(0.4, restore="copy")) as attachment:
        remembered = flux_run(model, change)
        without_memory(attachment)
        anew = flux_run(model, change)
        still = flux_run(model, lambda given, number: None)
    assert all(torch.equal(a, b) for a, b in zip(remembered, anew, strict=True))
    assert not torch.equal(anew[-1], still[-1])


def test_a_module_of_somebody_else_is_left_alone():
    """Catches tables kept that depend on the time too, as those of a patched module may."""

    class Other(type(family("flux")[0].pos_embed)):
        """Positions that move with every call."""

        num_calls = 0

        def forward(self, ids: Tensor) -> Any:
            """Each call's are others."""
            self.num_calls += 1
            return super().forward(ids * self.num_calls)

    model, _ = family("flux")
    own = model.pos_embed
    model.pos_embed = Other(own.theta, own.axes_dim)
    with attach(model, TurboProcessor(0.4, restore="copy")) as attachment:
        assert makers(attachment) == []
        flux_run(model, lambda given, number: None)
    assert model.pos_embed.num_calls == len(TIMES)
