"""`gen-turbo bench understanding`: answers of the embedded vision-language model, by kind, with ever fewer tokens.

A setting that is finished becomes one record, so a run that was interrupted goes on with the setting it was at. With
--rounds, settings are timed beside stock as well; a record that has its answers already keeps them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from gen_turbo import scenes
from gen_turbo.bench import records
from gen_turbo.bench.asks import Ask, InTower, Selecting, asked
from gen_turbo.bench.par_settings import par_settings
from gen_turbo.bench.settings import Method, Setting, Stock, selected
from gen_turbo.bench.timing import Timing, clocked
from gen_turbo.engine.report import Report, report
from gen_turbo.factory import load_pipeline
from gen_turbo.training.files import artefact_folder

KEPT = (0.5, 0.33, 0.22, 0.11)
"""Share of the image tokens that are kept; whole numbers of tokens are rounded."""
ENERGIES = (0.999995, 0.99998)
"""Shares of the energy of features, of which the mean image is nearly all, that leave 39 and 29 tokens on average."""
BENCH = "understanding"
_ROWS = 16
_DRAWN = 3


def catalogue(total: int = 256) -> list[Setting]:
    """Stock, and every method at every number of tokens that it can reach, of `total`."""
    settings: list[Setting] = [Stock()]
    for kept in KEPT:
        # The least ratio of four digits, as a record writes it, that removes so many.
        ratio = math.ceil(1e4 * (1 - round(kept * total) / total)) / 1e4
        percent, options = f"{kept:.0%}".rstrip("%"), {"ratio": ratio}
        if ratio <= 0.75:
            settings.append(Method(f"turbo-{percent}", "turbo", "turbo", options))
        settings.append(
            Method(f"turbo_vit-gate-{percent}", "turbo_vit, gate", "turbo_vit", options | {"place": "pre_llm"})
        )
        settings.append(Method(f"turbo_vit-tower-{percent}", "turbo_vit, tower", "turbo_vit", options))
        settings.append(Selecting(f"random-{percent}", "random", "random", options))
        settings += [
            Method(f"{method}-{percent}", method, method, options)
            for method in ("stride", "pool", "resize", "fastv", "visionzip", "divprune", "pyramiddrop", "vscan")
        ]
        adaptive = options | {"adaptive": True}
        settings.append(Method(f"divprune-adaptive-{percent}", "divprune, adaptive", "divprune", adaptive))
        settings.append(Method(f"vistog_vit-untrained-{percent}", "vistog_vit, untrained", "vistog_vit", options))
        settings += _chosen(percent, ratio)
    for energy in ENERGIES:
        settings.append(Method(f"eadaprune-{energy}", "eadaprune", "eadaprune", {"energy": energy}))
    return _apart([*settings, *_trained_groups(total), *par_settings()])


def _chosen(name: str, ratio: float) -> list[Setting]:
    """What keeps most in the tower without training, chosen on questions of the seeds 2000 to 2005."""
    own = {"ratio": ratio, "semantic": "self", "value_weight": 0.05}
    groups, weighed = {"ratio": ratio, "num_refinements": 3}, {"proportional_attention": True}
    settings: list[Setting] = [
        Method(f"turbo_vit-self-{name}", "turbo_vit, tower, self", "turbo_vit", own),
        Method(f"turbo_vit-weighed-{name}", "turbo_vit, tower, self, weighed", "turbo_vit", own | weighed),
        InTower(f"vistog-tower-{name}", "vistog, tower", "vistog", groups),
    ]
    if ratio > 0.8:
        # The last of four blocks has to remove more than half of its tokens.
        diverse = {"ratio": ratio, "semantic": "self", "beyond_half": "diverse"} | weighed
        settings.append(Method(f"turbo_vit-diverse-{name}", "turbo_vit, tower, diverse", "turbo_vit", diverse))
    return settings


def _apart(settings: Sequence[Setting]) -> list[Setting]:
    """The settings without those that do what one before them does under another name."""
    first: dict[str, Setting] = {}
    for setting in settings:
        first.setdefault(json.dumps(setting.params(), sort_keys=True), setting)
    return list(first.values())


def _trained_groups(total: int) -> list[Setting]:
    """VisToG with the weights that ship, and at the same numbers of tokens what it has to beat."""
    settings: list[Setting] = []
    for path in sorted((artefact_folder() / "vistog").glob("tiny-vlm-*.safetensors")):
        number = int(path.stem.rpartition("-")[2])
        ratio = math.ceil(1e4 * (1 - number / total)) / 1e4
        weights = {"weights": f"embedded:vistog/{path.stem}"}
        settings.append(Method(f"vistog_vit-{number}", "vistog_vit, trained", "vistog_vit", weights))
        settings += [
            Method(f"{name}-{number}", family, method, {"ratio": ratio})
            for name, family, method in (
                ("pool", "pool", "pool"),
                ("turbo_vit-tower", "turbo_vit, tower", "turbo_vit"),
                ("vistog", "vistog", "vistog"),
            )
        ]
        before = {"ratio": ratio, "place": "projector"}
        settings.append(Method(f"pool-projector-{number}", "pool, before the projector", "pool", before))
        settings.append(
            Method(f"vistog_vit-untrained-{number}", "vistog_vit, untrained", "vistog_vit", {"ratio": ratio})
        )
        adaptive = {"ratio": ratio, "adaptive": True}
        settings.append(Method(f"divprune-{number}", "divprune", "divprune", {"ratio": ratio}))
        settings.append(Method(f"divprune-adaptive-{number}", "divprune, adaptive", "divprune", adaptive))
        settings += _chosen(str(number), ratio)
    return settings


@torch.no_grad()
def answers(pipe: Any, asks: Sequence[Ask]) -> Iterator[str]:
    """Lets a caption pipeline generate greedily in batches; yields what its model says to each question."""
    for start in range(0, len(asks), _ROWS):
        part = asks[start : start + _ROWS]
        texts = [pipe.text_of(ask.question) for ask in part]
        inputs = pipe.preparer(images=[ask.image for ask in part], text=texts, padding=True, return_tensors="pt")
        output = pipe.vlm.generate(**inputs, max_new_tokens=pipe.config.max_new_tokens, do_sample=False)
        yield from pipe.preparer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def num_image_tokens(pipe: Any) -> int:
    """Patches of an image."""
    vision = pipe.vlm.config.vision_config
    return int(vision.image_size // vision.patch_size) ** 2


def accuracy(pipe: Any, asks: Sequence[Ask], setting: Setting) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Poses every question under one setting.

    Returns:
        For each kind, 1 or 0 for every question in order; the image tokens of an image, and how many of them the
        language model saw (FastV: from its layer on; others: mean over layers, PAR's with words), and what its
        layers cost, in thousandths of stock.
    """
    values: dict[str, list[float]] = {}
    # Captions are long and answers short: apart, no batch waits for its longest row.
    ordered = sorted(asks, key=lambda ask: ask.kind != "caption")
    with setting.applied(pipe.vlm):
        told = tqdm(answers(pipe, ordered), total=len(ordered), desc=setting.name, disable=None)
        for ask, said in zip(ordered, told, strict=True):
            values.setdefault(ask.kind, []).append(float(said == ask.answer))
        found = report(pipe.vlm)
    total = num_image_tokens(pipe)
    counts = {"image_tokens": total, "kept": round(mean_kept(found, total)), "cost": 1000}
    if any(row.stock_flops for row in found.layers):
        counts["cost"] = round(1000 * (1 - found.flops_saved))
    return {kind: values[kind] for kind in ("caption", *scenes.KINDS) if kind in values}, counts


