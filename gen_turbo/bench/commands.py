"""`gen-turbo bench ...`: the arguments of each benchmark, and the way from its name to its module."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

BENCHES = {
    "primitives": "merge and unmerge against the package tomesd",
    "layer": "one attention layer, matching included",
    "host": "what a reduced attention call costs on the host beside the stock one, attention itself left out",
    "step": "denoising steps of the UNets of Stable Diffusion 1.5 and XL and of Flux, random weights",
    "quality": "distance to stock against measured and counted cost, on the embedded model",
    "flops": "counted arithmetic of whole denoisers of real size against the least that merging can reach",
    "choices": "what the user's one line chooses on published configurations, and the gain that it expects",
    "cpu": "the user's one line beside stock on a CPU, at published widths and numbers of tokens",
    "check": "how many images show what their caption says",
    "understanding": "answers of the embedded vision-language model, by kind, with ever fewer tokens",
    "gpu": "whole denoisers and LLaVA-1.5 on a GPU, eager, captured and compiled, beside stock",
    "vlm-step": "reading an image with a LLaVA-1.5 of real widths, few layers and random weights",
    "batch": "images a minute of gen-turbo batch, in one process and with workers of Ray",
    "caption-generate": "images drawn anew from their captions: how many still show the scene, and times",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds one subcommand for each benchmark."""
    subparsers = parser.add_subparsers(dest="bench", required=True, metavar="BENCH")
    children = {name: subparsers.add_parser(name, help=text, description=text) for name, text in BENCHES.items()}
    for child in children.values():
        child.add_argument("--records", type=Path, default=Path("runs/bench/records"), help="folder of the records")
        child.add_argument("--seed", type=int, default=0, help="of weights and noise")
        child.add_argument("--threads", type=_positive, default=1, help="threads that torch may use")
    for name in ("primitives", "layer"):
        children[name].add_argument("--side", type=_positive, default=64, help="tokens along each side of the grid")
        children[name].add_argument("--width", type=_positive, default=320, help="channels of a token")
    rounds = {"primitives": 30, "layer": 7, "host": 100, "step": 3, "vlm-step": 3, "cpu": 3}
    for name, most in rounds.items():
        children[name].add_argument("--rounds", type=_positive, default=most, help="alternating timed rounds")
    for name in ("step", "quality", "check", "understanding", "vlm-step", "gpu"):
        children[name].add_argument(
            "--settings", nargs="*", default=[], metavar="PATTERN", help="names or shell patterns (default: all)"
        )
    children["cpu"].add_argument(
        "--models", nargs="*", default=[], metavar="PATTERN", help="of bench gpu (default: all)"
    )
    children["flops"].add_argument("--models", nargs="*", default=[], help="denoisers by name (default: all)")
    children["flops"].add_argument(
        "--pixels", nargs="*", type=_positive, default=[], help="sides of the images (default: each model's own)"
    )
    _add_step_arguments(children["step"])
    _add_vlm_step_arguments(children["vlm-step"])
    _add_gpu_arguments(children["gpu"])
    _add_caption_generate_arguments(children["caption-generate"])
    _add_batch_arguments(children["batch"])
    for name, captions in (("quality", 50), ("check", 200)):
        _add_image_arguments(children[name], captions)
    children["quality"].add_argument(
        "--timed", type=_whole, default=10, help="captions, from the first, timed against stock; 0 counts FLOPs instead"
    )
    understanding = children["understanding"]
    understanding.add_argument(
        "--images", type=_positive, default=100, help="held-out scenes, six or so questions each"
    )
    understanding.add_argument("--rounds", type=_positive, default=0, help="rounds timed beside stock (default: none)")
    understanding.add_argument("--image", type=Path, help="image of the tokens kept (default: not drawn)")
    understanding.add_argument("--model", type=Path, help="folder of a trained model (default: the embedded one)")
    text = "rewrite the tables of Markdown pages from the records"
    _add_readme_arguments(subparsers.add_parser("readme", help=text, description=text))


def run(namespace: argparse.Namespace) -> None:
    """Runs the benchmark that the arguments name.

    Raises:
        ValueError: If an argument does not fit; the message says which.
        ImportError: If the benchmark needs a package of an extra; the message names it.
    """
    import_module(f"gen_turbo.bench.{namespace.bench.replace('-', '_')}").run(namespace)


