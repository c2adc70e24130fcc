"""The main jobs end to end on the embedded models, stock and Turbo side by side: drawing; reading and drawing anew."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import gen_turbo
from gen_turbo import scenes
from gen_turbo.config import ConfigError
from gen_turbo.factory import quiet_loading
from gen_turbo.metrics.image import psnr

SCALE = 2
MARGIN_PX = 12
LINE_PX = 18
GUIDANCE = 3.0
NEXT = """
try next:
  gen-turbo generate --prompt "a small blue cross on the left of a white background" --compare
  gen-turbo ui
  gen-turbo generate --config sdxl --prompt "a red fox in the snow" --compare"""


@dataclass(frozen=True)
class Drawing:
    """One image and what it took."""

    image: Image.Image
    seconds: float


def main() -> None:
    """Draws every prompt, and goes from images to captions to new images, with and without Turbo in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="tiny", help="name or YAML of a text-to-image pipeline")
    parser.add_argument("--prompts", type=int, default=3, help="how many captions to draw")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--seed", type=int, default=0, help="of the first image")
    parser.add_argument(
        "--limit", type=float, default=90, help="seconds that drawing may take; a slow machine draws fewer"
    )
    parser.add_argument("--output", type=png, default="outputs/demo.png", help="the page of stock and Turbo images")
    parser.add_argument("--workflow", default="caption-generate", help="name or YAML of a caption-generate pipeline")
    parser.add_argument("--images", type=int, default=1, help="how many images go the whole way; 0 skips it")
    page = "outputs/demo-caption-generate.png"
    parser.add_argument("--workflow-output", type=png, default=page, help="the page of images drawn anew")
    options = parser.parse_args()

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Threads that wait for each other are many times slower than one wherever anything else runs.
    torch.set_num_threads(1)
    quiet_loading()
    pipes = [gen_turbo.load_pipeline(options.pipeline, processor=None) for _ in range(2)]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    pipes[1].set_attn_processor(gen_turbo.TurboProcessor())
    captions = scenes.captions(options.prompts, options.seed)
    pairs = draw_pairs(pipes, captions, options)
    captions = captions[: len(pairs)]
    print_table(captions, pairs, pipes[1])
    save(options.output, [(caption, pair_row(pair)) for caption, pair in zip(captions, pairs, strict=True)])
    if options.images:
        try:
            show_workflow(options, [gen_turbo.load_pipeline(options.workflow, processor=None) for _ in range(2)])
        except ConfigError as error:
            print(f"\nimage -> caption -> new image was skipped: {error}")
    print(NEXT)


def png(text: str) -> Path:
    """The path of a .png file; checked before minutes of drawing."""
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text} is no .png file")
    return Path(text)


def clock_of(pipe: Any) -> Callable[[], float]:
    """Seconds of the process on a CPU, which what else runs there does not change; passed ones on a device."""
    return time.process_time if pipe.device.type == "cpu" else time.perf_counter


def draw_pairs(pipes: list[Any], captions: list[str], options: argparse.Namespace) -> list[tuple[Drawing, Drawing]]:
    """Draws each caption by stock and by Turbo, and stops before a caption that would pass the limit."""
    for pipe in pipes:
        # A device loads kernels and captures CUDA graphs in its first runs.
        for steps in (2,) if pipe.device.type == "cpu" else (options.steps, options.steps):
            draw(pipe, captions[0], options.seed, steps)
    pairs: list[tuple[Drawing, Drawing]] = []
    start = time.perf_counter()
    with tqdm(total=2 * len(captions), desc="images") as bar:
        for number, caption in enumerate(captions):
            if pairs and (time.perf_counter() - start) * (number + 1) / number > options.limit:
                bar.write(f"stopping after {number} of {len(captions)} captions: the next would pass --limit")
                break
            drawn = {}
            # The order alternates, so that a machine that slows down slows both alike.
            for side in (0, 1)[:: 1 if number % 2 == 0 else -1]:
                drawn[side] = draw(pipes[side], caption, options.seed + number, options.steps)
                bar.update()
            pairs.append((drawn[0], drawn[1]))
    return pairs


def draw(pipe: Any, caption: str, seed: int, steps: int) -> Drawing:
    """Draws one caption."""
    generator, clock = torch.Generator().manual_seed(seed), clock_of(pipe)
    start = clock()
    image = pipe(caption, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generator).images[0]
    return Drawing(image, clock() - start)


