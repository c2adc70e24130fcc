"""`gen-turbo tune`: the settings of a method that reach a target on the user's own pipeline and device."""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from gen_turbo.config import ConfigError, PipelineConfig, load_config_of

_TARGET = re.compile(r"(speedup|psnr|check)>=(\d+(?:\.\d+)?)")
_MOST_DB = 100.0
RATIOS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
SCOPES = ("attention", "block")
EVERY = (2, 3, 5, 8)
_COPIED = len(EVERY)
_FIRST = (
    {"scope": 0, "ratio": 2, "level": 0, "every": 1},
    {"scope": 1, "ratio": 5, "level": 0, "every": 2},
    {"scope": 0, "ratio": 5, "level": 0, "every": _COPIED},
    {"scope": 1, "ratio": 5, "level": 0, "every": _COPIED},
)
"""What is tried before the search: each scope, corrected and copied; places in the lists above.

Copying is no longer rhythm of correcting: on one model it keeps more at more speed, on another it ruins images.
"""


@dataclass(frozen=True)
class Target:
    """What must be reached: `speedup>=2`, `psnr>=35` or `check>=0.98`.

    Attributes:
        name: "speedup", "psnr" or "check".
        least: Its least value.
    """

    name: str
    least: float

    @classmethod
    def of(cls, text: str) -> Target:
        """Reads the text of the command line; raises ConfigError."""
        found = _TARGET.fullmatch(text.replace(" ", ""))
        if found is None:
            raise ConfigError(
                f"--target must be speedup>=2, psnr>=35 or check>=0.98, with a number of yours; got {text!r}"
            )
        return cls(found[1], float(found[2]))

    def goodness(self, measured: Mapping[str, float]) -> float:
        """What the search raises: the other of speed and fidelity where the target is met, else how near it is."""
        missing = 1 - measured[self.name] / self.least
        if missing > 0:
            return -missing
        return measured["psnr"] / _MOST_DB if self.name == "speedup" else measured["speedup"]


Measure = Callable[[Mapping[str, Any]], dict[str, float]]
"""From settings to speedup, psnr and check."""


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--config", default="tiny", help="a pipeline: a name or a YAML file (tiny)")
    parser.add_argument("--target", required=True, help="speedup>=2, psnr>=35 or check>=0.98 (check: embedded models)")
    parser.add_argument("--prompt", action="append", default=[], help="own prompts (default: captions of scenes)")
    parser.add_argument("--images", type=int, default=2, help="images of each trial without --prompt (2)")
    parser.add_argument("--trials", type=int, default=12, help="settings to try, with those of an earlier call (12)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--counted", action="store_true", help="count FLOPs instead of timing, for busy machines")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/tune/tuned.yaml"),
        help="a YAML file of the best settings (runs/tune/tuned.yaml)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the pipeline")
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> None:
    """Searches, or goes on with a search, and writes the best settings.

    Raises:
        ValueError: If an argument, the pipeline or the output does not fit, or no trial reached the target.
        ImportError: If the extra is not installed.
    """
    target = Target.of(namespace.target)
    config = load_config_of(
        PipelineConfig, "gen-turbo tune", namespace.config, [*namespace.overrides, ("processor", None)]
    )
    if min(namespace.trials, namespace.images) < 1:
        raise ConfigError("--trials and --images must be at least 1")
    if target.name == "check" and namespace.prompt:
        raise ConfigError(
            "check compares rendered scenes with their captions and cannot be used with --prompt; use psnr"
        )
    from gen_turbo.output import check_writable

    check_writable(namespace.output.parent)
    measure, levels = _on_pipeline(namespace, config)
    name = f"{namespace.config} {config.steps} steps {target.name}>={target.least:g} seed {namespace.seed}"
    best = search(measure, target, levels, namespace.trials, namespace.output.with_suffix(".db"), name, namespace.seed)
    _write(namespace.output, namespace.config, target, *best)


def search(
    measure: Measure, target: Target, levels: list[int], trials: int, storage: Path, name: str, seed: int
) -> tuple[dict[str, Any], dict[str, float]]:
    """Tries settings, those first of which the next are most likely better; each is kept in a file as it is done.

    Args:
        measure: Measures settings.
        target: What to reach.
        levels: Downsample factors of the model's attention.
        trials: How many settings in all, those of earlier calls with this file and name counted.
        storage: An SQLite file.
        name: Of the study in it.
        seed: Of the search.

    Returns:
        The best settings and what was measured of them.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError("gen-turbo tune needs Optuna; run: pip install 'gen_turbo[tune]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sizes = {"scope": len(SCOPES), "ratio": len(RATIOS), "level": len(levels), "every": _COPIED + 1}
    with _opened(optuna, storage) as kept:
        study = optuna.create_study(
            storage=kept,
            study_name=name,
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=len(_FIRST)),
            load_if_exists=True,
        )

        def tried(trial: Any) -> float:
            measured = measure(
                _settings({key: trial.suggest_int(key, 0, size - 1) for key, size in sizes.items()}, levels)
            )
            for key, value in measured.items():
                trial.set_user_attr(key, value)
            return target.goodness(measured)

        done = [trial.params for trial in study.trials if trial.state.is_finished() and trial.user_attrs]
        with tqdm(total=trials, initial=min(len(done), trials), desc=f"tune, {target.name}>={target.least:g}") as bar:
            while len(done) < trials:
                study.enqueue_trial(_next(done, study, target, sizes), skip_if_exists=True)
                study.optimize(tried, n_trials=1)
                done.append(study.trials[-1].params)
                bar.update()
        best = study.best_trial
        return _settings(best.params, levels), dict(best.user_attrs)


@contextmanager
def _opened(optuna: Any, file: Path) -> Iterator[Any]:
    """Optuna's storage in a file, with its connections closed behind."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{file}")
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _next(done: list[dict[str, int]], study: Any, target: Target, sizes: Mapping[str, int]) -> dict[str, int]:
    """A first guess, or the best so far with one setting changed; nothing behind those, where Optuna proposes."""
    if len(done) < len(_FIRST):
        return _FIRST[len(done)]
    best = study.best_trial
    is_met = best.user_attrs[target.name] >= target.least
    # Faster where fidelity is to spare, nearer to stock where speed is.
    is_faster = is_met != (target.name == "speedup")
    for sign in (1, -1) if is_faster else (-1, 1):
        for found in _beside(best.params, sign, sizes):
            if found not in done:
                return found
    return {}


