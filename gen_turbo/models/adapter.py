"""What attaching needs to know of an architecture family: where its image tokens are and what its calls show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from gen_turbo.method import Grid
from gen_turbo.models.conditions import Region, Text


@dataclass(frozen=True)
class TokenArg:
    """An argument with one row per token of position-like values: rows of the destinations are taken, never averaged.

    Attributes:
        name: The argument; a tensor or a tuple of tensors.
        axis: Where the tokens are; an argument with two such axes, such as a mask of pairs, has a `TokenArg` for each.
        has_batch: Whether there is a row per sample at axis 0; otherwise the whole batch must share one map.
        has_text_before: Whether the rows of the text tokens come first.
        items: Which items of a tuple they are; empty for all.
        num_axes: How many axes it has where it has a row per token; 0 where it always has.
    """

    name: str
    axis: int = 0
    has_batch: bool = False
    has_text_before: bool = False
    items: tuple[int, ...] = ()
    num_axes: int = 0

    def reads(self, value: Any, item: int = 0) -> bool:
        """Whether an argument, or an item of one, is there and has a row per token."""
        is_asked_for = value is not None and (not self.items or item in self.items)
        return is_asked_for and self.num_axes in (0, value.ndim) and value.shape[self.axis] > 1


@dataclass(frozen=True)
class LayerSignature:
    """Where the image tokens are in the arguments and the output of one kind of layer.

    Attributes:
        tokens: The argument that holds them, (B, N, C), unless said otherwise.
        has_text_before: Whether text tokens come before them in that argument.
        has_text_after: Whether text or padding comes behind them in that argument.
        also: Other arguments of the same rows as `tokens`, averaged too.
        token_args: Arguments of positions.
        none: Arguments that must be None, else the call is left alone.
        outputs: Which items of a tuple that is returned hold them.
        is_map: Whether tokens and output are feature maps (B, C, h, w).
        is_tokens_first: Whether they are (N, B, C); of blocks alone, each of which merges for itself.
        is_residual: Whether the layer adds its input itself, so that what is restored is the change.
        plain: Which of `outputs` are nevertheless no change of the input, and are restored as they are.
        stream: Layers share a map with those of the same stream alone.
        carries: Of a block with two outputs, the argument of the next block that the other one becomes.
        keys_before: Whether the attention's keys begin with those of the text; otherwise other keys come behind.
        has_text_keys: Whether the attention's other keys are the text tokens of the model's input.
    """

    tokens: str = "hidden_states"
    has_text_before: bool = False
    has_text_after: bool = False
    also: tuple[str, ...] = ()
    token_args: tuple[TokenArg, ...] = ()
    none: tuple[str, ...] = ("attention_mask",)
    outputs: tuple[int, ...] = (0,)
    is_map: bool = False
    is_tokens_first: bool = False
    is_residual: bool = False
    plain: tuple[int, ...] = ()
    stream: str = ""
    carries: str = "encoder_hidden_states"
    keys_before: bool = False
    has_text_keys: bool = False

    @property
    def shares_map(self) -> bool:
        """Whether positions have no batch axis, so that one map must serve the whole batch."""
        return any(not arg.has_batch for arg in self.token_args)


SELF_ATTENTION = LayerSignature(none=("encoder_hidden_states", "attention_mask"))
"""Self-attention over image tokens alone."""


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a model.

    Attributes:
        name: Its path in the model.
        downsample: How many times coarser than the model's input its token grid is.
        left_alone: Why it cannot be reduced; empty if it can.
        signature: Where its image tokens are.
        ends_span: Whether the model itself reads every token of a block's output before the next block.
        unread: Which items of a tuple that is returned the model drops, so that nothing is remembered of them.
    """

    name: str
    downsample: int = 1
    left_alone: str = ""
    signature: LayerSignature = SELF_ATTENTION
    ends_span: bool = False
    unread: tuple[int, ...] = ()


TEXT = "text"
"""All keys of cross-attention, in the counts of tokens that modules read."""
WHOLE = "output"
"""The unit that is the whole model: its output is forecast and no layer runs."""


@dataclass(frozen=True)
class Unit:
    """Something that one forecast stands for when it is skipped.

    Attributes:
        name: As schedules name it.
        module: The path of the module whose result is forecast; empty for the whole model.
        idle: Paths of the other modules that need not run then, for only what is forecast reads them.
        signature: Of a block, whose change of its input is forecast; None where the result itself is.
    """

    name: str
    module: str
    idle: tuple[str, ...] = ()
    signature: LayerSignature | None = None


