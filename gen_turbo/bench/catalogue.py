"""The settings that each image benchmark measures, by name."""

from __future__ import annotations

from typing import Any

from gen_turbo.bench.presets import preset_settings
from gen_turbo.bench.scopes import scope_settings
from gen_turbo.bench.settings import (
    DeepCache,
    FewerSteps,
    Method,
    MethodOnFewerSteps,
    OutputCache,
    Setting,
    Stock,
    Tomesd,
)
from gen_turbo.bench.skipping import Calibrated, plain_settings, skipping_settings
from gen_turbo.methods.par import AUTO

RATIOS = (0.3, 0.5, 0.75)
REFRESHES = (2, 3, 5)
ORDERS = (0, 1)
COPIED = ("turbo", "turbo-weighted", "vistog", "tome", "random")
CACHE_INTERVALS = (2, 5)
DEEP_INTERVALS = (2, 3, 5)
BUDGETS: dict[int, dict[str | None, tuple[float, ...]]] = {
    25: {"turbo": (0.61, 0.54, 0.5, 0.41, 0.35, 0.32), None: (0.76, 0.59, 0.48, 0.39)},
    50: {"turbo": (0.6, 0.53, 0.49, 0.43, 0.36, 0.3), None: (0.83, 0.7, 0.59, 0.48, 0.41)},
    8: {AUTO: (0.55, 0.38, 0.28)},
    14: {AUTO: (0.65, 0.5, 0.33, 0.25)},
    28: {AUTO: (0.65, 0.5, 0.33, 0.25)},
}
"""Steps -> what merges tokens meanwhile -> some of the schedules that ship for the embedded models."""
TEXT_IN_FULL = {14: (0.5, 0.33), 28: (0.5, 0.33)}
"""Steps -> schedules that are run without merging padding too, as every rival is."""
RHYTHM_FAMILIES = (
    "turbo, copied in the last quarter",
    *(f"{method}, {scope}, rhythms" for method in ("turbo", "random") for scope in ("block", "attention")),
)
"""Of one ratio, by when they run in full; their records have tables of their own."""
RHYTHMS = [(every, warmup) for every in (3, 4, 5, 6, 8) for warmup in (1, 2)]
"""Every how many steps layers run in full, after how many such steps."""
_STEP_SHARES = (0.9, 0.8, 0.64, 0.52, 0.5, 0.4, 0.32, 0.25)


