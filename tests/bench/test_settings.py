"""Settings applied to a real, tiny UNet."""

from contextlib import suppress

import pytest
import torch
from diffusers import UNet2DConditionModel

from gen_turbo import load_pipeline
from gen_turbo.api import denoiser
from gen_turbo.bench.catalogue import BUDGETS, quality_catalogue
from gen_turbo.bench.settings import Method, OutputCache, Setting, Stock, Tomesd, selected
from gen_turbo.methods.par import AUTO
from gen_turbo.metrics.cost import count_cost
from gen_turbo.training.schedule import TOLERANCE
from gen_turbo.training.schedule_file import shipped
from tests.tiny_hosts import run_unet, sd15_unet, unet_inputs

SETTINGS = [
    Method("turbo-copy", "turbo", "turbo", {"ratio": 0.5, "restore": "copy", "match_every": 1}),
    Tomesd("tomesd", "package tomesd", 0.5),
    OutputCache("cache", "cache", 2),
]


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """Attention on 256 and 64 tokens."""
    return sd15_unet()


def _denoise(unet: UNet2DConditionModel) -> torch.Tensor:
    return run_unet(unet, (900, 600, 300), **unet_inputs())


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_a_setting_saves_attention_and_leaves_nothing(setting: Setting, unet: UNet2DConditionModel) -> None:
    """Catches a setting that does nothing, and one that changes what is measured after it."""
    stock, before = _denoise(unet), {name: dict(m.__dict__) for name, m in unet.named_modules()}
    with count_cost(unet) as full:
        _denoise(unet)
    with count_cost(unet) as cost, setting.applied(unet):
        changed = _denoise(unet)
    assert not torch.equal(changed, stock)
    assert cost.attention_flops(full.top_self_attention()) < full.attention_flops(full.top_self_attention())
    assert torch.equal(_denoise(unet), stock)
    assert {name: list(m.__dict__) for name, m in unet.named_modules()} == {n: list(d) for n, d in before.items()}


def test_the_cache_runs_every_second_call(unet: UNet2DConditionModel) -> None:
    """Catches an interval off by one, and caching below the finest level."""
    with count_cost(unet) as cost, OutputCache("cache", "cache", 2).applied(unet):
        _denoise(unet)
    tokens = cost.tokens()
    assert tokens["down_blocks.0.attentions.0.transformer_blocks.0.attn1"] == [256, 256]
    assert tokens["down_blocks.1.attentions.0.transformer_blocks.0.attn1"] == [64, 64, 64]


def test_an_exception_restores_the_processors(unet: UNet2DConditionModel) -> None:
    """Catches a restore that is not in `finally`."""
    before = dict(unet.attn_processors)
    with suppress(KeyboardInterrupt), OutputCache("cache", "cache", 2).applied(unet):
        raise KeyboardInterrupt
    assert unet.attn_processors == before


def test_names_are_unique_and_every_family_of_the_comparison_is_there() -> None:
    """Catches two settings that share records, and a table without its controls."""
    settings = [Stock(), *quality_catalogue(25)]
    assert len({s.name for s in settings}) == len(settings)
    names = {s.name for s in settings}
    corrected = {f"turbo-correct-r{r}-k{k}-o{o}" for r in ("0.3", "0.5", "0.75") for k in (2, 3, 5) for o in (0, 1)}
    rivals = {"tomesd-r0.5", "tome-copy-r0.5", "random-copy-r0.5", "cache-k2", "cache-k5", "steps-16", "stock"}
    assert corrected | rivals <= names


@pytest.mark.parametrize("steps", BUDGETS)
def test_every_budget_takes_a_schedule_of_its_own(steps: int) -> None:
    """Catches a budget below the cheapest level, two budgets of one level, and schedules of another run's steps."""
    model = denoiser(load_pipeline("tiny" if steps in (25, 50) else "tiny-dit", processor=None, device="cpu"))
    (file,) = [file for file in shipped(model) if file.num_calls == steps]
    for inner, budgets in BUDGETS[steps].items():
        costs = [file.at(budget, None if inner == AUTO else inner is not None).cost for budget in budgets]
        assert len(set(costs)) == len(costs)
        assert all(cost <= budget + TOLERANCE for cost, budget in zip(costs, budgets, strict=True))


def test_schedules_of_half_the_steps_run_on_half_the_steps() -> None:
    """Catches a schedule of 25 steps on a run of 50, where it would skip nothing."""
    settings = {s.name: s for s in quality_catalogue(50) if s.name.startswith("turbo-par")}
    halved = {name for name, setting in settings.items() if setting.num_steps(50) == 25}
    assert halved == {name for name in settings if "-steps-25-" in name} and len(halved) >= 2
    assert all(settings[name].num_steps(50) == 50 for name in settings.keys() - halved)


def test_fewer_steps_do_not_overwrite_the_workload() -> None:
    """Catches a setting whose own steps are recorded as the steps of stock."""
    for setting in quality_catalogue(8):
        assert "steps" not in setting.params()
        assert setting.num_steps(8) <= 8


def test_an_unknown_pattern_lists_what_there_is() -> None:
    """Catches a mistyped name that silently measures nothing."""
    with pytest.raises(ValueError, match="turbo-default"):
        selected(quality_catalogue(25), ["turbo-corect*"])
