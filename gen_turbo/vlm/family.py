"""What the machinery must know of one family of vision-language models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.method import Grid
from gen_turbo.vlm.images import Frame


@dataclass(frozen=True)
class TowerFacts:
    """A vision tower: a stack of pre-norm blocks.

    Attributes:
        module: The tower's path in the model; its output is what later code reads.
        encoder: Path, from the tower, of the module that holds the list of blocks.
        blocks: Name of the list of blocks in the encoder.
        kinds: Model types of the configurations of towers built like this; others are left alone.
        num_leading: Class tokens in front of the patches.
        last_block: Gives, for a model, the index of the block whose output later code reads.
        attention: Name, in a block, of its self-attention.
        norm2: Name, in a block, of the norm between attention and MLP.
        has_qkv: Whether attention makes queries, keys and values in one layer `qkv` and takes no mask.
        is_packed: Whether all images stand in one row of tokens, as in Qwen's towers.
        is_restored: Whether later code needs every patch again.
        projector: Path, in the model, of the one layer that reads the patches in raster order, and nothing else;
            empty where other code lies between, or text reads them by cross-attention.
        output_norm: Name, in the tower, of the norm behind the last block that its reader sees; empty if none is.
    """

    module: str
    kinds: tuple[str, ...]
    encoder: str = "encoder"
    blocks: str = "layers"
    num_leading: Callable[[nn.Module], int] = lambda model: 0
    last_block: Callable[[nn.Module], int] = lambda model: -1
    attention: str = "self_attn"
    norm2: str = "layer_norm2"
    has_qkv: bool = False
    is_packed: bool = False
    is_restored: bool = True
    projector: str = ""
    output_norm: str = ""

    def stack(self, model: nn.Module) -> tuple[list[Any], int]:
        """The blocks of a model's tower, and the index of the last one whose output later code reads."""
        encoder = model.get_submodule(self.module).get_submodule(self.encoder)
        blocks: list[Any] = list(getattr(encoder, self.blocks))
        return blocks, self.last_block(model) % len(blocks)


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        models: Names of its classes.
        base: Path of the module that puts image features in place of the placeholders and calls the language model.
        text: Path of the language model, which has `layers`.
        tower: The vision tower; None where it cannot be reduced.
        grids: Gives, for a base model, the arguments of its call and the lengths of the images, the (height, width)
            of each in tokens; None where it has none.
        pieces: Gives, for a base model, how many tokens one image has at most, where features of several images
            come in one; None where each image's come alone.
        frames: Gives, for a base model and the arguments of its `get_video_features`, the tokens and the (height,
            width) of every frame, by the tokens of their video; None where it has no videos.
        has_lone_frames: Whether features of frames come one by one, whatever video they are of.
        placeholder: Whose token stands for a frame's features in the prompt, "video" or "image".
        masks_in_base: Whether the base model turns the 2D mask into a 4D one before the language model sees it.
        is_cross: Whether text reads the image by cross-attention, so that image tokens are in no prompt.
    """

    models: tuple[str, ...]
    base: str = "model"
    text: str = "model.language_model"
    tower: TowerFacts | None = None
    grids: Callable[[nn.Module, dict[str, Any], list[int]], list[Grid | None]] | None = None
    pieces: Callable[[nn.Module], int] | None = None
    frames: Callable[[nn.Module, dict[str, Any]], dict[int, list[Frame]]] | None = None
    has_lone_frames: bool = False
    placeholder: str = "video"
    masks_in_base: bool = False
    is_cross: bool = False


def square(length: int) -> Grid | None:
    """The grid of a square image of `length` tokens in raster order; None if it is no square number."""
    side = round(length**0.5)
    return (side, side) if side * side == length else None


def square_grids(base: nn.Module, kwargs: dict[str, Any], lengths: list[int]) -> list[Grid | None]:
    """Takes every image as square."""
    return [square(length) for length in lengths]


def image_token_mask(base: nn.Module, kwargs: dict[str, Any], kind: str = "image") -> Tensor | None:
    """Marks the placeholders of a call of the base model: (B, L); None if the call has neither ids nor embeddings."""
    token = getattr(base.config, f"{kind}_token_id")
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if ids is not None:
        mask: Tensor = ids == token
        return mask
    if embeds is None:
        return None
    placeholder = base.get_input_embeddings()(torch.tensor(token, device=embeds.device)).to(embeds)  # type: ignore[operator]
    found: Tensor = (embeds == placeholder).all(-1)
    return found


def tower_facts(model: nn.Module, family: Family) -> TowerFacts | None:
    """The tower's facts if it is of a kind that they hold for."""
    facts = family.tower
    if facts is None:
        return None
    config: Any = model.get_submodule(facts.module).config
    return facts if config.model_type in facts.kinds else None


