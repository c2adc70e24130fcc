"""`gen-turbo calibrate par` for vision-language models: trains PAR's router on the model's own answers."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from gen_turbo.bench.asking import picture_prompts, scene_prompts
from gen_turbo.config import CaptionConfig, ConfigError
from gen_turbo.factory import build_pipeline, quiet_loading
from gen_turbo.learned.calibrate_router import RouterCalibration, RouterSizes
from gen_turbo.learned.train_router import OBJECTIVES, RouterTraining
from gen_turbo.output import check_writable

_DEFAULT = RouterTraining()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that concern routers of vision-language models."""
    group = parser.add_argument_group("vision-language models")
    group.add_argument("--images", nargs="*", default=[], help="pictures to train on; rendered scenes by default")
    group.add_argument("--ask", nargs="*", default=[], metavar="PROMPT", help="prompts for --images")
    group.add_argument("--objective", choices=OBJECTIVES, default=_DEFAULT.objective)
    group.add_argument("--tokens", type=float, default=_DEFAULT.tokens, help="share of image tokens kept in training")
    group.add_argument("--layers", type=int, default=0, help="decoder layers that run in training (seven in eight)")
    group.add_argument("--first", type=int, default=_DEFAULT.first, help="first layer without the dropped tokens (2)")
    group.add_argument("--samples", type=int, default=_DEFAULT.samples, help="prunings of each prompt (8)")
    group.add_argument("--updates", type=int, default=_DEFAULT.steps, help="steps of training (300)")
    group.add_argument("--batch", type=int, default=4, help="prompts of a step (4)")
    group.add_argument("--width", type=int, default=64, help="channels of the router; 0 for the language model's (64)")
    group.add_argument("--depth", type=int, default=1, help="blocks of the router (1)")
    group.add_argument("--causal", action="store_true", help="let the router's tokens see earlier ones only")
    group.add_argument("--folder", type=Path, help="keep checkpoints here, and go on from them")


def run(namespace: argparse.Namespace, config: CaptionConfig) -> None:
    """Trains, measures and writes the router.

    Raises:
        ValueError: If an argument, the model or the output does not fit.
    """
    training = RouterTraining(
        objective=namespace.objective,
        tokens=namespace.tokens,
        layers=namespace.layers,
        first=namespace.first,
        samples=namespace.samples,
        steps=namespace.updates,
        seed=namespace.seed,
    )
    if namespace.ask and not namespace.images:
        raise ConfigError("--ask gives prompts for --images; rendered scenes have their own")
    output = Path(namespace.output)
    check_writable(output.parent)
    quiet_loading()
    pipe = build_pipeline(config)
    if namespace.images:
        prompts = picture_prompts(pipe, namespace.images, namespace.ask, namespace.batch, namespace.seed)
    else:
        prompts = scene_prompts(pipe, namespace.batch, namespace.seed)
    sizes = RouterSizes(namespace.width, namespace.depth, "causal" if namespace.causal else "full")
    calibration = RouterCalibration(pipe.vlm, prompts, training, sizes, namespace.folder, config.max_new_tokens)
    with tqdm(total=training.steps, initial=calibration.trainer.step, desc="router", disable=None) as bar:

        def on_step(step: int, loss: float, divergence: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", kl=f"{divergence:.4f}")
            bar.update()
            if step % 25 == 0:
                tqdm.write(f"step {step} loss {loss:.4f} kl {divergence:.4f}")

        with torch.inference_mode(False):
            artefact = calibration.run(on_step, tqdm.write)
    artefact.notes["pictures"] = "own" if namespace.images else "rendered scenes"
    artefact.save(output)
    print(output)