def _beside(places: dict[str, int], sign: int, sizes: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """One setting changed, to what is faster (1) or nearer to stock (-1); copied and corrected are one step apart."""
    is_copied = places["every"] == _COPIED
    for key in ("every", "ratio", "scope", "restore", "level"):
        if key == "restore":
            if is_copied == (sign < 0):
                yield {**places, "every": _FIRST[1]["every"] if is_copied else _COPIED}
        elif key != "every" or not is_copied:
            place = places[key] + sign
            if 0 <= place < (_COPIED if key == "every" else sizes[key]):
                yield {**places, key: place}


def _settings(places: Mapping[str, int], levels: list[int]) -> dict[str, Any]:
    chosen = {
        "method": "turbo",
        "scope": SCOPES[places["scope"]],
        "ratio": RATIOS[places["ratio"]],
        "max_downsample": levels[places["level"]],
    }
    if places["every"] == _COPIED:
        return chosen | {"restore": "copy"}
    return chosen | {"restore": "residual", "full_every": EVERY[places["every"]]}


def _on_pipeline(namespace: argparse.Namespace, config: PipelineConfig) -> tuple[Measure, list[int]]:
    """What measures settings on the pipeline of a configuration, stock and own image in turn; and its levels."""
    from gen_turbo import scenes
    from gen_turbo.api import adapter_of, attach, denoiser
    from gen_turbo.bench.arithmetic import counted
    from gen_turbo.commands.generate import Job, compare, draw, warm_up
    from gen_turbo.factory import build_pipeline, build_processor, quiet_loading

    quiet_loading()
    pipe = build_pipeline(config)
    prompts = namespace.prompt or scenes.captions(namespace.images, namespace.seed)
    jobs = [Job(prompt, namespace.seed + number) for number, prompt in enumerate(prompts)]
    model = denoiser(pipe)
    adapter: Any = adapter_of(model)
    levels = sorted({spec.downsample for spec in adapter.layers(model) if not spec.left_alone})[:2]
    stock_flops = counted(lambda: draw(pipe, config, jobs[0], "counting"))[1] if namespace.counted else 0
    is_warm = [bool(namespace.counted)]

    def measure(settings: Mapping[str, Any]) -> dict[str, float]:
        processor: Any = build_processor(dict(settings))
        if not is_warm[0]:
            warm_up(pipe, config, processor, jobs[0])
            is_warm[0] = True
        done = [compare(pipe, config, processor, job, "tune") for job in jobs]
        speedup = statistics.median(one.stock_s / one.image_s for one in done)
        if namespace.counted:
            with attach(pipe, processor):
                speedup = stock_flops / counted(lambda: draw(pipe, config, jobs[0], "counting"))[1]
        shown = [scenes.check(one.image, one.job.prompt).passed for one in done] if not namespace.prompt else []
        return {
            "speedup": speedup,
            "psnr": min(_MOST_DB, statistics.median(one.psnr_db for one in done)),
            "check": statistics.fmean(shown) if shown else 0.0,
        }

    return measure, levels


def _write(path: Path, config: str, target: Target, settings: dict[str, Any], measured: dict[str, float]) -> None:
    figures = f"{measured['speedup']:.2f} times as fast as stock at {measured['psnr']:.1f} dB"
    if measured["check"]:
        figures += f", {measured['check']:.0%} of the images show their caption"
    if measured[target.name] < target.least:
        raise ConfigError(
            f"no trial reached {target.name}>={target.least:g}; the nearest was {figures}, with {settings}; raise "
            "--trials or lower the target"
        )
    path.write_text(f"# Tuned for {config}, {target.name}>={target.least:g}: {figures}.\n{yaml.safe_dump(settings)}")
    print(f"{figures}\n{path}")
    loading = f"load_pipeline({config!r}, processor={str(path)!r})"
    print(f"use it by {loading}, or by pipe.set_attn_processor(build_processor({str(path)!r}))")