class ModelCall(NamedTuple):
    """What one call of a model shows without waiting for the device.

    Attributes:
        sample: The latents, a batch first.
        timestep: As the model is given it, a number or a tensor of equal ones.
        condition: The conditioning tensor; None where there is none.
    """

    sample: Tensor
    timestep: Any
    condition: Tensor | None


@dataclass(frozen=True)
class Geometry:
    """Where the tokens of a run are; read once, in the first call.

    Attributes:
        grid: (height, width) of the model's input in tokens; None where the tokens are no rectangle.
        num_frames: Frames of a video, each a grid; 1 for an image.
        references: The images beside the target that follow it in the sequence, as an editing model is given them.
        left_alone: Why the call cannot run on merged tokens; empty if it can.
        num_text: Text tokens in every row, where they share a sequence with image tokens.
        num_images: Rows of the batch before it repeats itself, as it does under guidance; 0 where that is not known.
        caches_text: Whether the text is in no sequence and gives keys and values alone.
        num_sound: Tokens of the sound beside a video, in a sequence of their own.
        counts: Tokens that other modules read, by the beginning of their names; by `TEXT`, those of cross-attention.
    """

    grid: Grid | None
    num_frames: int = 1
    num_text: int = 0
    num_images: int = 0
    references: tuple[Region, ...] = ()
    left_alone: str = ""
    caches_text: bool = False
    num_sound: int = 0
    counts: tuple[tuple[str, int], ...] = ()

    @property
    def regions(self) -> tuple[Region, ...]:
        """The target and its references; empty where the tokens are no rectangles."""
        return (Region(self.num_frames, self.grid), *self.references) if self.grid is not None else ()


class Adapter(Protocol):
    """One family of diffusers denoisers: the only code that knows its argument names."""

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the classes that it takes; subclasses are taken too."""
        ...

    @property
    def is_transformer(self) -> bool:
        """Whether its tokens go through all blocks one after the other, at one resolution."""
        ...

    @property
    def is_one_stack(self) -> bool:
        """Whether each block reads what the one before it gives, from the first stack of blocks to the last."""
        ...

    @property
    def has_references(self) -> bool:
        """Whether images may stand beside the target in its sequence."""

    @property
    def positions(self) -> Mapping[str, tuple[str, ...]]:
        """Modules that make positions, by path: called once a call, on what depends on shapes and these arguments."""

    def layers(self, model: nn.Module) -> list[LayerSpec]:
        """Every attention layer, those that can be reduced and those that are left alone."""
        ...

    def blocks(self, model: nn.Module) -> list[LayerSpec]:
        """Every transformer block, for whole-block merging; empty where the family has none that can be merged."""
        ...

    def units(self, model: nn.Module) -> dict[str, Unit]:
        """Everything that can be skipped, by name."""
        ...

    def text_signature(self, model: nn.Module) -> Text:
        """Where the model is given text that can be merged or cut, or why there is none."""
        ...

    def read(self, arguments: Mapping[str, Any]) -> ModelCall:
        """Reads the arguments of one call of the model, by name, without waiting for the device."""
        ...

    def time(self, timestep: Any) -> float:
        """The denoising time as the scheduler counts it, falling during a run; waits for the device."""
        ...

    def geometry(self, model: nn.Module, arguments: Mapping[str, Any]) -> Geometry:
        """Reads where the tokens are; may wait for the device."""
        ...

    def semantic_value(self, layer: nn.Module, tokens: Tensor, kind: str, condition: Tensor | None) -> Tensor | None:
        """The semantic value of tokens (B, N, C) at a layer as (B, N); None where there is none of that kind."""
        ...


def units_of(model: nn.Module, adapter: Adapter, cuts: Sequence[Unit] = ()) -> dict[str, Unit]:
    """Everything that can be skipped in a model, by name: the whole, what its family can cut out, and its blocks."""
    blocks = [Unit(layer.name, layer.name, signature=layer.signature) for layer in adapter.blocks(model)]
    return {unit.name: unit for unit in [Unit(WHOLE, ""), *cuts, *blocks]}


def coarsened(grid: Grid, downsample: int) -> Grid:
    """The grid after repeated halving, each rounding up as a padded stride-2 convolution does."""
    height, width = grid
    while downsample > 1:
        height, width, downsample = (height + 1) // 2, (width + 1) // 2, downsample // 2
    return height, width
