"""`gen-turbo bench flops`: arithmetic of whole denoisers of real size, counted without weights."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from gen_turbo.api import adapter_of
from gen_turbo.bench import records
from gen_turbo.bench.denoisers import DENOISERS, Denoiser
from gen_turbo.engine.denoiser import DenoiserPart
from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.turbo import TurboProcessor
from gen_turbo.models.adapter import Adapter, Geometry, ModelCall
from gen_turbo.tokens.token_map import TokenMap

SCOPES = ("attention", "block", "model")
RATIOS = (0.4, 0.5)
PIXELS = (512, 1024, 2048)
_ALL_LEVELS = 8
_SOFTMAX, _LINEAR, _REST, _FIXED = "softmax", "linear", "rest", "fixed"
_TEXT_KEYS = ("attn2.to_k", "attn2.to_v")


@dataclass(frozen=True)
class Stock:
    """Floating point operations of one call of a denoiser, by what merging does to them.

    Attributes:
        total: All.
        softmax: Products with keys and values in the attention layers that can be reduced.
        linear: Linear layers inside those.
        rest: What else a transformer block spends on tokens: cross-attention without its keys, feed-forward.
    """

    total: int
    softmax: int
    linear: int
    rest: int

    def bound(self, scope: str, ratio: float, image_share: float = 1.0) -> float:
        """How many times less arithmetic there is if merging costs nothing.

        Args:
            scope: What runs on merged tokens.
            ratio: What every sequence loses of its tokens that can be merged.
            image_share: The share of those, where text is in the same sequence and stays as it is.
        """
        lost = ratio * image_share
        saved = self.softmax * (1 - (1 - lost) ** 2) + self.linear * lost
        saved += self.rest * lost if scope != "attention" else 0
        return self.total / (self.total - saved)


def run(options: argparse.Namespace) -> None:
    """Counts all chosen denoisers and records each setting against stock.

    Raises:
        ValueError: If `--models` names what is not there.
    """
    torch.set_num_threads(options.threads)
    names = options.models or list(DENOISERS)
    unknown = sorted(set(names) - set(DENOISERS))
    if unknown:
        raise ValueError(f"--models names {unknown}; there are: {', '.join(DENOISERS)}")
    for name in names:
        _record_all(options, Counted.of(DENOISERS[name]))


def _record_all(options: argparse.Namespace, counted: Counted) -> None:
    denoiser, stocks = counted.denoiser, dict[int, Stock]()
    texts = (False, True) if denoiser.joins_text and denoiser.merges_text else (False,)
    cases = list(itertools.product(texts, options.pixels or tuple(denoiser.widths) or PIXELS, SCOPES, RATIOS))
    for takes_text, pixels, scope, ratio in tqdm(cases, desc=f"flops, {denoiser.name}"):
        text_ratio = ratio if takes_text else 0.0
        params = {"model": denoiser.name, "pixels": pixels, "scope": scope, "ratio": ratio, "text_ratio": text_ratio}
        if scope == "model" and not counted.adapter.is_transformer:
            continue
        name = f"{denoiser.name}-{pixels}-{scope}-r{ratio:g}" + "-text" * takes_text
        if records.is_finished(options.records, "flops", name, params, options.seed):
            continue
        if pixels not in stocks:
            stocks[pixels] = counted.stock(pixels)
        planned, served = counted.reduced(pixels, scope, ratio, text_ratio)
        counts = {"stock": stocks[pixels].total, "planned": planned, "served": served}
        image_share = 1.0 if takes_text else denoiser.image_share(pixels)
        values = {"bound": [stocks[pixels].bound(scope, ratio, image_share)]}
        record = records.BenchRecord("flops", name, denoiser.name, params, options.seed, values=values, counts=counts)
        records.append(options.records, record)


@dataclass(frozen=True)
class Counted:
    """A denoiser whose equal blocks are counted once.

    Attributes:
        denoiser: What is counted.
        base: The model with one block of each kind.
        deeper: For each kind the model with two, and how many more than one there really are.
    """

    denoiser: Denoiser
    base: nn.Module
    deeper: tuple[tuple[nn.Module, int], ...]

    @property
    def adapter(self) -> Adapter:
        """Its family."""
        adapter: Adapter = adapter_of(self.base)
        return adapter

    @classmethod
    def of(cls, denoiser: Denoiser) -> Counted:
        """Builds the models."""
        once = dict.fromkeys(denoiser.depths, 1)
        deeper = tuple((denoiser.build(once | {kind: 2}), depth - 1) for kind, depth in denoiser.depths.items())
        return cls(denoiser, denoiser.build(once), deeper)

    def stock(self, pixels: int) -> Stock:
        """Counts one call of the stock model, for one sample."""
        base = count_stock(self.denoiser, self.base, pixels)
        extras = [(count_stock(self.denoiser, model, pixels), more) for model, more in self.deeper]
        parts = (
            value + sum(more * (getattr(extra, name) - value) for extra, more in extras)
            for name, value in asdict(base).items()
        )
        return Stock(*parts)

    def reduced(self, pixels: int, scope: str, ratio: float, text_ratio: float = 0.0) -> tuple[int, int]:
        """Counts the call that plans and a call that is served; plans are made once, however deep the model is."""
        settings = (pixels, scope, ratio, text_ratio)
        base = count_reduced(self.denoiser, self.base, *settings)
        extras = [(count_reduced(self.denoiser, model, *settings), more) for model, more in self.deeper]
        planned, served = (n + sum(more * (extra[i] - n) for extra, more in extras) for i, n in enumerate(base))
        return planned, served


def count_stock(denoiser: Denoiser, model: nn.Module, pixels: int) -> Stock:
    """Counts one call of a stock model."""
    counter = _Counter()
    with _labelled(model, adapter_of(model), counter):
        total = _count(denoiser, model, pixels, counter)
    return Stock(total, *(counter.flops.get(name, 0) for name in (_SOFTMAX, _LINEAR, _REST)))


def count_reduced(
    denoiser: Denoiser, model: nn.Module, pixels: int, scope: str, ratio: float, text_ratio: float = 0.0
) -> tuple[int, int]:
    """Counts the call that plans, and then a call that is served by its plans, through the package's own code.

    Tokens have shapes but no values: all that a call reads from values, its time and its grid, is given.
    """
    reducer = _ShapesTurbo(
        ratio, restore="copy", match_every=0, scope=scope, max_downsample=_ALL_LEVELS, text_ratio=text_ratio
    )
    adapter: Any = _WithoutValues(adapter_of(model), denoiser.geometry(pixels))
    part = DenoiserPart(model, adapter, reducer, None)
    part.install()
    try:
        return _count(denoiser, model, pixels, _Counter()), _count(denoiser, model, pixels, _Counter())
    finally:
        part.remove()


def _count(denoiser: Denoiser, model: nn.Module, pixels: int, counter: _Counter) -> int:
    with torch.no_grad(), counter:
        model(**denoiser.inputs(pixels))
    return sum(counter.flops.values())


class _ShapesTurbo(TurboProcessor):
    """Turbo on tokens without values: the semantic value is computed, but cannot be checked for being finite."""

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        if site.semantic is not None:
            site.semantic(self.semantic)
        return super().plan(tokens, replace(site, semantic=None), frame)


class _WithoutValues:
    """A family's adapter for tensors without values: it is given the grid, and its time falls from call to call."""

    def __init__(self, adapter: Adapter, geometry: Geometry) -> None:
        self._adapter, self._geometry, self._time = adapter, geometry, 1000.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._adapter, name)

    def read(self, arguments: Mapping[str, Any]) -> ModelCall:
        return self._adapter.read(arguments)._replace(condition=None)

    def time(self, timestep: Any) -> float:
        self._time -= 1
        return self._time

    def geometry(self, model: nn.Module, arguments: Mapping[str, Any]) -> Geometry:
        return self._geometry


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums matrix products and convolutions under the label of the module that runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: dict[str, int] = {}
        self.labels = [_FIXED]

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            label = self._label(func.overloadpacket.__name__, args)
            self.flops[label] = self.flops.get(label, 0) + count(*args, **(kwargs or {}), out_val=output)
        return output

    def _label(self, name: str, args: tuple[Any, ...]) -> str:
        label = self.labels[-1]
        is_linear = name in ("mm", "addmm")
        if is_linear and args[name == "addmm"].shape[0] == 1:
            return _FIXED
        return _SOFTMAX if label == _LINEAR and not is_linear else label


@contextmanager
def _labelled(model: nn.Module, adapter: Adapter, counter: _Counter) -> Iterator[None]:
    """Labels blocks, the attention layers in them that can be reduced, and what of them sees text alone."""
    labels = {layer.name: _REST for layer in adapter.blocks(model) if not layer.left_alone}
    labels |= {layer.name: _LINEAR for layer in adapter.layers(model) if not layer.left_alone}
    labels |= {name: _FIXED for name, _ in model.named_modules() if name.endswith(_TEXT_KEYS)}
    handles = []
    for name, label in labels.items():
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_, label=label: counter.labels.append(label)))
        handles.append(module.register_forward_hook(lambda *_: _left(counter)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _left(counter: _Counter) -> None:
    counter.labels.pop()
