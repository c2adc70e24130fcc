"""`gen-turbo calibrate vistog`: images and questions in, learned weights of VisToG out."""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_turbo.config import CaptionConfig, ConfigError, load_config_of
from gen_turbo.schemas import check_count

if TYPE_CHECKING:
    from PIL import Image

    from gen_turbo.training.train_vistog import Batches, VisToGTrainer
    from gen_turbo.training.vistog_training import VisToGTraining

Examples = Callable[[random.Random, int], "list[tuple[Image.Image, str | None]]"]
"""Draws that many images with a question about each; None takes the configuration's prompt."""
_LEAST_HELD_OUT, _HELD_OUT_SHARE = 20, 10
_JUDGED = 6
_CAPTION_SHARE, _PAIR_SHARE = 0.2, 0.5
# Colours and shapes are learned within a few hundred steps; what is small or has a place takes thousands.
_QUESTION_WEIGHT = {"detail": 10, "position": 8, "relation": 3, "count": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--config", default="caption", help="a captioning pipeline: a name or a YAML file (caption)")
    parser.add_argument("--num-tokens", type=int, required=True, help="image tokens that the language model will read")
    parser.add_argument("--images", nargs="+", metavar="PATH", help="files, folders, patterns (default: drawn scenes)")
    parser.add_argument("--questions", type=Path, help="a text file, one question a line (default: the prompt)")
    parser.add_argument(
        "--output", type=Path, help="folder; a run with the same one continues (default: runs/vistog-NUM_TOKENS)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        nargs=2,
        default=(600, 200),
        metavar=("ALIGN", "TUNE"),
        help="steps that align with stock, and steps that tune on answers",
    )
    parser.add_argument(
        "--lr", type=float, nargs=2, default=(1e-3, 2e-4), metavar=("ALIGN", "TUNE"), help="learning rates of both"
    )
    parser.add_argument("--batch", type=int, default=16, help="images a step (16)")
    parser.add_argument(
        "--hard-negatives",
        type=int,
        default=1,
        metavar="N",
        help="N questions are drawn for each one that is learned from, which is the hardest of them (1)",
    )
    parser.add_argument("--first-block", type=int, default=0, help="where the semantic tokens enter the tower (0)")
    parser.add_argument("--lora-rank", type=int, default=0, help="of the language model's adapter (default: 0, none)")
    parser.add_argument("--no-connector", action="store_true", help="do not train the projector")
    parser.add_argument("--start", help="weights to begin from, of as many tokens (default: random)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and questions (0)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the pipeline")
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> None:
    """Trains, or goes on training, and prints the file of weights.

    Raises:
        ValueError: If an image, a question or a setting does not fit; nothing was changed then.
    """
    if min(namespace.batch, namespace.hard_negatives) < 1:
        raise ConfigError(
            f"--batch and --hard-negatives count from 1; got {namespace.batch} and {namespace.hard_negatives}"
        )
    check_count("--num-tokens", namespace.num_tokens)
    overrides = [*namespace.overrides, ("dtype", "float32"), ("processor", None)]
    config = load_config_of(CaptionConfig, "gen-turbo calibrate vistog", namespace.config, overrides)
    examples, held_out, data = _data(namespace)
    from gen_turbo.factory import build_pipeline
    from gen_turbo.training.vistog_training import VisToGTraining

    settings = VisToGTraining(
        align_steps=namespace.steps[0],
        tune_steps=namespace.steps[1],
        align_rate=namespace.lr[0],
        tune_rate=namespace.lr[1],
        has_connector=not namespace.no_connector,
        lora_rank=namespace.lora_rank,
        max_new_tokens=config.max_new_tokens,
        num_drawn=namespace.hard_negatives,
        seed=namespace.seed,
    )
    folder = namespace.output or Path(f"runs/vistog-{namespace.num_tokens}")
    pipe = build_pipeline(config, None)
    drawn = _batches(pipe, examples, namespace.batch * namespace.hard_negatives, namespace.seed)
    trainer = _trainer(pipe, namespace, settings, drawn, folder)
    judged = _batches(pipe, held_out, namespace.batch, namespace.seed + 1)
    before = _first_divergence(trainer, judged, folder)
    notes = {"data": data, "batch": str(namespace.batch), "untrained": f"{before:.5f}"}
    path = trainer.run(notes | ({"start": Path(namespace.start).name} if namespace.start else {}))
    print(f"divergence from the full model on {_JUDGED * namespace.batch} held-out questions, nats a word: ", end="")
    print(f"{before:.4f} untrained, {trainer.divergence(judged, _JUDGED):.4f} trained")
    print(path)


def _trainer(
    pipe: Any, namespace: argparse.Namespace, settings: VisToGTraining, batches: Batches, folder: Path
) -> VisToGTrainer:
    from gen_turbo.api import attach
    from gen_turbo.methods.vistog_vit import VisToGVisionProcessor
    from gen_turbo.training.files import artefact_path
    from gen_turbo.training.train_vistog import VisToGTrainer
    from gen_turbo.training.vistog import VisToGArtefact
    from gen_turbo.vlm.attachment import VlmPart

    processor = VisToGVisionProcessor(num_tokens=namespace.num_tokens, first_block=namespace.first_block)
    part = attach(pipe, processor).parts[0]
    assert isinstance(part, VlmPart)
    start = VisToGArtefact.load(artefact_path(namespace.start)) if namespace.start else None
    return VisToGTrainer(part, batches, settings, folder, start)


def _first_divergence(trainer: VisToGTrainer, judged: Batches, folder: Path) -> float:
    """The divergence before training, noted in the folder for runs that go on."""
    path = folder / "untrained.json"
    if trainer.step and path.is_file():
        return float(json.loads(path.read_text()))
    value = trainer.divergence(judged, _JUDGED)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return value


def _batches(pipe: Any, examples: Examples, size: int, seed: int) -> Batches:
    """Prepares the examples of a step as the pipeline does; the same step has the same examples."""

    def batch(index: int) -> Any:
        drawn = examples(random.Random(f"{seed} {index}"), size)
        texts = [pipe.text_of(pipe.config.prompt if question is None else question) for _, question in drawn]
        inputs = pipe.preparer(images=[one for one, _ in drawn], text=texts, return_tensors="pt", padding=True)
        return dict(inputs.to(pipe.device))

    return batch


def _data(namespace: argparse.Namespace) -> tuple[Examples, Examples, str]:
    """Examples to train on, examples to judge by, and a hash of what they are drawn from."""
    if namespace.images is None:
        if namespace.questions is not None:
            raise ConfigError("--questions are about --images; name images too")
        return _scenes(False), _scenes(True), "scenes"
    from gen_turbo.inputs import find_images

    paths = find_images(namespace.images)
    if len(paths) < _LEAST_HELD_OUT:
        raise ConfigError(f"{len(paths)} images are too few to train on; give at least {_LEAST_HELD_OUT}")
    questions = _questions(namespace.questions)
    digest = hashlib.sha256(json.dumps([[str(path) for path in paths], questions]).encode()).hexdigest()[:12]
    held_out = paths[::_HELD_OUT_SHARE]
    train = [path for path in paths if path not in set(held_out)]
    return _files(train, questions), _files(held_out, questions), digest


def _questions(path: Path | None) -> list[str | None]:
    if path is None:
        return [None]
    lines = path.read_text(encoding="utf-8").split("\n")
    questions: list[str | None] = [line.removesuffix("\r") for line in lines if line.strip()]
    if not questions:
        raise ConfigError(f"{path} holds no question; write one a line")
    return questions


def _files(paths: Sequence[Path], questions: Sequence[str | None]) -> Examples:
    from gen_turbo.commands.asking import any_image

    draw = any_image(paths)
    return lambda rng, count: [(draw(rng), rng.choice(questions)) for _ in range(count)]


def _scenes(held_out: bool) -> Examples:
    """Drawn scenes with one or two objects and often a dot; a batch has captions, or questions of all kinds."""
    from gen_turbo.scenes import COLORS, all_pairs, all_scenes, is_held_out, questions, render

    pools = [
        [scene.caption for scene in pool if is_held_out(scene) == held_out] for pool in (all_scenes(), all_pairs())
    ]

    def example(rng: random.Random, is_captioned: bool) -> tuple[Image.Image, str | None]:
        caption = rng.choice(pools[rng.random() < _PAIR_SHARE])
        look, dot = rng.randrange(2**31), rng.choice([None, *COLORS, *COLORS])
        asked = questions(caption, look, dot)
        question = rng.choices(asked, [_QUESTION_WEIGHT.get(one.kind, 1) for one in asked])[0].question
        return render(caption, look, dot), None if is_captioned else question

    def drawn(rng: random.Random, count: int) -> list[tuple[Image.Image, str | None]]:
        # Captions are long and answers short: apart, no answer waits for a caption.
        is_captioned = rng.random() < _CAPTION_SHARE
        return [example(rng, is_captioned) for _ in range(count)]

    return drawn
