"""What one call of a denoiser costs, counted from its modules and the shape of the call. Nothing is run or timed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gen_turbo.engine.costs.names import (
    IMAGE_ALONE,
    QUERIES,
    TIMES,
    heads_width,
    rows_of,
    self_attentions,
    shares_of,
    sides_of,
)
from gen_turbo.models.adapter import TEXT, Adapter, Geometry, ModelCall, coarsened
from gen_turbo.models.unet import level_of

_PASSES = 3.0
"""Elementwise passes over what a matrix product reads and writes: norms, activations, modulations, sums."""
_KERNELS = 4.0
"""Kernels of a matrix product with those passes."""


@dataclass(frozen=True)
class Work:
    """Arithmetic and traffic.

    Attributes:
        matrix: FLOPs of linear layers and convolutions, 2 per multiply-add.
        softmax: FLOPs of attention's products with keys and values.
        moved: Bytes that are read and written.
        kernels: Kernels that are launched.
    """

    matrix: float = 0.0
    softmax: float = 0.0
    moved: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.matrix + other.matrix,
            self.softmax + other.softmax,
            self.moved + other.moved,
            self.kernels + other.kernels,
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.matrix * times, self.softmax * times, self.moved * times, self.kernels * times)

    @property
    def flops(self) -> float:
        """All floating point operations."""
        return self.matrix + self.softmax


@dataclass(frozen=True)
class Workload:
    """The shape of one call.

    Attributes:
        batch: Rows, guidance branches counted.
        frames: Frames of a video; 1 for an image.
        grid: (height, width) of the tokens of a frame at the finest level.
        text: Text tokens in a row.
        joins_text: Whether they share attention with the image tokens.
        itemsize: Bytes of a number.
        references: Tokens of images beside the target.
        caches_text: Whether the joined text is keys and values alone, which the model keeps.
        sound: Tokens of sound beside a video.
        times: Times in a row, where frames or tokens have one each.
        counts: Tokens that a module reads, by the beginning of its name, where those are not the text's.
    """

    batch: int
    frames: int
    grid: tuple[int, int]
    text: int
    joins_text: bool
    itemsize: int
    references: int = 0
    caches_text: bool = False
    sound: int = 0
    times: int = 1
    counts: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, call: ModelCall, geometry: Geometry) -> Workload:
        """Reads the shapes of a call; nothing waits for the device."""
        sample, text = call.sample, call.condition
        grid = geometry.grid or (1, sample.shape[1] if sample.ndim == 3 else math.prod(sample.shape[2:]))
        num_text = text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else 0
        joins = geometry.num_text > 0
        counts, time = dict(geometry.counts), call.timestep
        num_text = geometry.num_text if joins else counts.pop(TEXT, num_text)
        references = sum(region.num_tokens for region in geometry.references)
        return cls(
            len(sample),
            geometry.num_frames,
            grid,
            num_text,
            joins,
            sample.element_size(),
            references,
            geometry.caches_text,
            geometry.num_sound,
            time.shape[1] if isinstance(time, Tensor) and time.ndim == 2 else 1,
            tuple(counts.items()),
        )

    def tokens(self, downsample: int) -> int:
        """Image tokens of a row at a level."""
        height, width = coarsened(self.grid, downsample)
        return self.frames * height * width + self.references

    @property
    def joined(self) -> int:
        """Text tokens that share attention with the image tokens."""
        return self.text if self.joins_text else 0

    def rows(self, name: str, downsample: int) -> int:
        """Rows per image that a matrix product outside of all blocks reads, by its name and its level."""
        kind = rows_of(name)
        for beginning, rows in self.counts:
            # Of names that begin so, those of modulations still read one row.
            if name == beginning or (kind != "one" and name.startswith(beginning)):
                return rows
        if kind == "one":
            has_time = any(part in name for part in TIMES) and "audio" not in name
            return self.times if has_time else 1
        if kind == "image":
            # A step down reads every token and makes a quarter of them.
            scale = 1 / 4 if "downsamplers" in name else 4 if "upsamplers" in name else 1
            return int(self.tokens(downsample) * scale)
        return self.text if kind == "text" else self.sound

    def passes(self, tokens: float, width: int, passes: float, kernels: float) -> Work:
        """So many passes over tokens of a width, by so many kernels."""
        return Work(moved=passes * self.batch * tokens * width * self.itemsize, kernels=kernels)

    def product(self, rows: float, weights: int, features: int) -> Work:
        """A matrix product of so many rows per image, with the elementwise work around it."""
        moved = (_PASSES * self.batch * rows * features + weights) * self.itemsize
        return Work(2 * self.batch * rows * weights, 0, moved, _KERNELS)

    def attention(self, queries: float, keys: float, width: int) -> Work:
        """Products with keys and values, by a kernel that keeps the matrix of scores to itself."""
        moved = 2 * self.batch * (queries + keys) * width * self.itemsize
        return Work(0, 4 * self.batch * queries * keys * width, moved, 1)


@dataclass(frozen=True)
class LayerWork:
    """What one layer or block is made of, from which its cost follows for any number of image tokens.

    Attributes:
        products: For each matrix product what it reads ("image", "text", "sound" or "one" row), which share of that,
            weights, inputs plus outputs.
        width: Channels of its tokens.
        attentions: Of each attention the source of its queries and keys ("joined" is both), and channels of all
            heads together.
    """

    products: tuple[tuple[str, float, int, int], ...]
    width: int
    attentions: tuple[tuple[str, str, int], ...]

    @classmethod
    def of(cls, module: nn.Module, path: str = "") -> LayerWork:
        """Counts the matrix products of a layer, whatever device its weights are on."""
        products, attentions, width, shares = [], [], 0, shares_of(module)
        alone = self_attentions(module)
        for name, part in module.named_modules():
            if is_product(part):
                kind = "image" if name.startswith(alone) else rows_of(name)
                products.append((kind, shares.get(name, 1.0), *sizes_of(part)))
            query: Any = next((getattr(part, projection) for projection in QUERIES if hasattr(part, projection)), None)
            if is_product(query):
                width = width or int(query.in_features)
                is_alone = f"{name}." in alone or path.startswith(IMAGE_ALONE)
                sides = ("image", "image") if is_alone else sides_of(name)
                attentions.append((*sides, heads_width(part, query)))
        return cls(tuple(products), width, tuple(attentions))

    def work(self, load: Workload, tokens: float, num_queries: float | None = None) -> Work:
        """The cost of a call on so many image tokens; `num_queries` where keys and values alone are merged."""
        queries = tokens if num_queries is None else num_queries
        # Text that has no weights of its own goes through those of the image.
        asking = 0 if load.caches_text else load.joined
        has_text = any("joined" in sides for *sides, _ in self.attentions)
        inside = asking if has_text and all(kind != "text" for kind, *_ in self.products) else 0
        rows: Mapping[str, float] = {"image": queries + inside, "text": load.text, "one": 1, "sound": load.sound}
        total = Work()
        for kind, share, weights, features in self.products:
            total += load.product(rows[kind] * share, weights, features)
        beside = {"text": load.text, "sound": load.sound}
        ask = {"joined": queries + asking, "image": queries, **beside}
        asked = {"joined": tokens + load.joined, "image": tokens, **beside}
        for query, key, width in self.attentions:
            total += load.attention(ask[query], asked[key], width)
        return total


def is_product(part: object) -> bool:
    """Whether a module multiplies its input by a matrix: linear layers, of any storage, and convolutions."""
    return isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d)


def sizes_of(part: Any) -> tuple[int, int]:
    """Weights, whatever they are stored as, and inputs plus outputs of a position."""
    if isinstance(part, nn.Linear):
        return part.in_features * part.out_features, part.in_features + part.out_features
    positions = math.prod(part.kernel_size)
    return part.in_channels * part.out_channels * positions // part.groups, part.in_channels + part.out_channels


def stock_work(model: nn.Module, adapter: Adapter, load: Workload) -> Work:
    """The cost of a call of the stock model: its blocks, or where it has none its attention layers, and the rest."""
    layers = adapter.blocks(model) or adapter.layers(model)
    total = Work()
    for layer in layers:
        work = LayerWork.of(model.get_submodule(layer.name), layer.name)
        total += work.work(load, load.tokens(layer.downsample))
    inside = tuple(f"{layer.name}." for layer in layers)
    num_levels = 0 if adapter.is_transformer else len(model.down_blocks)  # type: ignore[arg-type]
    for name, part in model.named_modules():
        if is_product(part) and not name.startswith(inside):
            downsample = 2 ** level_of(name, num_levels) if num_levels else 1
            total += load.product(load.rows(name, downsample), *sizes_of(part))
    return total