def sized_grids(base: nn.Module, kwargs: dict[str, Any], lengths: list[int]) -> list[Grid | None]:
    """Square, but for Pixtral's towers, whose images have the sizes of the call."""
    sizes = kwargs.get("image_sizes")
    if sizes is None:
        return square_grids(base, kwargs, lengths)
    config: Any = base.config
    side = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)
    return _of_lengths([(height // side, width // side) for height, width in torch.as_tensor(sizes).tolist()], lengths)


def packed_grids(base: nn.Module, kwargs: dict[str, Any], lengths: list[int]) -> list[Grid | None]:
    """The grids of merged patches, as Qwen's."""
    sizes, sides = kwargs.get("image_grid_thw"), kwargs.get("image_merge_sizes")
    if sizes is None:
        return [None] * len(lengths)
    merges = [merge_side(base)] * len(sizes) if sides is None else sides.tolist()
    sides_of = zip(sizes.tolist(), merges, strict=True)
    return _of_lengths([(t * h // side, w // side) for (t, h, w), side in sides_of], lengths)


def _of_lengths(grids: list[Grid], lengths: list[int]) -> list[Grid | None]:
    """The grids of images in their order; None for what has another number of tokens."""
    if len(grids) != len(lengths):
        return [None] * len(lengths)
    return [grid if grid[0] * grid[1] == length else None for grid, length in zip(grids, lengths, strict=True)]


def merge_side(base: nn.Module) -> int:
    """How many patches of a side become one token, as configurations name it."""
    config: Any = base.config
    names = ("spatial_merge_size", "merge_kernel_size", "merge_size")
    side = next(getattr(config.vision_config, name) for name in names if hasattr(config.vision_config, name))
    return side if isinstance(side, int) else int(side[0])


def target_grids(base: nn.Module, kwargs: dict[str, Any], lengths: list[int]) -> list[Grid | None]:
    """The grids of MiniCPM's merged patches."""
    sizes = kwargs.get("target_sizes")
    return [None] * len(lengths) if sizes is None else _of_lengths(merged_sizes(base, kwargs, sizes), lengths)


def merged_sizes(base: nn.Module, kwargs: dict[str, Any], sizes: Tensor) -> list[Grid]:
    """MiniCPM's (height, width) in tokens of images or frames of (height, width) patches; a call may skip a merge."""
    config: Any = base.config
    mode = kwargs.get("downsample_mode") or config.downsample_mode
    side = config.merge_kernel_size[0] ** config.merger_times * (1 if mode == "4x" else 2)
    return [(height // side, width // side) for height, width in sizes.tolist()]


def placed_grids(base: nn.Module, kwargs: dict[str, Any], lengths: list[int]) -> list[Grid | None]:
    """The grids of Gemma 4's pooled patches, whose (x, y) come with the call; -1 is padding."""
    places = kwargs.get("image_position_ids")
    return [None] * len(lengths) if places is None else pooled_grids(base, places)


def pooled_grids(base: nn.Module, places: Tensor) -> list[Grid | None]:
    """The (height, width) in tokens of images whose patches have these (x, y), (B, patches, 2).

    A tower pools patches; where there is none, each is a token.
    """
    config: Any = base.config
    side = config.vision_config.pooling_kernel_size if hasattr(base, "vision_tower") else 1
    return [((y + 1) // side, (x + 1) // side) for x, y in places.amax(1).tolist()]


def tile_length(base: nn.Module) -> int:
    """Tokens of one tile of Idefics3."""
    length: int = base.image_seq_len  # type: ignore[assignment]
    return length


def mllama_tile_length(base: nn.Module) -> int:
    """Tokens of one tile of Llama 3.2 Vision, with its class token."""
    length: int = base.vision_model.num_patches  # type: ignore[union-attr, assignment]
    return length


def feature_block(model: nn.Module) -> int:
    """The last block whose output is projected; hidden state 0 is what enters the first block."""
    config: Any = model.config
    layer: int | list[int] = config.vision_feature_layer
    num_states: int = config.vision_config.num_hidden_layers + 1
    return max(index % num_states for index in (layer if isinstance(layer, (list, tuple)) else [layer])) - 1


def clip_class_tokens(model: nn.Module) -> int:
    """One for CLIP, none for SigLIP."""
    return 1 if hasattr(model.get_submodule("model.vision_tower.embeddings"), "class_embedding") else 0


def one_class_token(model: nn.Module) -> int:
    """One, whatever the model."""
    return 1
