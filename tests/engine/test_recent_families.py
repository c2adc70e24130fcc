"""What models of late 2026 are given beside the target: references of their own arguments, caches, no text at all."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from stated import TurboProcessor

from gen_turbo import IdentityProcessor, attach, report
from tests.engine.families import relative
from tests.engine.test_references import REFERENCES, SCOPES, TARGET, TIMES, Planned
from tests.tiny_family import NUM_TEXT, random
from tests.tiny_flux import image_positions
from tests.tiny_transformers import FAMILIES, build


@torch.no_grad()
def run(name: str, model: torch.nn.Module, inputs: dict[str, object]) -> torch.Tensor:
    """Calls the model once per time on a target that changes slowly."""
    tokens, outputs, family = inputs["hidden_states"], [], FAMILIES[name]
    for step, time in enumerate(TIMES):
        call = inputs | {"hidden_states": tokens * (1 - 0.05 * step)} | family.time(time, len(tokens))
        outputs.append(model(**call, return_dict=False)[0])
    return torch.stack(outputs)


def reduced_rows(model: torch.nn.Module) -> list[tuple[tuple[int, int] | None, int, int]]:
    """Grid, tokens and tokens kept of each reduced layer."""
    return [(row.grid, row.num_tokens, row.num_kept) for row in report(model).layers if row.status == "reduced"]


@pytest.mark.parametrize("scope", SCOPES)
def test_layers_of_the_target_alone_have_its_grid(scope):
    """Catches references counted into FLUX.3's first layers, and joint ones that have no grid or one map for all."""
    model = build("flux3")
    ids = torch.cat([image_positions(*grid, 10 * (i + 1)) for i, grid in enumerate(REFERENCES)])
    inputs = FAMILIES["flux3"].inputs(2, TARGET) | {
        "image_cond_hidden_states": random(2, len(ids), 8, seed=3),
        "image_cond_ids": torch.cat([ids, torch.zeros(len(ids), 1)], 1),
        "hidden_states": random(2, 64, 8),
    }
    stock = run("flux3", model, inputs)
    with attach(model, TurboProcessor(0.0, scope=scope)):
        assert torch.equal(run("flux3", model, inputs), stock)
    processor = Planned(0.4, restore="copy", scope=scope, reference_ratio=0.6)
    with attach(model, processor):
        reduced = run("flux3", model, inputs)
        rows = reduced_rows(model)
    assert 0 < relative(reduced, stock) < 0.8
    joint = (TARGET, 64 + 60 + 16, 39 + 24 + 7)
    assert rows == [(TARGET, 64, 39), joint, joint]
    assert {*processor.seen} == {(TARGET, 0.4), *((grid, 0.6) for grid in REFERENCES)}


@pytest.mark.parametrize("scope", SCOPES)
def test_references_that_a_cache_holds_stay_whole(scope):
    """Catches a call that fills GLM-Image's cache with merged tokens, and one that reads it on as many as before."""

    def runs(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
        cache, inputs = GlmImageKVCache(2), FAMILIES["glm-image"].inputs(1, TARGET)
        cache.set_mode("write")
        reference = random(1, *FAMILIES["glm-image"].latents(TARGET), seed=5)
        with torch.no_grad():
            model(**inputs | {"hidden_states": reference, "kv_caches": cache, "timestep": torch.zeros(1)})
        cache.set_mode("read")
        target = random(1, *FAMILIES["glm-image"].latents(TARGET))
        outputs = run("glm-image", model, inputs | {"hidden_states": target, "kv_caches": cache})
        return torch.stack([*cache[0].k_caches, *cache[1].v_caches]), outputs

    model = build("glm-image")
    held, stock = runs(model)
    with attach(model, IdentityProcessor(0.4, scope=scope)):
        assert all(torch.equal(a, b) for a, b in zip(runs(model), (held, stock), strict=True))
    with attach(model, TurboProcessor(0.4, restore="copy", scope=scope)):
        kept, reduced = runs(model)
        rows = reduced_rows(model)
    assert torch.equal(kept, held) and 0 < relative(reduced, stock) < 0.8
    assert rows == [(TARGET, 64, 39)] * 2


@pytest.mark.parametrize("scope", SCOPES)
def test_a_sequence_without_text_is_all_image(scope):
    """Catches text that is taken off the sequence of Ideogram 4's unconditional model, which has none."""
    model = build("ideogram4")
    inputs = FAMILIES["ideogram4"].inputs(2, TARGET)
    sequences = ("encoder_hidden_states", "position_ids", "segment_ids", "indicator")
    inputs |= {name: inputs[name][:, NUM_TEXT:] for name in sequences} | {"hidden_states": random(2, 64, 8)}
    stock = run("ideogram4", model, inputs)
    with attach(model, TurboProcessor(0.4, restore="copy", scope=scope)):
        reduced = run("ideogram4", model, inputs)
        rows = reduced_rows(model)
    assert 0 < relative(reduced, stock) < 0.8 and rows == [(TARGET, 64, 39)] * 2
