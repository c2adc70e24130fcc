"""How long a run is expected to take, from counted work and a table of devices; nothing is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from gen_turbo.engine.costs.devices import DeviceClass
from gen_turbo.engine.costs.work import LayerWork, Work, Workload, stock_work
from gen_turbo.models.adapter import Adapter, LayerSpec

_APPLY, _KEEP = (9.0, 3.0), (14.0, 10.0)
"""Passes over the tokens, and kernels, of merging and restoring, and of remembering what that misses."""
_MATCH_PRODUCTS, _MATCH_PASSES, _MATCH_KERNELS = 272, 8.0, 90.0
"""Of a map: products of a token with 16 destinations of its tile and 256 queries, passes, and kernels as
counted: 67 of a block's to 94 of an attention layer's that knows the text, more where positions are shared."""


@dataclass(frozen=True)
class Rhythm:
    """How often layers do what in a run.

    Attributes:
        steps: Of the run.
        restore: "residual" or "copy".
        full_every: Every how many steps layers run in full, with "residual".
        warmup_steps: How many first steps do, with "residual".
        start: Steps of the stock model before all that.
    """

    steps: int
    restore: str
    full_every: int
    warmup_steps: int
    start: int = 0

    @property
    def refreshes(self) -> int:
        """Steps that run in full and on merged tokens too."""
        if self.restore == "copy":
            return 0
        return min(self.steps, self.warmup_steps + max(0, self.steps - self.warmup_steps) // self.full_every)

    @property
    def reduced(self) -> int:
        """Steps that run on merged tokens alone."""
        return self.steps - self.start - self.refreshes

    def __str__(self) -> str:
        if self.restore == "copy":
            return "outputs copied" + (f" from step {self.start} of {self.steps} on" if self.start else "")
        first = f"{self.warmup_steps} full steps first, then one" if self.warmup_steps > 1 else "one full step"
        return f"{first} in {self.full_every}"


@dataclass(frozen=True)
class Kinds:
    """What merging adds to a call of the stock model, by the kind of step; what it saves is negative.

    Attributes:
        refresh: Of a step that runs in full and remembers.
        reduced: Of a step on merged tokens.
        matching: Of making a map, once for all layers of a level.
    """

    refresh: Work = Work()
    reduced: Work = Work()
    matching: Work = Work()

    def __add__(self, other: Kinds) -> Kinds:
        return Kinds(self.refresh + other.refresh, self.reduced + other.reduced, self.matching + other.matching)


@dataclass(frozen=True)
class RunFacts:
    """Where and how long a choice is to hold.

    Attributes:
        load: The shape of a call.
        device: Its class.
        steps: Calls of each guidance branch.
        is_captured: Whether calls after the first are replayed from CUDA graphs.
        has_blocks: Whether whole blocks may be merged.
    """

    load: Workload
    device: DeviceClass
    steps: int
    is_captured: bool = False
    has_blocks: bool = True

    def seconds(self, rhythm: Rhythm, stock: Work, more: Kinds) -> float:
        """Expected seconds of a run: its first call is launched from the host, the others as they are."""

        def of(work: Work, is_captured: bool = self.is_captured) -> float:
            return self.device.seconds(work, self.load.itemsize, is_captured)

        kinds = (
            (stock, rhythm.start),
            (stock + more.refresh, rhythm.refreshes),
            (stock + more.reduced, rhythm.reduced),
        )
        total = sum(times * of(work) for work, times in kinds)
        first = next(work for work, times in kinds if times)
        maps = rhythm.reduced if rhythm.restore == "copy" else 1
        return total + of(first, False) - of(first) + maps * of(more.matching)

    def saves(self, rhythm: Rhythm, kinds: Kinds) -> bool:
        """Whether a layer gains on the device, whoever launches it."""

        def seconds(work: Work) -> float:
            return self.device.seconds(work, self.load.itemsize, is_captured=True)

        return rhythm.refreshes * seconds(kinds.refresh) + rhythm.reduced * seconds(kinds.reduced) < 0


class Costs:
    """The counted cost of a model and its layers; counted once, asked for every run.

    Args:
        model: Gives the model, on any device or none.
        adapter: Its family.
    """

    def __init__(self, model: Callable[[], nn.Module], adapter: Adapter) -> None:
        self._model, self._adapter = model, adapter
        self._layers: dict[str, LayerWork] = {}
        self._stock: dict[Workload, Work] = {}

    def stock(self, load: Workload) -> Work:
        """A call of the stock model."""
        if load not in self._stock:
            self._stock[load] = stock_work(self._model(), self._adapter, load)
        return self._stock[load]

    def kinds(self, spec: LayerSpec, ratio: float, load: Workload, kv_only: bool) -> Kinds:
        """What merging changes at one layer, but for the map."""
        if spec.name not in self._layers:
            self._layers[spec.name] = LayerWork.of(self._model().get_submodule(spec.name), spec.name)
        layer, tokens = self._layers[spec.name], load.tokens(spec.downsample)
        full = layer.work(load, tokens)
        short = layer.work(load, tokens * (1 - ratio), tokens if kv_only else None)
        apply = load.passes(tokens, layer.width, *_APPLY)
        keep = load.passes(tokens + load.joined, layer.width, *_KEEP)
        return Kinds(short + keep, full * -1 + short + apply)

    def matching(self, spec: LayerSpec, load: Workload) -> Work:
        """A map for a level."""
        layer, tokens = self._layers[spec.name], load.tokens(spec.downsample)
        product = Work(matrix=2 * load.batch * tokens * layer.width * _MATCH_PRODUCTS)
        return product + load.passes(tokens, layer.width, _MATCH_PASSES, _MATCH_KERNELS)

    def specs(self, scope: str) -> list[LayerSpec]:
        """Layers or blocks."""
        find = self._adapter.layers if scope == "attention" else self._adapter.blocks
        return find(self._model())

    @property
    def name(self) -> str:
        """The name of the model's class."""
        return type(self._model()).__name__