def _add_step_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", choices=("sd15", "sdxl", "flux"), default="sd15", help="the published configuration")
    parser.add_argument("--blocks", type=_positive, help="the most equal blocks of each kind (default: all)")
    parser.add_argument("--latents", type=_positive, default=64, help="side of the latent image")
    parser.add_argument("--width-scale", type=float, default=1.0, help="factor on all widths of the model")
    parser.add_argument("--steps", type=_positive, default=5, help="consecutive steps of one run")


def _add_vlm_step_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=_positive, default=2, help="decoder layers")
    parser.add_argument("--tower-layers", type=_positive, default=24, help="blocks of the vision tower")
    parser.add_argument("--width-scale", type=float, default=1.0, help="factor on all widths")
    parser.add_argument("--new-tokens", type=_positive, default=32, help="tokens to generate")
    text = "time the prompts of so many images in bfloat16, without a cache, instead (default: one image, by phase)"
    parser.add_argument("--batch", type=_positive, help=text)
    text = "count operators of a call instead, at batch 1, 8 and 16, with all layers at the smallest width"
    parser.add_argument("--operators", action="store_true", help=text)


def _add_gpu_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--minutes", type=float, default=8.0, help="when to stop; the same command goes on later")
    parser.add_argument(
        "--models",
        nargs="*",
        default=[],
        metavar="PATTERN",
        help="names such as sd15-1024, flux or llava* (default: all)",
    )
    parser.add_argument(
        "--model",
        metavar="NAME_OR_PATH",
        help="your own model instead (default: published configurations)",
    )
    parser.add_argument("--pixels", type=_positive, help="side of your own model's images (default: its own)")
    modes = ("eager", "captured", "compiled", "compiled + captured")
    parser.add_argument(
        "--modes", nargs="*", default=[], choices=modes, metavar="MODE", help=f"of {', '.join(modes)} (default: all)"
    )
    parser.add_argument("--steps", type=_steps, default=10, help="of a timed run, at least 3")
    parser.add_argument("--rounds", type=_positive, help="alternating timed rounds (default: 2 or 3)")


def _add_caption_generate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pipeline", default="caption-generate", help="name or YAML of such a pipeline")
    parser.add_argument("--images", type=_positive, default=50, help="held-out scenes")
    parser.add_argument("--objects", type=int, choices=(1, 2), default=1, help="objects in every scene")
    parser.add_argument(
        "--part", type=_part, default=(1, 1), metavar="I/N", help="every N-th image, from the I-th (default: 1/1, all)"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/bench/work"), help="folder of unfinished runs")


def _add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pipeline", default="tiny", help="name or YAML of a text-to-image pipeline")
    parser.add_argument("--items", type=_positive, default=16, help="images of a run")
    parser.add_argument("--steps", type=_positive, default=4, help="denoising steps of an image")
    parser.add_argument("--workers", type=_positive, nargs="*", default=[1, 2], help="numbers of workers of Ray")
    parser.add_argument("--rounds", type=_positive, default=3, help="alternating timed rounds")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda, which the workers share")


def _add_image_arguments(parser: argparse.ArgumentParser, captions: int) -> None:
    parser.add_argument("--pipeline", default="tiny", help="name, YAML or folder of a text-to-image pipeline")
    parser.add_argument("--captions", type=_positive, default=captions, help="images to generate")
    parser.add_argument("--steps", type=_positive, default=25, help="denoising steps of stock")
    parser.add_argument("--guidance", type=float, default=3.0, help="scale of classifier-free guidance")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda or cuda:1, in float32 without TF32")
    parser.add_argument("--pixels", type=_positive, help="side of the images (default: the pipeline's own)")
    parser.add_argument(
        "--part",
        type=_part,
        default=(1, 1),
        metavar="I/N",
        help="every N-th caption, from the I-th (default: 1/1); the command without it records all parts",
    )
    parser.add_argument("--work", type=Path, default=Path("runs/bench/work"), help="folder of unfinished settings")


def _add_readme_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="Markdown pages, or folders of them, with table markers"
    )
    parser.add_argument("--records", type=Path, default=Path("gen_turbo/bench/records"), help="folder of the records")
    parser.add_argument("--plots", type=Path, help="folder to draw the plots in (default: not drawn)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def _whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def _steps(text: str) -> int:
    number = int(text)
    if number < 3:
        raise argparse.ArgumentTypeError(f"{text} steps are too few: two full steps come first")
    return number


def _part(text: str) -> tuple[int, int]:
    first, _, second = text.partition("/")
    try:
        part, parts = int(first), int(second)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form I/N, such as 1/2") from None
    if not 1 <= part <= parts:
        raise argparse.ArgumentTypeError(f"part {part} of {parts} does not exist; parts count from 1")
    return part, parts
