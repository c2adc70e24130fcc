"""`gen-turbo calibrate par`: a vision-language model's router or a denoiser's schedule, from own outputs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gen_turbo.commands.calibrate_schedule import add_schedule_arguments, calibrate_schedule
from gen_turbo.config import CaptionConfig, ConfigError, PipelineConfig, load_config

_OBJECTIVES = ("preference", "reward", "divergence")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--config", default="caption", help="a pipeline: a name or a YAML file (caption)")
    parser.add_argument("--output", type=Path, help="the .safetensors or .yaml file (default: a name in runs/par)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts (0)")
    group = parser.add_argument_group("vision-language models")
    group.add_argument("--images", nargs="+", default=[], metavar="PATH", help="your images (default: rendered scenes)")
    group.add_argument("--ask", nargs="+", default=[], metavar="PROMPT", help="prompts for --images (default: none)")
    group.add_argument("--objective", choices=_OBJECTIVES, default="preference", help="what the router is trained on")
    group.add_argument("--tokens", type=float, default=0.4, help="share of image tokens kept in training (0.4)")
    group.add_argument(
        "--layers", type=int, default=0, help="decoder layers that run in training (default: 0, seven in eight)"
    )
    group.add_argument("--first", type=int, default=2, help="first layer without the dropped tokens (2)")
    group.add_argument("--samples", type=int, default=8, help="prunings of each prompt (8)")
    group.add_argument("--updates", type=int, default=300, help="steps of training (300)")
    group.add_argument("--batch", type=int, default=4, help="prompts of a step (4)")
    group.add_argument("--width", type=int, default=64, help="channels of the router; 0: the language model's (64)")
    group.add_argument("--depth", type=int, default=1, help="blocks of the router (1)")
    group.add_argument("--eval-batches", type=int, default=8, help="batches of other prompts to measure on (8)")
    group.add_argument("--causal", action="store_true", help="let the router's tokens see earlier ones only")
    group.add_argument("--folder", type=Path, help="checkpoints, also to continue from (default: none)")
    add_schedule_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the pipeline")
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> None:
    """Trains, measures and writes what PAR needs for a model.

    Raises:
        ValueError: If an argument, the model or the output does not fit.
    """
    steps = [] if namespace.steps is None else [("steps", namespace.steps)]
    config = load_config(namespace.config, [*namespace.overrides, *steps, ("processor", None)])
    if isinstance(config, PipelineConfig):
        calibrate_schedule(namespace, config)
        return
    if not isinstance(config, CaptionConfig):
        raise ConfigError(f"{namespace.config} has two halves; calibrate one by its own configuration")
    _calibrate_router(namespace, config)


def _calibrate_router(namespace: argparse.Namespace, config: CaptionConfig) -> None:
    from gen_turbo.output import check_writable
    from gen_turbo.training.calibrate_router import RouterCalibration, RouterSizes
    from gen_turbo.training.train_router import RouterTraining

    training = RouterTraining(
        objective=namespace.objective,
        tokens=namespace.tokens,
        layers=namespace.layers,
        first=namespace.first,
        samples=namespace.samples,
        steps=namespace.updates,
        seed=namespace.seed,
    )
    output = namespace.output or Path("runs/par/router.safetensors")
    check_writable(output.parent)
    pipe, prompts = _asked(namespace, config)
    sizes = RouterSizes(namespace.width, namespace.depth, "causal" if namespace.causal else "full")
    calibration = RouterCalibration(
        pipe.vlm, prompts, training, sizes, namespace.folder, config.max_new_tokens, namespace.eval_batches
    )
    artefact = _run(calibration, training.steps)
    artefact.notes["images"] = "own" if namespace.images else "rendered scenes"
    artefact.save(output)
    print(output)


def _asked(namespace: argparse.Namespace, config: CaptionConfig) -> tuple[Any, Any]:
    """The pipeline and its prompts by number."""
    if namespace.ask and not namespace.images:
        raise ConfigError("--ask gives prompts for --images; rendered scenes have their own")
    from gen_turbo.commands.asking import image_prompts, scene_prompts
    from gen_turbo.factory import build_pipeline, quiet_loading

    quiet_loading()
    pipe = build_pipeline(config)
    if namespace.images:
        return pipe, image_prompts(pipe, namespace.images, namespace.ask, namespace.batch, namespace.seed)
    return pipe, scene_prompts(pipe, namespace.batch, namespace.seed)


def _run(calibration: Any, steps: int) -> Any:
    """Calibrates behind a progress bar; what is measured is printed."""
    from tqdm import tqdm

    with tqdm(total=steps, initial=calibration.trainer.step, desc="router", disable=None) as bar:

        def on_step(step: int, loss: float, divergence: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", kl=f"{divergence:.4f}")
            bar.update()
            if bar.disable and step % 25 == 0:
                print(f"step {step} loss {loss:.4f} kl {divergence:.4f}", flush=True)

        return calibration.run(on_step, tqdm.write)
