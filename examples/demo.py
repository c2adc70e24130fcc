"""The main job end to end on the embedded model: pictures by the stock pipeline and by Turbo, side by side."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import gen_turbo
from gen_turbo import scenes
from gen_turbo.metrics.image import psnr

SCALE = 2
MARGIN_PX = 12
LINE_PX = 18
GUIDANCE = 3.0


@dataclass(frozen=True)
class Drawing:
    """One picture and what it took."""

    image: Image.Image
    seconds: float
    tokens: str


def main() -> None:
    """Draws every prompt with and without Turbo, in turn, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", default="tiny", help="name or YAML of a text-to-image pipeline")
    parser.add_argument("--prompts", type=int, default=3, help="how many captions to draw")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--limit", type=float, default=90, help="seconds that drawing may take; a slow machine draws fewer"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/demo.png"))
    options = parser.parse_args()

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Threads that wait for each other are many times slower than one wherever anything else runs.
    torch.set_num_threads(1)
    pipe = gen_turbo.load_pipeline(options.pipeline, processor=None)
    pipe.set_progress_bar_config(disable=True)
    processor = gen_turbo.TurboProcessor()
    captions = scenes.captions(options.prompts, options.seed)
    pairs = draw_pairs(pipe, processor, captions, options)
    captions = captions[: len(pairs)]
    print_table(captions, pairs, processor)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(captions, pairs).save(options.output)
    print(f"\npicture: {options.output.resolve()}")


def draw_pairs(
    pipe: Any, processor: Any, captions: list[str], options: argparse.Namespace
) -> list[tuple[Drawing, Drawing]]:
    """Draws each caption by stock and by Turbo, and stops before a caption that would pass the limit."""
    draw(pipe, captions[0], options.seed, steps=2)
    pairs: list[tuple[Drawing, Drawing]] = []
    start = time.perf_counter()
    with tqdm(total=2 * len(captions), desc="pictures") as bar:
        for number, caption in enumerate(captions):
            if pairs and (time.perf_counter() - start) * (number + 1) / number > options.limit:
                bar.write(f"stopping after {number} of {len(captions)} captions: the next would pass --limit")
                break
            drawn = {}
            # The order alternates, so that a machine that slows down slows both alike.
            for kind in (None, processor)[:: 1 if number % 2 == 0 else -1]:
                drawn[kind is None] = draw(pipe, caption, options.seed + number, options.steps, kind)
                bar.update()
            pairs.append((drawn[True], drawn[False]))
    return pairs


def draw(pipe: Any, caption: str, seed: int, steps: int, processor: Any | None = None) -> Drawing:
    """Draws one caption with a processor or, without one, by the stock pipeline."""
    if processor is not None:
        pipe.set_attn_processor(processor)
    generator = torch.Generator().manual_seed(seed)
    start = time.perf_counter()
    image = pipe(caption, num_inference_steps=steps, guidance_scale=GUIDANCE, generator=generator).images[0]
    seconds = time.perf_counter() - start
    sites = [site for site in gen_turbo.report(pipe).sites if site.num_tokens]
    if processor is not None:
        pipe.reset_attn_processor()
    finest = max(sites, key=lambda site: site.num_tokens, default=None)
    return Drawing(image, seconds, f"{finest.num_tokens} -> {finest.num_kept}" if finest else "all")


def print_table(captions: list[str], pairs: list[tuple[Drawing, Drawing]], processor: Any) -> None:
    """Prints one line per picture and the medians."""
    print(f"\n{processor}\n")
    print(f"{'caption':<58} {'stock':>7} {'Turbo':>7} {'PSNR':>8}  check stock / Turbo")
    for caption, (stock, turbo) in zip(captions, pairs, strict=True):
        passed = [("no", "yes")[scenes.check(one.image, caption).passed] for one in (stock, turbo)]
        distance = f"{psnr(stock.image, turbo.image):.1f} dB"
        print(f"{caption:<58} {stock.seconds:5.1f} s {turbo.seconds:5.1f} s {distance:>8}  {' / '.join(passed)}")
    times = [statistics.median(pair[side].seconds for pair in pairs) for side in (0, 1)]
    ratios = sorted(stock.seconds / turbo.seconds for stock, turbo in pairs)
    print(f"\nseconds per image, median of alternating runs: stock {times[0]:.1f}, Turbo {times[1]:.1f}")
    print(f"times faster: {statistics.median(ratios):.2f} (from {ratios[0]:.2f} to {ratios[-1]:.2f})")
    print(f"tokens in the top self-attention: {pairs[0][1].tokens}")


def side_by_side(captions: list[str], pairs: list[tuple[Drawing, Drawing]]) -> Image.Image:
    """Puts stock left and Turbo right, one row per caption, with the caption above."""
    side = SCALE * pairs[0][0].image.width
    row = side + 2 * LINE_PX + MARGIN_PX
    canvas = Image.new("RGB", (2 * side + 3 * MARGIN_PX, MARGIN_PX + row * len(pairs)), "white")
    pen = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=14)
    for number, (caption, pair) in enumerate(zip(captions, pairs, strict=True)):
        top = MARGIN_PX + number * row
        pen.text((MARGIN_PX, top), caption, "black", font)
        for column, (label, drawing) in enumerate(zip(("stock", "Turbo"), pair, strict=True)):
            left = MARGIN_PX + column * (side + MARGIN_PX)
            pen.text((left, top + LINE_PX), f"{label}, {drawing.seconds:.1f} s", "gray", font)
            picture = drawing.image.resize((side, side), Image.Resampling.NEAREST)
            canvas.paste(picture, (left, top + 2 * LINE_PX))
    return canvas


if __name__ == "__main__":
    main()
