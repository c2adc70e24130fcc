"""A reducer bound to one attention layer, in the place of the layer's own processor, which it calls."""

from __future__ import annotations

import functools
import inspect
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.engine.attention import AttentionMode
from gen_turbo.engine.base import DenoiserHost
from gen_turbo.engine.call import Call, flat, like
from gen_turbo.engine.clock import Clock, Stream
from gen_turbo.engine.compiled import attended, named, number_of, outside, shown
from gen_turbo.engine.reduction import Reduction
from gen_turbo.tokens.token_map import TokenMap


@dataclass
class Binding:
    """One attention layer, the processor it had, and the reduction that now works in front of it.

    Attributes:
        names: Names of what the processor takes by position, behind itself and the layer.
        attn: The layer itself.
    """

    inner: Any
    reduction: Reduction
    host: DenoiserHost
    names: tuple[str, ...]
    attn: weakref.ref[nn.Module]

    def __post_init__(self) -> None:
        self.number = number_of(self)

    @property
    def clock(self) -> Clock:
        """The clock of the model."""
        return self.reduction.clock

    def run_shown(self, tensors: list[Tensor], names: str) -> list[Tensor | None]:
        """Runs the layer on what compiled code shows of a call."""
        return flat(self.run(self.attn(), (), named(tensors, names)))  # type: ignore[arg-type]

    def run(self, attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the layer's own processor on fewer tokens where that is due, otherwise exactly as it was called."""
        stream = self.clock.current
        call = self._call(attn, args, kwargs, stream)
        if stream is None or call is None:
            with self._mode(None, call, stream):
                return self.inner(attn, *args, **kwargs)
        semantic = partial(self.host.semantic_value, attn, condition=stream.observation.condition)
        plan = self.reduction.plan(call, stream, semantic)
        if plan is None:
            with self._mode(None, call, stream):
                output = self.inner(attn, *args, **kwargs)
            self.reduction.remember(call, stream, semantic, output, partial(self._on_slots, call, stream))
            return output
        outputs = self._on_slots(call, stream, plan)
        return like(self.reduction.corrected(outputs, stream))

    def _call(self, attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], stream: Any) -> Call | None:
        if stream is None or len(args) > len(self.names):
            return None
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        layer = self.reduction.layer
        if layer.left_alone:
            return None
        return Call.of(partial(self.inner, attn), arguments, layer.form, stream.observation, layer.downsample)

    def _on_slots(self, call: Call, stream: Stream, plan: TokenMap) -> list[Any]:
        """Calls the processor on the plan's slots, or with full queries on the slots' keys."""
        with self._mode(plan, call, stream) as mode:
            if self.reduction.reducer.kv_only:
                outputs = flat(call.function(**call.arguments))
            else:
                outputs = call.on_slots(plan)
        if mode is not None and mode.num_calls == 0:
            raise RuntimeError(
                f"{type(self.inner).__name__} at {self.reduction.layer.name} did not call PyTorch's attention; set "
                "kv_only and proportional_attention to False, or the kernel by attention_backend alone"
            )
        return outputs

    def _mode(self, plan: TokenMap | None, call: Call | None, stream: Stream | None) -> Any:
        settings = self.reduction.reducer
        sizes = plan.sizes() if plan is not None and settings.proportional_attention else None
        keys = plan if settings.kv_only else None
        form = self.reduction.layer.form
        text_sizes = stream.observation.text_sizes if stream is not None and form.has_text_keys else None
        if keys is None and sizes is None and text_sizes is None and settings.attention_backend is None:
            return nullcontext()
        return AttentionMode(keys, sizes, text_sizes, form.keys_before, settings.attention_backend)


class BoundProcessor:
    """A binding in the shape of the processor it stands for.

    All processors of one class are stood for by one class, so that compiled blocks that differ in nothing else share
    one graph: what tells them apart is a tensor. diffusers filters arguments by the signature of `__call__` and makes
    new objects of a processor's class without arguments (`load_ip_adapter`); such an object finds its binding by the
    layer that calls it.

    Attributes:
        inner_type: The class of the processor that it stands for.
        names: Names of what such a processor takes by position, behind itself and the layer.
        binding: The binding; None in an object that other code made of this class.
        number: The binding's number, from which compiled code finds it; None for layers that are not reduced.
    """

    inner_type: type
    names: tuple[str, ...]
    binding: Binding | None = None
    number: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> BoundProcessor:
        """A copy of the model calls the same binding, which knows nothing of its runs and lets them through."""
        return self


_BOUND: weakref.WeakKeyDictionary[nn.Module, Binding] = weakref.WeakKeyDictionary()
"""The bindings of the layers that are bound now."""


def bind(binding: Binding) -> BoundProcessor:
    """Makes the processor of one binding, with the signature of the inner processor."""
    attn = binding.attn()
    if attn is not None:
        _BOUND[attn] = binding
    processor: BoundProcessor = _bound_class(type(binding.inner))()  # type: ignore[arg-type]
    processor.binding = binding
    if not binding.reduction.layer.left_alone:
        processor.number = torch.tensor(binding.number)
    return processor


def unbind(binding: Binding) -> None:
    """Forgets which layer the binding is of."""
    attn = binding.attn()
    if attn is not None and _BOUND.get(attn) is binding:
        del _BOUND[attn]


def binding_of(processor: Any, attn: nn.Module) -> Binding | None:
    """The binding behind the processor of a layer; None if it is not ours."""
    if not isinstance(processor, BoundProcessor):
        return None
    return processor.binding or _BOUND.get(attn)


def unbound(processor: Any) -> Any:
    """The stock processor behind one that other code has kept from an attachment and put back after its end."""
    while isinstance(processor, BoundProcessor):
        processor = processor.inner_type() if processor.binding is None else processor.binding.inner
    return processor


def positional_names(inner: Any) -> tuple[str, ...]:
    """Names of what a processor's call takes by position, behind itself and the layer."""
    return _positional_names(type(inner))


@functools.cache
def _bound_class(inner_type: type) -> type[BoundProcessor]:
    def call(self: BoundProcessor, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and self.number is not None:
            given = shown({**dict(zip(self.names, args, strict=False)), **kwargs})
            # With text or positions it can also run outside of graphs, where gradients go through it.
            if given is not None and (len(given[0]) == 1 or not torch.is_grad_enabled()):
                return attended(*given, self.number)
        return _run(self, attn, args, kwargs)

    call.__signature__ = inspect.signature(inner_type.__call__)  # type: ignore[attr-defined]
    shared = {"inner_type": inner_type, "names": _positional_names(inner_type), "__call__": call}
    return type(f"Bound{inner_type.__name__}", (BoundProcessor,), shared | {"__doc__": BoundProcessor.__doc__})


def _positional_names(inner_type: type) -> tuple[str, ...]:
    parameters = inspect.signature(inner_type.__call__).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[2:]


@outside
def _run(processor: BoundProcessor, attn: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    binding = binding_of(processor, attn)
    return unbound(processor)(attn, *args, **kwargs) if binding is None else binding.run(attn, args, kwargs)
