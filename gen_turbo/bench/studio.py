"""Images for the quality benchmarks: one pipeline, captions and seeds, and stock images kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from gen_turbo import scenes
from gen_turbo.api import denoiser, denoisers
from gen_turbo.bench.arithmetic import counted
from gen_turbo.bench.settings import Setting, Stock
from gen_turbo.bench.timing import Timing, clocked
from gen_turbo.config import PipelineConfig
from gen_turbo.factory import build_pipeline, load_pipeline
from gen_turbo.metrics.cost import Cost, count_cost

_FLOPS = "flops.txt"


@dataclass
class Studio:
    """Makes the image of the i-th caption, always from the same noise.

    Attributes:
        pipe: A text-to-image pipeline without any processor attached.
        folder: Where the stock images of these weights and this guidance are kept.
        captions: What to draw.
        seed: Of the first image; the i-th takes `seed + i`.
        steps: Denoising steps of stock.
        guidance: Scale of classifier-free guidance.
        pixels: Side of the images; the pipeline's own where this is None.
    """

    pipe: Any
    folder: Path
    captions: list[str]
    seed: int
    steps: int
    guidance: float
    pixels: int | None = None
    stock: Stock = field(default_factory=Stock)

    def draw(self, setting: Setting, index: int) -> tuple[Image.Image, Timing]:
        """Draws one image under a setting, applied afresh, and times the whole pipeline call."""
        generator = torch.Generator().manual_seed(self.seed + index)
        torch.manual_seed(self.seed + index)

        def call() -> Image.Image:
            done = self.pipe(
                self.captions[index],
                num_inference_steps=setting.num_steps(self.steps),
                guidance_scale=self.guidance,
                generator=generator,
                height=self.pixels,
                width=self.pixels,
            )
            image: Image.Image = done.images[0]
            return image

        with setting.applied(self.pipe):
            return clocked(call)

    @property
    def denoiser(self) -> nn.Module:
        """The model that draws."""
        return denoiser(self.pipe)

    @cached_property
    def stock_cost(self) -> Cost:
        """What one stock image costs, counted once; it does not depend on the caption."""
        return self.count(self.stock)

    def count(self, setting: Setting) -> Cost:
        """Counts the attention arithmetic of one image, decoder and text encoder left out."""
        with count_cost(self.denoiser) as cost:
            self.draw(setting, 0)
        return cost

    def counted(self, setting: Setting, index: int) -> tuple[Image.Image, int]:
        """One image under a setting, and all arithmetic of its denoiser."""
        kind = type(self.denoiser).__name__
        (image, _), flops = counted(lambda: self.draw(setting, index), kind)
        if isinstance(setting, Stock):
            self.keep_stock(index, image)
            _write(self.folder / f"stock-{self.steps}" / _FLOPS, lambda path: path.write_text(str(flops)))
        return image, flops

    @property
    def stock_flops(self) -> int:
        """All arithmetic of the denoiser in one stock image, counted once for all processes."""
        path = self.folder / f"stock-{self.steps}" / _FLOPS
        if not path.exists():
            self.counted(self.stock, 0)
        return int(path.read_text())

    def stock_image(self, index: int) -> Image.Image:
        """The stock image from disk, drawn and kept where it is missing."""
        path = self.folder / f"stock-{self.steps}" / f"{self.seed + index:05d}.png"
        if not path.exists():
            self.keep_stock(index, self.draw(self.stock, index)[0])
        with Image.open(path) as image:
            return image.convert("RGB")

    def keep_stock(self, index: int, image: Image.Image) -> None:
        """Keeps a stock image; another process may do the same, for both write the same bytes."""
        path = self.folder / f"stock-{self.steps}" / f"{self.seed + index:05d}.png"
        _write(path, lambda partial: image.save(partial, format="PNG"))


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside its place and moves it there, so that other processes see all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    write(partial)
    partial.replace(path)


def open_studio(
    pipeline: str,
    work: Path,
    num_captions: int,
    seed: int,
    steps: int,
    guidance: float,
    device: str = "cpu",
    pixels: int | None = None,
) -> tuple[Studio, str]:
    """Loads a pipeline by name, YAML or folder, onto a device; on a GPU in float32 without TF32.

    Returns:
        The studio, and a fingerprint of the weights: records and images of other weights never mix.

    Raises:
        ValueError: If the pipeline is not there; see `load_pipeline`.
    """
    if (Path(pipeline) / "model_index.json").is_file():
        pipe = build_pipeline(
            PipelineConfig(checkpoint=pipeline, pipeline="text-to-image", device=device, dtype="float32")
        )
    else:
        pipe = load_pipeline(pipeline, processor=None, device=device, dtype="float32")
    pipe.set_progress_bar_config(disable=True)
    weights = fingerprint(pipe)
    if device != "cpu":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if pixels is not None:
        fit_positions(denoiser(pipe), pixels // pipe.vae_scale_factor)
    captions = scenes.captions(num_captions, seed)
    where = "" if device == "cpu" else f"-{device.replace(':', '-')}"
    folder = work / f"{weights}-g{guidance:g}{where}{f'-{pixels}px' if pixels else ''}"
    return Studio(pipe, folder, captions, seed, steps, guidance, pixels), weights


def fit_positions(model: nn.Module, latents: int) -> None:
    """Gives a transformer with too small a table of positions one for larger images: the same places, more finely.

    Args:
        model: Any denoiser; one without such a table, or with enough positions, is left as it is.
        latents: Side of the latent image.
    """
    table: Any = getattr(model, "pos_embed", None)
    known = getattr(table, "pos_embed_max_size", None)
    if known is None or latents // table.patch_size <= known:
        return
    side = latents // table.patch_size
    grid = table.pos_embed.unflatten(1, (known, known)).permute(0, 3, 1, 2)
    finer = torch.nn.functional.interpolate(grid, size=side, mode="bilinear")
    table.pos_embed = finer.flatten(2).transpose(1, 2).contiguous()
    table.pos_embed_max_size = side


def fingerprint(pipe: Any) -> str:
    """Twelve hexadecimal digits that change with any weight of denoiser, text encoders or autoencoder."""
    digest = hashlib.sha256()
    texts = [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part is not None]
    for part in (*denoisers(pipe)[1], *texts, pipe.vae):
        for name, tensor in sorted(part.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