def quality_catalogue(steps: int) -> list[Setting]:
    """Every setting of the quality benchmark for a stock run of `steps`; the most wanted come first."""
    corrected = [
        _corrected("turbo", ratio, refresh, order)
        for order in ORDERS[::-1]
        for ratio in RATIOS
        for refresh in REFRESHES
    ]
    rivals: list[Setting] = [Tomesd(f"tomesd-r{ratio:g}", "package tomesd", ratio) for ratio in RATIOS]
    rivals += [OutputCache(f"cache-k{k}", "attention output caching", k) for k in CACHE_INTERVALS]
    rivals += [DeepCache(f"deepcache-k{k}", "package DeepCache", k) for k in DEEP_INTERVALS]
    fewer = sorted({round(share * steps) for share in _STEP_SHARES} - {0, steps}, reverse=True)
    rivals += [FewerSteps(f"steps-{number}", "fewer steps", number) for number in fewer]
    copies = [_copied(method, ratio) for ratio in RATIOS for method in COPIED]
    deeper: list[Setting] = [_copied(method, ratio, 2) for ratio in (0.4, 0.5, 0.75) for method in COPIED]
    deeper += [_corrected(method, 0.75, 3, 1, 2) for method in ("turbo", "random")]
    deeper += [Tomesd("tomesd-r0.5-2levels", "package tomesd, two levels", 0.5, 2)]
    default = Method("turbo-default", "turbo, default", "turbo", {"ratio": 0.4})
    routed = [
        _calibrated(budget, inner, steps) for inner, budgets in BUDGETS.get(steps, {}).items() for budget in budgets
    ]
    routed += [_calibrated(budget, None, steps, text_ratio=0.0) for budget in TEXT_IN_FULL.get(steps, ())]
    halved = BUDGETS.get(steps // 2, {}).get("turbo", ())
    routed += [_on_fewer_steps(budget, "turbo", steps // 2) for budget in halved[:2]]
    merged = [*corrected, *copies, _corrected("random", 0.75, 3, 1), *deeper]
    plain = plain_settings(steps)
    return [default, *preset_settings(), *routed, *plain, *rivals, *merged, *scope_settings(), *_rhythms(steps)]


def step_catalogue(model: str = "sd15", steps: int = 6) -> list[Setting]:
    """Settings of the step benchmark: stock, tomesd and Turbo at equal coverage, ToDo-style pooling of keys, skips.

    Args:
        model: One of `step_models.MODELS`. SDXL has no attention at its finest level, Flux has one level alone.
        steps: Of a run; a UNet of four levels skips in runs of more than two.
    """
    settings: list[Setting] = [Stock(), _pooled_keys()]
    for levels in (1,) if model == "flux" else (1, 2):
        where = f"{levels}level" + "s" * (levels > 1)
        coarsest = 2 ** (levels - (model != "sdxl"))
        copy = {"ratio": 0.5, "max_downsample": coarsest, "restore": "copy"}
        block = copy | {"scope": "block"}
        if model != "flux":
            settings.append(Tomesd(f"tomesd-{where}", "package tomesd", 0.5, coarsest))
            settings.append(Tomesd(f"tomesd-block-{where}", "package tomesd", 0.5, coarsest, is_whole=True))
        settings.append(Method(f"turbo-copy-{where}", "turbo, copied", "turbo", copy | {"match_every": 1}))
        settings.append(Method(f"turbo-copy-reuse5-{where}", "turbo, copied", "turbo", copy | {"match_every": 5}))
        settings.append(Method(f"turbo-block-{where}", "turbo, blocks", "turbo", block | {"match_every": 1}))
        settings.append(Method(f"turbo-block-reuse5-{where}", "turbo, blocks", "turbo", block | {"match_every": 5}))
    runs = {"ratio": 0.5, "restore": "copy", "scope": "block", "match_every": 5, "merge_span": 0}
    skips = skipping_settings(steps) if model == "sd15" and steps > 2 else []
    return [*settings, Method("turbo-runs-reuse5-1level", "turbo, blocks", "turbo", runs), *skips]


def _corrected(method: str, ratio: float, refresh: int, order: int, levels: int = 1) -> Method:
    options = {
        "ratio": ratio,
        "restore": "residual",
        "full_every": refresh,
        "extrapolation_order": order,
        **_deep(levels),
    }
    name = f"{method}-correct-r{ratio:g}-k{refresh}-o{order}" + _where(levels)
    family = f"{method}, corrected, " + ("two levels" if levels == 2 else f"r {ratio:g}, order {order}")
    return Method(name, family, method, options)


def _rhythms(steps: int) -> list[Setting]:
    """Default ratio, whole blocks or attention: how often in full, and how long at first; with a control.

    The last is what the default does in short runs, for devices on which it would choose none.
    """
    late: dict[str, Any] = {"ratio": 0.4, "scope": "block", "restore": "copy", "match_every": 1}
    late["step_scale"] = {0: 0.0, steps - max(1, steps // 4): 1.0}
    made: list[Setting] = [Method("turbo-late", RHYTHM_FAMILIES[0], "turbo", late)]
    for scope in ("block", "attention"):
        for method, rhythms in (("turbo", RHYTHMS), ("random", [(4, 2), (5, 1)])):
            for every, warmup in rhythms:
                options: dict[str, Any] = {"ratio": 0.4, "scope": scope, "restore": "residual", "match_every": None}
                options |= {"full_every": every, "warmup_steps": warmup}
                made.append(
                    Method(f"{method}-{scope}-k{every}-w{warmup}", f"{method}, {scope}, rhythms", method, options)
                )
    return made


def _calibrated(budget: float, inner: str | None, steps: int, **options: Any) -> Setting:
    """PAR on the schedule that ships for the model, with tokens merged where it runs or without."""
    name, family = ("turbo-par", "turbo + PAR") if inner == "turbo" else ("par", "PAR")
    name, family = (f"{name}-text", f"{family}, text in full") if options else (name, family)
    return Calibrated(f"{name}-b{budget:g}", family, "par", {"budget": budget, "inner": inner, **options}, steps)


def _on_fewer_steps(budget: float, inner: str, steps: int) -> Setting:
    """The same on the schedule of fewer steps, compared with more of stock."""
    options = {"budget": budget, "inner": inner}
    return MethodOnFewerSteps(
        f"turbo-par-steps-{steps}-b{budget:g}", f"turbo + PAR, {steps} steps", steps, "par", options
    )


def _copied(method: str, ratio: float, levels: int = 1) -> Method:
    """Outputs copied from fresh plans; "-weighted" counts a merged key by its size."""
    plain = method.removesuffix("-weighted")
    options = {"ratio": ratio, "restore": "copy", "match_every": 1, **_deep(levels)}
    options |= {"proportional_attention": True} if plain != method else {}
    family = f"{method.replace('-', ', ')}, copied" + (", two levels" if levels == 2 else "")
    return Method(f"{method}-copy-r{ratio:g}{_where(levels)}", family, plain, options)


def _deep(levels: int) -> dict[str, Any]:
    return {"max_downsample": 2 ** (levels - 1)} if levels > 1 else {}


def _where(levels: int) -> str:
    return f"-{levels}levels" if levels > 1 else ""


def _pooled_keys() -> Method:
    """ToDo (Smith et al., 2024, arXiv 2402.13573) keeps every fourth key and value; here each is the mean of four."""
    return Method("pool-keys-r0.75", "pooled keys", "pool", {"ratio": 0.75, "kv_only": True})