def mean_kept(found: Report, total: int) -> float:
    """Image tokens of an image of `total` that the language model saw, mean over its layers by what they cost."""
    reduced = [row for row in found.layers if row.stock_flops]
    cost = sum(row.stock_flops for row in reduced)
    return total * sum(row.stock_flops * row.num_kept / row.num_tokens for row in reduced) / cost if cost else total


def timed(
    pipe: Any, asks: Sequence[Ask], setting: Setting, record: records.BenchRecord, rounds: int
) -> records.BenchRecord:
    """The record with CPU and wall seconds of one batch, of every kind of question, beside those of stock.

    Stock and the setting answer in turn and each begins every other round; the first round is not counted, and
    attaching is not timed.
    """
    batch = asks[:: max(1, len(asks) // _ROWS)][:_ROWS]
    seconds: dict[str, list[Timing]] = {"stock": [], setting.name: []}
    for number in range(rounds + 1):
        pair = [Stock(), setting]
        for each in pair[:: -1 if number % 2 else 1]:
            with each.applied(pipe.vlm):
                _, timing = clocked(lambda: list(answers(pipe, batch)))
            if number:
                seconds[each.name].append(timing)
    own, stock = seconds[setting.name], seconds["stock"]
    print(f"{setting.name}: {sum(t.cpu_s for t in stock) / sum(t.cpu_s for t in own):.2f} times faster", flush=True)
    return replace(
        record,
        cpu_s=[timing.cpu_s for timing in own],
        baseline_cpu_s=[timing.cpu_s for timing in stock],
        wall_s=[timing.wall_s for timing in own],
        baseline_wall_s=[timing.wall_s for timing in stock],
        origin=records.Origin.here(),
    )


def fingerprint(model: torch.nn.Module) -> str:
    """Twelve hexadecimal digits that change with any weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def run(options: argparse.Namespace) -> None:
    """Poses the questions under every selected setting that has no record yet.

    Raises:
        ValueError: If there is no model in the folder, or no setting of that name.
    """
    torch.set_num_threads(options.threads)
    settings = selected(catalogue(), options.settings)
    checkpoint = {"checkpoint": str(options.model)} if options.model else {}
    pipe = load_pipeline("caption", processor=None, device="cpu", dtype="float32", **checkpoint)
    asks = asked(options.images, options.seed, pipe.config.prompt)
    workload = {"weights": fingerprint(pipe.vlm), "images": options.images}
    for setting in settings:
        params = workload | setting.params()
        record = records.found(options.records, BENCH, setting.name, params, options.seed)
        rounds = 0 if isinstance(setting, Stock) else options.rounds
        if record is not None and (record.cpu_s or not rounds):
            print(f"{setting.name}: finished before")
            continue
        if record is None:
            values, counts = accuracy(pipe, asks, setting)
            record = records.BenchRecord(
                BENCH, setting.name, setting.family, params, options.seed, values=values, counts=counts
            )
            print(f"{setting.name}: {counts['kept']} tokens, " + ", ".join(_shares(values)), flush=True)
        records.append(options.records, timed(pipe, asks, setting, record, rounds) if rounds else record)
    if options.image is not None:
        from gen_turbo.bench.kept import draw_kept

        methods = [setting for setting in settings if isinstance(setting, Method) and setting.method != "par"]
        drawn = [setting for setting in methods if "tower" not in setting.family]
        draw_kept(pipe, [ask for ask in asks if ask.kind == "detail"][:_DRAWN], drawn, options.image)
        print(f"{options.image}: drawn")


def _shares(values: dict[str, list[float]]) -> list[str]:
    return [f"{kind} {sum(right) / len(right):.1%}" for kind, right in values.items()]
