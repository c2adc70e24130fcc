"""What a host is: the facts about one architecture family that attaching needs."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from gen_turbo.method import Grid, TokenReducer


@dataclass(frozen=True)
class Table:
    """An argument with one row per token of position-like values: rows of the anchors are taken, never averaged.

    Attributes:
        name: The argument; a tensor or a tuple of tensors.
        axis: Where the tokens are; an argument with two such axes, such as a mask of pairs, has a table for each.
        has_batch: Whether there is a row per sample at axis 0; otherwise the whole batch must share one plan.
        has_text_before: Whether the rows of the text tokens come first.
        items: Which items of a tuple they are; empty for all.
    """

    name: str
    axis: int = 0
    has_batch: bool = False
    has_text_before: bool = False
    items: tuple[int, ...] = ()


@dataclass(frozen=True)
class Form:
    """Where the image tokens are in the arguments and the output of one kind of layer.

    Attributes:
        tokens: The argument that holds them, (B, N, C), or (B, C, h, w) where `is_map`.
        has_text_before: Whether text tokens come before them in that argument.
        has_text_after: Whether text or padding comes behind them in that argument.
        also: Other arguments of the same rows as `tokens`, averaged too.
        tables: Arguments of positions.
        none: Arguments that must be None, else the call is left alone.
        outputs: Which items of a tuple that is returned hold them.
        is_map: Whether tokens and output are maps.
        is_residual: Whether the layer adds its input itself, so that what is restored is the change.
        keys_before: Whether the attention's keys begin with those of the text; otherwise other keys come behind.
        has_text_keys: Whether the attention's other keys are the text tokens of the root.
    """

    tokens: str = "hidden_states"
    has_text_before: bool = False
    has_text_after: bool = False
    also: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    none: tuple[str, ...] = ("attention_mask",)
    outputs: tuple[int, ...] = (0,)
    is_map: bool = False
    is_residual: bool = False
    keys_before: bool = False
    has_text_keys: bool = False

    @property
    def shares_plan(self) -> bool:
        """Whether positions have no batch axis, so that one plan must serve the whole batch."""
        return any(not table.has_batch for table in self.tables)


@dataclass(frozen=True)
class TextForm:
    """Where a root is given the text that shares attention with the image.

    Attributes:
        embedding: The argument that holds it, (B, T, C).
        positions: An argument of its positions, (T, d), of which rows are taken; empty where it has none.
        mask: An argument with a value per text token, (B, T), or per text token and then others; empty for none.
        hides: Whether the model never reads a token whose mask is zero.
        num_before: Tokens that the model puts before the text.
    """

    embedding: str = "encoder_hidden_states"
    positions: str = ""
    mask: str = ""
    hides: bool = False
    num_before: int = 0


SELF_ATTENTION = Form(none=("encoder_hidden_states", "attention_mask"))
"""Self-attention over image tokens alone."""


@dataclass(frozen=True)
class Layer:
    """One layer of a model.

    Attributes:
        name: Its path in the model.
        downsample: How many times coarser than the model's input its token grid is.
        left_alone: Why it cannot be reduced; empty if it can.
        form: Where its image tokens are.
    """

    name: str
    downsample: int = 1
    left_alone: str = ""
    form: Form = SELF_ATTENTION


@dataclass(frozen=True)
class Observation:
    """What one call of a model's root shows.

    Attributes:
        timestep: The denoising time; falls during a run. Its magnitude is on the scheduler's scale.
        grid: (height, width) of the model's input in tokens; None where the tokens are no rectangle.
        layout: Shape, dtype and device of the input; another layout is another stream.
        condition: The conditioning tensor; another object is another stream (separate calls for guidance).
        num_frames: Frames of a video, each a grid; 1 for a picture.
        num_text: Text tokens in every row, where they share a sequence with image tokens.
        text_sizes: How many text tokens each of them stands for, (b, T); None for one each.
        num_merged_text: Text tokens that were merged into others.
        num_pictures: Rows of the batch before it repeats itself, as it does under guidance; 0 where that is not known.
    """

    timestep: float
    grid: Grid | None
    layout: tuple[object, ...]
    condition: Tensor | None
    num_frames: int = 1
    num_text: int = 0
    text_sizes: Tensor | None = None
    num_merged_text: int = 0
    num_pictures: int = 0


@dataclass(frozen=True)
class LayerReport:
    """One attention layer.

    Attributes:
        name: Its path in the model.
        downsample: How many times coarser than the latent its grid is.
        status: "reduced", "lost" (a later call replaced the processor) or why it is left alone.
        grid: (height, width) of its tokens; None before the first call.
        num_tokens: Tokens that reach it; 0 before the first call.
        num_kept: Tokens that its attention runs on in a reduced call.
        num_full: Calls that ran in full.
        num_reduced: Calls that ran on fewer tokens.
        flops: Floating point operations of its attention so far, with projections.
        stock_flops: The same for the stock model.
        plan_age: The most steps that a plan had served when this layer used it.
    """

    name: str
    downsample: int
    status: str
    grid: Grid | None = None
    num_tokens: int = 0
    num_kept: int = 0
    num_full: int = 0
    num_reduced: int = 0
    flops: int = 0
    stock_flops: int = 0
    plan_age: int = 0


class Part(Protocol):
    """A reducer on one model, as `attach` and `report` see it."""

    reducer: TokenReducer

    @property
    def model(self) -> nn.Module:
        """The model; raises ReferenceError once it is gone."""
        ...

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers that are reduced; never empty."""
        ...

    @property
    def remembered_bytes(self) -> int:
        """Bytes held now between the calls of the model."""
        ...

    @property
    def most_remembered_bytes(self) -> int:
        """The most bytes held at once so far."""
        ...

    def rows(self) -> list[LayerReport]:
        """One row per layer, reduced or left alone."""
        ...

    def install(self) -> None:
        """Puts everything in place."""
        ...

    def remove(self) -> None:
        """Makes the model what it was, object for object; doing it twice is harmless."""
        ...


