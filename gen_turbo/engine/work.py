"""What one call of a denoiser costs, counted from its modules and the shape of the call. Nothing is run or timed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gen_turbo.models.adapter import Adapter, Geometry, ModelCall, coarsened
from gen_turbo.models.unet import level_of

_ONE_ROW = (
    "time_",
    "timestep",
    "norm",
    "adaln",
    "guidance",
    "add_embedding",
    "class_",
    "pooled",
    "_mod",
    "embedding_",
    "modulation",
    "av_cross_attn",
)
"""Parts of names of layers that read one row per image: modulations, embeddings of the time."""
_TEXT_ROWS = (
    "add_",
    "context",
    "caption",
    "text_",
    "attn2.to_k",
    "attn2.to_v",
    "cross_attention.to_key",
    "cross_attention.to_value",
    "txt",
    "to_q_t",
    "to_k_t",
    "to_v_t",
    "to_out_t",
    "ff_t",
)
"""Parts of names of layers that read the text tokens."""
_SOUND_KEYS, _SOUND_QUERIES = "audio_to_video", "video_to_audio"
"""Attention of a video to its sound and of the sound to the video, by name."""
_KEYS = ("to_k", "to_v")
_CROSS = ("attn2", "cross_attn", "cross_attention")
_QUERIES = ("to_q", "to_query", "to_qkv_mlp_proj")
"""What makes queries, by name."""
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

    @classmethod
    def of(cls, call: ModelCall, geometry: Geometry) -> Workload:
        """Reads the shapes of a call; nothing waits for the device."""
        sample, text = call.sample, call.condition
        grid = geometry.grid or (1, sample.shape[1] if sample.ndim == 3 else math.prod(sample.shape[2:]))
        num_text = text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else 0
        joins = geometry.num_text > 0
        num_text = geometry.num_text if joins else num_text
        references = sum(region.num_tokens for region in geometry.references)
        size, is_cached, sound = sample.element_size(), geometry.caches_text, geometry.num_sound
        return cls(len(sample), geometry.num_frames, grid, num_text, joins, size, references, is_cached, sound)

    def tokens(self, downsample: int) -> int:
        """Image tokens of a row at a level."""
        height, width = coarsened(self.grid, downsample)
        return self.frames * height * width + self.references

    @property
    def joined(self) -> int:
        """Text tokens that share attention with the image tokens."""
        return self.text if self.joins_text else 0

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
        attentions: For each attention what asks and what is asked ("joined" is image and text), and channels of all
            heads together.
    """

    products: tuple[tuple[str, float, int, int], ...]
    width: int
    attentions: tuple[tuple[str, str, int], ...]

    @classmethod
    def of(cls, module: nn.Module) -> LayerWork:
        """Counts the matrix products of a layer, whatever device its weights are on."""
        products, attentions, width, shares = [], [], 0, shares_of(module)
        alone = self_attentions(module)
        for name, part in module.named_modules():
            if is_product(part):
                kind = "image" if name.startswith(alone) else rows_of(name)
                products.append((kind, shares.get(name, 1.0), *sizes_of(part)))
            query: Any = next((getattr(part, projection) for projection in _QUERIES if hasattr(part, projection)), None)
            if is_product(query):
                width = width or int(query.in_features)
                # A projection that is fused with others is wider than all heads.
                channels: Any = part.inner_dim if hasattr(part, _QUERIES[-1]) else query.out_features
                sides = ("image", "image") if f"{name}." in alone else _sides_of(name)
                attentions.append((*sides, int(channels)))
        return cls(tuple(products), width, tuple(attentions))

    def work(self, load: Workload, tokens: float, num_queries: float | None = None) -> Work:
        """The cost of a call on so many image tokens; `num_queries` where keys and values alone are merged."""
        queries = tokens if num_queries is None else num_queries
        # Text that has no weights of its own goes through those of the image.
        asking = 0 if load.caches_text else load.joined
        inside = 0 if any(kind == "text" for kind, *_ in self.products) else asking
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


def rows_of(name: str) -> str:
    """What a matrix product reads, by its name: tokens of "image", "text" or "sound", or "one" row per image."""
    lowered = name.lower()
    if any(part in lowered for part in _ONE_ROW):
        return "one"
    if any(part in lowered for part in _TEXT_ROWS):
        return "text"
    if _SOUND_KEYS in lowered or _SOUND_QUERIES in lowered:
        return "sound" if (_SOUND_KEYS in lowered) == lowered.endswith(_KEYS) else "image"
    return "sound" if "audio_" in lowered else "image"


def _sides_of(name: str) -> tuple[str, str]:
    """What asks and what is asked in an attention, by its name."""
    if _SOUND_KEYS in name:
        return "image", "sound"
    if _SOUND_QUERIES in name:
        return "sound", "image"
    has_sound = "audio_" in name
    if name.endswith(_CROSS):
        return "sound" if has_sound else "image", "text"
    return ("sound", "sound") if has_sound else ("joined", "joined")


def self_attentions(module: nn.Module) -> tuple[str, ...]:
    """Prefixes of second attentions that read image tokens alone, as in SD 3.5, where other families read the text."""
    second = ((name, part) for name, part in module.named_modules() if name.endswith("attn2"))
    return tuple(f"{name}." for name, part in second if getattr(part, "is_cross_attention", True) is False)


def shares_of(module: nn.Module) -> dict[str, float]:
    """Of layers inside of routed experts, by name, the share of the tokens that each reads if all are asked alike."""
    shares: dict[str, float] = {}
    for name, part in module.named_modules():
        experts: Any = getattr(part, "experts", None)
        if isinstance(experts, nn.ModuleList) and hasattr(part, "num_activated_experts"):
            inside = f"{name}.experts" if name else "experts"
            share = int(part.num_activated_experts) / len(experts)
            shares |= {f"{inside}.{inner}": share for inner, _ in experts.named_modules()}
    return shares


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
        total += LayerWork.of(model.get_submodule(layer.name)).work(load, load.tokens(layer.downsample))
    inside = tuple(f"{layer.name}." for layer in layers)
    num_levels = 0 if adapter.is_transformer else len(model.down_blocks)  # type: ignore[arg-type]
    for name, part in model.named_modules():
        if is_product(part) and not name.startswith(inside):
            kind, downsample = rows_of(name), 2 ** level_of(name, num_levels) if num_levels else 1
            rows = {"image": load.tokens(downsample), "text": load.text, "one": 1, "sound": load.sound}[kind]
            if "downsamplers" in name:
                rows //= 4
            elif "upsamplers" in name:
                rows *= 4
            total += load.product(rows, *sizes_of(part))
    return total
