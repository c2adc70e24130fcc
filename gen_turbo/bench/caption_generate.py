"""`gen-turbo bench caption-generate`: images drawn anew from their captions, stock and accelerated in turn.

Each image adds one line to the work folder, so a run that was interrupted goes on with the image it was at.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from gen_turbo import scenes
from gen_turbo.bench import records
from gen_turbo.bench.timing import clocked
from gen_turbo.config import CaptionGenerateConfig, load_config_of
from gen_turbo.factory import build_pipeline, processors_of
from gen_turbo.lines import digest_of

BENCH = "caption-generate"
SETTINGS = ("stock", "accelerated")
Trial = dict[str, dict[str, float]]
"""What one image gave, by setting."""


def run(options: argparse.Namespace) -> None:
    """Measures the images of this process's part that the work folder lacks; records where all are there.

    Raises:
        ValueError: If the pipeline is of another kind, or neither half has a processor.
    """
    torch.set_num_threads(options.threads)
    config = load_config_of(CaptionGenerateConfig, f"gen-turbo bench {BENCH}", options.pipeline)
    processors = processors_of(config)
    if not any(processors.values()):
        raise ValueError(f"{options.pipeline} has no processor in either half; there is nothing to compare with stock")
    params = {
        "pipeline": Path(options.pipeline).name,
        "images": options.images,
        "objects": options.objects,
        "processors": {half: repr(processor) for half, processor in processors.items()},
        "steps": config.generate.steps,
    }
    if all(records.is_finished(options.records, BENCH, setting, params, options.seed) for setting in SETTINGS):
        print(f"{BENCH}: finished before")
        return
    path = options.work / BENCH / f"{digest_of([params, options.seed])}.jsonl"
    captions = scenes.captions(options.images, options.seed, options.objects)
    trials = _read(path)
    part, parts = options.part
    missing = [i for i in range(part - 1, len(captions), parts) if i not in trials]
    if missing:
        pipe = build_pipeline(config)
        pipe.generate.set_progress_bar_config(disable=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        pipe(_source(captions, 0, options.seed), num_inference_steps=2)
    for index in tqdm(missing, desc=BENCH):
        trial = _measure(pipe, processors, captions, index, options.seed)
        with path.open("ab", buffering=0) as file:
            file.write((json.dumps({"index": index, **trial}) + "\n").encode())
    trials = _read(path)
    if len(trials) < len(captions):
        print(f"{BENCH}: {len(trials)} of {len(captions)} images done; another part has the rest")
        return
    for setting in SETTINGS:
        records.append(
            options.records, _record(setting, [trials[i] for i in range(len(captions))], params, options.seed)
        )


def _source(captions: Sequence[str], index: int, seed: int) -> Image.Image:
    return scenes.render(captions[index], seed + index)


def _measure(pipe: Any, processors: dict[str, Any], captions: Sequence[str], index: int, seed: int) -> Trial:
    """Goes the whole way from one image under both settings, first one, then the other; the order alternates."""
    image, trial = _source(captions, index, seed), {}
    for setting in SETTINGS[:: 1 if index % 2 == 0 else -1]:
        pipe.set_attn_processor(None if setting == "stock" else processors)
        made, time = clocked(lambda: pipe(image, seeds=seed + index))
        trial[setting] = {
            "cpu_s": time.cpu_s,
            "wall_s": time.wall_s,
            "captioned": float(made.captions[0] == _told(captions[index])),
            "passed": float(scenes.check(made.images[0], captions[index]).passed),
            "tokens": made.num_tokens,
            "kept": made.num_kept,
            "drawn_tokens": made.drawn_tokens,
            "drawn_kept": made.drawn_kept,
        }
    return trial


def _told(caption: str) -> str:
    """The sentence that a captioner should say: of two objects' sentences the one it was taught."""
    scene = scenes.parse(caption)
    return scene.canonical.caption if isinstance(scene, scenes.Pair) else caption


def _read(path: Path) -> dict[int, Trial]:
    trials: dict[int, Trial] = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            line: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError:
            # The last line of a run that was killed while writing.
            continue
        trials[line.pop("index")] = line
    return trials


def _record(setting: str, trials: Sequence[Trial], params: dict[str, Any], seed: int) -> records.BenchRecord:
    def column(name: str, of: str = setting) -> list[float]:
        return [trial[of][name] for trial in trials]

    return records.BenchRecord(
        bench=BENCH,
        setting=setting,
        family=setting,
        params=params,
        cpu_s=column("cpu_s"),
        baseline_cpu_s=column("cpu_s", "stock"),
        wall_s=column("wall_s"),
        baseline_wall_s=column("wall_s", "stock"),
        values={name: column(name) for name in ("captioned", "passed")},
        counts={name: int(column(name)[0]) for name in ("tokens", "kept", "drawn_tokens", "drawn_kept")},
        seed=seed,
    )
