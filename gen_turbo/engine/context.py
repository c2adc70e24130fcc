"""What a run of a pipeline, and each guidance branch of it, holds between its calls."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gen_turbo.engine.layer import ReducedLayer
from gen_turbo.engine.positions import Positions
from gen_turbo.engine.run_map import RunMap
from gen_turbo.engine.state import LayerState
from gen_turbo.engine.text import MergedText
from gen_turbo.engine.values import num_bytes, tensors
from gen_turbo.models.adapter import Geometry


@dataclass(eq=False)
class Run:
    """One run of a pipeline, or of a bare model.

    Attributes:
        marker: The timesteps of the scheduler, another object in every run; None for a bare model.
        times: The denoising time of every call, as the scheduler counts; empty for a bare model.
        scheduler: Class of the scheduler; empty for a bare model.
        guidance: Scale of classifier-free guidance; 0 where none is known.
        num_calls: Calls of every guidance branch; 0 where that is not known.
        recreates: Whether the caller makes its conditioning tensors anew in every step.
        num_reduced: Layers, and skipped units, that were reduced in its calls so far.
        num_steps: Calls so far of the branch that was called most.
        contexts: What it holds now, for as long as they are held elsewhere.
        is_over: Whether its last call was made.
        is_left: Whether the call of the pipeline has returned, or ended otherwise.
        call: What lives as long as that call; None where nothing does.
        num_rises: Of a bare model, the runs before it of one full step, each at an earlier time than the next.
        is_told: Whether a warning has said why nothing is skipped in it.
    """

    marker: object = None
    times: tuple[float, ...] = ()
    scheduler: str = ""
    guidance: float = 0.0
    num_calls: int = 0
    recreates: bool = False
    num_reduced: int = 0
    num_steps: int = 0
    contexts: weakref.WeakSet[Context] = field(default_factory=weakref.WeakSet)
    is_over: bool = False
    is_left: bool = False
    call: weakref.ref[Any] | None = None
    num_rises: int = 0
    is_told: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes held now, without forecasts."""
        return sum(context.num_bytes for context in self.contexts)


class Layout(NamedTuple):
    """What all calls of a context have alike."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    is_inference: bool
    """Whether it is under inference mode, in which what is made cannot be written to outside."""

    @classmethod
    def of(cls, latents: Tensor) -> Layout:
        """Reads it from the latents of a call."""
        return cls(latents.shape, latents.dtype, latents.device, torch.is_inference_mode_enabled())


@dataclass(eq=False)
class Context:
    """One sequence of calls: a run, or one guidance branch of a run that calls the model for each.

    Attributes:
        run: The run that it is part of.
        layout: Shape, dtype and device of the latents.
        condition: The conditioning tensor, until the run has settled.
        geometry: Where the tokens are.
        step: Its calls before the running one.
        time: The denoising time of the running call; None where it was not read.
        index: The place of the running call in the run's times; None where that is not known.
        maps: The token maps, by resolution and ratio.
        states: What its layers hold.
        groups: What the program knows of each group of layers.
        text: The text merged for its prompt; None before that was tried.
        positions: Those that stay the same from step to step.
        text_source: What a prefix was merged from; None where there is none.
        residual_bytes: Bytes of residuals.
        extras: What other parts of an attachment remember for it.
        captured: Its CUDA graphs, by what they are of.
        is_revived: Whether it runs on the buffers of an earlier context.
        watched: From then on the conditioning tensor, which is not kept alive from here.
    """

    run: Run
    layout: Layout
    condition: Tensor | None
    geometry: Geometry
    step: int = 0
    time: float | None = None
    index: int | None = None
    maps: dict[tuple[object, ...], RunMap] = field(default_factory=dict)
    states: dict[ReducedLayer, LayerState] = field(default_factory=dict)
    groups: list[Any] = field(default_factory=list)
    text: MergedText | None = None
    positions: Positions = field(default_factory=Positions)
    text_source: Tensor | None = None
    residual_bytes: int = 0
    extras: dict[str, Any] = field(default_factory=dict)
    captured: dict[Any, Any] = field(default_factory=dict)
    is_revived: bool = False
    watched: weakref.ref[Tensor] | None = None

    @property
    def conditioning(self) -> Tensor | None:
        """The conditioning tensor, if there is one and it still exists."""
        # A field for each: torch.compile of PyTorch 2.11 cannot ask what is a reference.
        return self.condition if self.watched is None else self.watched()

    @property
    def num_text(self) -> int:
        """Text tokens in every row, where they share a sequence with image tokens."""
        return self.text.num_text if self.text and self.text.num_merged else self.geometry.num_text

    @property
    def num_merged_text(self) -> int:
        """Text tokens that were merged into others."""
        return self.text.num_merged if self.text else 0

    def release(self, state: LayerState) -> None:
        """Forgets what one layer holds."""
        self.residual_bytes -= state.num_bytes
        state.forget()

    def forget_positions(self, is_over: bool = False) -> None:
        """Forgets the rows taken of positions; before the end but for those that later steps use again."""
        if is_over:
            self.positions.forget()
        for known in self.maps.values():
            known.seen = {key: pair for key, pair in known.seen.items() if self.positions.holds(pair[0])}

    def drop_unused(self) -> None:
        """Forgets the maps that no layer goes by."""
        used = {id(state.base) for state in self.states.values()}
        self.maps = {key: known for key, known in self.maps.items() if id(known) in used}

    @property
    def num_bytes(self) -> int:
        """Bytes of residuals, maps, positions, merged text and weights of details; forecasts are counted apart."""
        maps = sum(known.num_bytes for known in self.maps.values())
        short = [
            pair[1] for known in self.maps.values() for pair in known.seen.values() if self.positions.holds(pair[0])
        ]
        positions = self.positions.num_bytes + num_bytes(*tensors(short))
        weights = sum(num_bytes(group.weights) for group in self.groups)
        return self.residual_bytes + maps + positions + weights + (self.text.num_bytes if self.text else 0)

    @property
    def is_last(self) -> bool:
        """Whether the running call is the last one of its branch."""
        run = self.run
        return bool(run.num_calls) and self.index is not None and self.index >= run.num_calls - 1