class OnModel:
    """What holds on to a model without keeping it alive."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    @property
    def model(self) -> nn.Module:
        """The model; raises ReferenceError once it is gone."""
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this attachment no longer exists")
        return model


class Host(Protocol):
    """One architecture family: the only code that knows its argument names."""

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the classes that it takes; subclasses are taken too."""
        ...

    def attachment(self, model: nn.Module, reducer: TokenReducer, pipeline: Any | None) -> Part:
        """Prepares a reducer for one model and changes nothing yet.

        Raises:
            ValueError: If no layer would be reduced, or a setting does not fit the model.
        """
        ...


class DenoiserHost(Protocol):
    """One family of diffusers denoisers."""

    def text_form(self, model: nn.Module) -> TextForm | str:
        """Where the root is given text that can be merged, or why there is none."""
        ...

    def layers(self, model: nn.Module) -> list[Layer]:
        """Every attention layer, those that can be reduced and those that are left alone."""
        ...

    def blocks(self, model: nn.Module) -> list[Layer]:
        """Every transformer block, for whole-block merging; empty where the family has none that can be merged."""
        ...

    def text_projections(self, model: nn.Module) -> list[str]:
        """Modules that project the text of a prompt alike in every step; empty where there are none."""
        ...

    def observe(self, model: nn.Module, arguments: Mapping[str, Any]) -> Observation:
        """Reads the arguments of one call of the root, by name."""
        ...

    def semantic_value(self, layer: nn.Module, tokens: Tensor, kind: str, condition: Tensor | None) -> Tensor | None:
        """The semantic value of tokens (B, N, C) at a layer as (B, N); None where there is none of that kind."""
        ...


def coarsened(grid: Grid, downsample: int) -> Grid:
    """The grid after repeated halving, each rounding up as a padded stride-2 convolution does."""
    height, width = grid
    while downsample > 1:
        height, width, downsample = (height + 1) // 2, (width + 1) // 2, downsample // 2
    return height, width
