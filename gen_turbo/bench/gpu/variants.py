"""What `bench gpu` compares: settings times modes, and how a copy of a model is put into one of each."""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from torch import nn

from gen_turbo.api import NoEffectWarning, adapter_of, attach
from gen_turbo.bench.gpu.pipeline import BarePipeline
from gen_turbo.bench.settings import Method, Setting, Stock, Tomesd
from gen_turbo.factory import build_processor
from gen_turbo.methods.identity import IdentityProcessor

COMPILER = "inductor"
_MOST_GRAPHS = 64
"""Of one block class: kinds of step times widths times settings of one process."""
_LEVELS = {"sd15": 2, "sdxl": 4}
"""The coarsest reduced level of each UNet: its two finest that have attention."""
_FINEST = {"sd15": 1, "sdxl": 2}


class Mode(StrEnum):
    """How the kernels of a step are launched."""

    EAGER = "eager"
    CAPTURED = "captured"
    COMPILED = "compiled"
    COMPILED_CAPTURED = "compiled + captured"

    @property
    def is_captured(self) -> bool:
        """Whether one CUDA graph holds the denoiser's whole forward."""
        return self in (Mode.CAPTURED, Mode.COMPILED_CAPTURED)

    @property
    def is_compiled(self) -> bool:
        """Whether repeated blocks are compiled."""
        return self in (Mode.COMPILED, Mode.COMPILED_CAPTURED)


@dataclass(frozen=True)
class Variant:
    """A setting and where it is measured.

    Attributes:
        setting: What is applied.
        first: Modes that are measured before the rest of all settings.
        later: Other modes.
        is_automatic: Whether the package decides about layers and capture, as it does for who only attaches; it is
            then measured over runs as long as those of the model's pipeline.
    """

    setting: Setting
    first: tuple[Mode, ...] = ()
    later: tuple[Mode, ...] = field(default=())
    is_automatic: bool = False


def variants(model: str, is_unet: bool) -> list[Variant]:
    """Every setting of a model, stock first; whole models are reduced on transformers alone."""
    eager, captured, compiled, both = Mode
    found = [Variant(Stock(), tuple(Mode))]
    if is_unet:
        found.append(Variant(Tomesd("tomesd-r0.5", "tomesd", 0.5, _FINEST.get(model, 1)), (eager,)))
    line = Method("turbo-0.4", "the user's line", "turbo", {"ratio": 0.4})
    found.append(Variant(line, (eager,), (compiled,), is_automatic=True))
    layers = Method("attention-0.4", line.family, line.method, line.options | {"scope": "attention"})
    found.append(Variant(layers, (eager,), (captured, compiled, both)))
    levels: dict[str, Any] = {"max_downsample": _LEVELS[model]} if model in _LEVELS else {}
    copied = {"restore": "copy", "match_every": 5}
    scopes: dict[str, dict[str, Any]] = {
        "attention": {"scope": "attention"},
        "block": {"scope": "block"},
        "spans": {"scope": "block", "merge_span": 0},
    }
    if not is_unet:
        scopes["model"] = {"scope": "model"}
    for scope, options in scopes.items():
        for restore, more in (("residual", {}), ("copy", copied)):
            name = f"{scope}-{restore}-r0.5"
            setting = Method(name, f"{scope}, {restore}", "turbo", {"ratio": 0.5} | levels | options | more)
            found.append(Variant(setting, *_FIRST.get((scope, restore), ((), (eager, captured)))))
    return found