def print_table(captions: list[str], pairs: list[tuple[Drawing, Drawing]], pipe: Any) -> None:
    """Prints one line per image, the medians, and what the accelerated pipeline chose."""
    print()
    print(f"{'caption':<58} {'stock':>7} {'Turbo':>7} {'PSNR':>8}  check stock / Turbo")
    for caption, (stock, turbo) in zip(captions, pairs, strict=True):
        passed = [("no", "yes")[scenes.check(one.image, caption).passed] for one in (stock, turbo)]
        distance = f"{psnr(stock.image, turbo.image):.1f} dB"
        print(f"{caption:<58} {stock.seconds:5.1f} s {turbo.seconds:5.1f} s {distance:>8}  {' / '.join(passed)}")
    times = [statistics.median(pair[side].seconds for pair in pairs) for side in (0, 1)]
    ratios = sorted(stock.seconds / turbo.seconds for stock, turbo in pairs)
    seconds = "CPU seconds" if pipe.device.type == "cpu" else "seconds"
    print(f"\n{seconds} per image, median of alternating runs: stock {times[0]:.2f}, Turbo {times[1]:.2f}")
    print(f"times faster: {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})")
    report = gen_turbo.report(pipe)
    print(f"TurboProcessor() chose {report.choice}")
    for (height, width), (before, kept, layers) in report.tokens_by_grid.items():
        print(f"  {height} x {width} tokens: {before} -> {kept} in {layers} layers")
    if report.graphs and pipe.device.type == "cuda":
        print(f"  CUDA graphs: {report.graphs}")


def show_workflow(options: argparse.Namespace, pipes: list[Any]) -> None:
    """Reads rendered scenes, draws new images from what was said, and prints how both halves did."""
    captions, rows, clock = scenes.captions(options.images, options.seed + 1), [], clock_of(pipes[0].generate)
    for pipe in pipes:
        pipe.generate.set_progress_bar_config(disable=True)
    pipes[1].set_attn_processor({"caption": gen_turbo.TurboProcessor(0.66), "generate": gen_turbo.TurboProcessor()})
    if clock is time.perf_counter:
        for pipe in pipes:
            pipe([scenes.render(captions[0], options.seed)] * 2, batch_size=1)
    print("\nimage -> caption -> new image, Turbo in both halves")
    for number, caption in enumerate(captions):
        source, made = scenes.render(caption, options.seed + number), {}
        for side in (0, 1)[:: 1 if number % 2 == 0 else -1]:
            start = clock()
            result = pipes[side](source, seeds=options.seed + number)
            made[side] = (Drawing(result.images[0], clock() - start), result)
        (stock, _), (turbo, said) = made[0], made[1]
        passed = [("no", "yes")[scenes.check(one.image, caption).passed] for one in (stock, turbo)]
        print(f"source: {caption}\n  said: {said.captions[0]} ({said.num_tokens} -> {said.num_kept} image tokens)")
        print(f"  stock {stock.seconds:.1f} s, Turbo {turbo.seconds:.1f} s; new image shows it: {' / '.join(passed)}")
        rows.append((said.captions[0], [("source", source), *pair_row((stock, turbo))]))
    save(options.workflow_output, rows)


def pair_row(pair: tuple[Drawing, Drawing]) -> list[tuple[str, Image.Image]]:
    """Stock left and Turbo right, each with its name and time."""
    named = zip(("stock", "Turbo"), pair, strict=True)
    return [(f"{name}, {drawing.seconds:.1f} s", drawing.image) for name, drawing in named]


def save(path: Path, rows: list[tuple[str, list[tuple[str, Image.Image]]]]) -> None:
    """Writes a sheet of labelled images, one row per caption, with the caption above, and says where."""
    side = SCALE * rows[0][1][-1][1].width
    height = side + 2 * LINE_PX + MARGIN_PX
    columns = max(len(images) for _, images in rows)
    size = (columns * (side + MARGIN_PX) + MARGIN_PX, MARGIN_PX + height * len(rows))
    canvas = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    for number, (caption, images) in enumerate(rows):
        top = MARGIN_PX + number * height
        pen.text((MARGIN_PX, top), caption, "black", font)
        for column, (label, image) in enumerate(images):
            left = MARGIN_PX + column * (side + MARGIN_PX)
            pen.text((left, top + LINE_PX), label, "gray", font)
            canvas.paste(image.resize((side, side), Image.Resampling.NEAREST), (left, top + 2 * LINE_PX))
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
    print(f"\nimage: {path.resolve()}")


if __name__ == "__main__":
    main()