_E, _C, _P, _B = Mode
_FIRST: dict[tuple[str, str], tuple[tuple[Mode, ...], tuple[Mode, ...]]] = {
    ("attention", "residual"): ((_C,), (_E, _B, _P)),
    ("block", "residual"): ((_C, _B), (_E, _P)),
    ("block", "copy"): ((), (_E, _C, _B)),
    ("spans", "residual"): ((_C,), (_E, _B)),
    ("spans", "copy"): ((_C, _B), (_E, _P)),
    ("model", "residual"): ((_C,), (_E, _B)),
}
"""First and later modes by scope and restore; compiling costs most, so few settings are compiled."""


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that `compile_repeated_blocks` would compile; where diffusers names none, those of the family.

    Raises:
        ValueError: If neither diffusers nor this package names any.
    """
    blocks = [model.get_submodule(spec.name) for spec in adapter_of(model).blocks(model)]
    names = getattr(model, "_repeated_blocks", None) or {type(block).__name__ for block in blocks}
    if not names:
        raise ValueError(f"no repeated blocks of {type(model).__name__} are known; leave the compiled modes out")
    return [module for module in model.modules() if type(module).__name__ in names]


def twin(model: nn.Module) -> nn.Module:
    """A model of its own modules and the same weights, so that two settings can be measured in turn."""
    shared: dict[int, Any] = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


@contextmanager
def prepared(pipeline: BarePipeline, variant: Variant, mode: Mode) -> Iterator[BarePipeline]:
    """The loop around a twin of its model, to which a setting and a mode are applied inside of the `with` block."""
    changed = pipeline.around(twin(pipeline.model))
    with ExitStack() as stack:
        if mode.is_compiled:
            for block in repeated_blocks(changed.model):
                block.compile(backend=COMPILER, dynamic=False)
        # That nothing is merged where it would gain nothing is a result like others.
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", NoEffectWarning)
        stack.enter_context(_applied(changed, variant, mode))
        yield changed


def _applied(pipeline: BarePipeline, variant: Variant, mode: Mode) -> AbstractContextManager[object]:
    setting = variant.setting
    if isinstance(setting, Method):
        processor = build_processor({"method": setting.method, **setting.options})
        return _attached(pipeline, processor, "auto" if variant.is_automatic else mode.is_captured)
    if mode.is_captured and isinstance(setting, Stock):
        return _attached(pipeline, IdentityProcessor(), True)
    if mode.is_captured:
        raise ValueError(f"{setting.name} is no method of this package, which captures what it attaches to alone")
    return setting.applied(pipeline.model)


def _attached(pipeline: BarePipeline, processor: Any, graphs: bool | str) -> AbstractContextManager[object]:
    """Attaches a processor, captured in CUDA graphs or not; without a GPU nothing is captured.

    Raises:
        RuntimeError: If a capture is wanted on a GPU and this version of the package knows none.
    """
    is_on_gpu = next(pipeline.model.parameters()).is_cuda
    attaching: Any = attach
    if is_on_gpu and "graphs" in inspect.signature(attaching).parameters:
        attached: AbstractContextManager[object] = attaching(pipeline, processor, graphs=graphs)
        return attached
    if is_on_gpu and graphs is True:
        raise RuntimeError("this version of gen_turbo captures no denoiser in CUDA graphs")
    return attach(pipeline, processor)


@contextmanager
def compiler_limits() -> Iterator[None]:
    """No shape becomes dynamic, and no block falls back to eager because a process compiles many."""
    import torch._dynamo as dynamo

    # Older versions of torch have another name for the first.
    names = ("recompile_limit", "cache_size_limit")
    limit = next(name for name in names if hasattr(dynamo.config, name))
    changes: dict[str, Any] = {limit: _MOST_GRAPHS, "automatic_dynamic_shapes": False}
    with dynamo.config.patch(changes):
        yield


def forget_compiled() -> None:
    """Drops all compiled code of this process, whose guards later settings would pay for."""
    import torch._dynamo as dynamo

    dynamo.reset()


def num_graphs() -> tuple[int, int]:
    """Graphs compiled and graph breaks met since the process began or `forget_compiled` was called."""
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def groups(found: Sequence[Variant], is_first: bool) -> list[tuple[Mode, list[Variant]]]:
    """The variants by mode in the order of measurement; each group shares one stock, which is not in it.

    Compiled code that is not captured is guarded at every call, so there every setting has a group of its own.
    """
    made: list[tuple[Mode, list[Variant]]] = []
    found = [variant for variant in found if not isinstance(variant.setting, Stock)]
    for mode in (Mode.EAGER, Mode.CAPTURED, Mode.COMPILED_CAPTURED, Mode.COMPILED):
        of_mode = [v for v in found if mode in (v.first if is_first else v.later)]
        if not of_mode:
            continue
        made += [(mode, [v]) for v in of_mode] if mode is Mode.COMPILED else [(mode, of_mode)]
    return made
