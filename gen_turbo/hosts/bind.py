"""A reducer bound to one attention layer, in the place of the layer's own processor, which it calls."""

from __future__ import annotations

import inspect
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.core.plan import ReductionPlan
from gen_turbo.hosts.attention import AttentionMode
from gen_turbo.hosts.base import DenoiserHost
from gen_turbo.hosts.call import Call, flat, like
from gen_turbo.hosts.clock import Clock, Stream
from gen_turbo.hosts.compiled import attend, number_of, outside
from gen_turbo.hosts.reduction import Reduction


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

    def run_alone(self, tokens: Tensor) -> Any:
        """Runs the layer on tokens that come with nothing else; what compiled code calls."""
        return self.run(self.attn(), (tokens,), {})  # type: ignore[arg-type]

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

    def _on_slots(self, call: Call, stream: Stream, plan: ReductionPlan) -> list[Any]:
        """Calls the processor on the plan's slots, or with full queries on the slots' keys."""
        with self._mode(plan, call, stream) as mode:
            if self.reduction.reducer.keep_queries:
                outputs = flat(call.function(**call.arguments))
            else:
                outputs = call.on_slots(plan)
        if mode is not None and mode.num_calls == 0:
            raise RuntimeError(
                f"{type(self.inner).__name__} at {self.reduction.layer.name} did not call PyTorch's attention; set "
                "keep_queries and size_weighted to False, or the kernel by attention_backend alone"
            )
        return outputs

    def _mode(self, plan: ReductionPlan | None, call: Call | None, stream: Stream | None) -> Any:
        settings = self.reduction.reducer
        sizes = plan.sizes() if plan is not None and settings.size_weighted else None
        keys = plan if settings.keep_queries else None
        form = self.reduction.layer.form
        text_sizes = stream.observation.text_sizes if stream is not None and form.has_text_keys else None
        if keys is None and sizes is None and text_sizes is None and settings.attention_backend is None:
            return nullcontext()
        return AttentionMode(keys, sizes, text_sizes, form.keys_before, settings.attention_backend)


class BoundProcessor:
    """A binding in the shape of the processor it stands for.

    Each layer has its own subclass, made by `bound_processor`, which holds the binding: diffusers filters arguments
    by the signature of `__call__` and makes new objects of a processor's class without arguments
    (`load_ip_adapter`), and both must find what they would have found before.
    """

    binding: Binding


def bound_processor(binding: Binding) -> BoundProcessor:
    """Makes the processor of one binding, with the signature of the inner processor."""
    inner, run = binding.inner, outside(binding.run)

    def call(self: BoundProcessor, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() and _is_alone(args, kwargs):
            return attend(args[0] if args else kwargs["hidden_states"], binding.number)
        return run(attn, args, kwargs)

    call.__signature__ = inspect.signature(type(inner).__call__)  # type: ignore[attr-defined]
    members = {"binding": binding, "__call__": call, "__doc__": BoundProcessor.__doc__}
    made: type[BoundProcessor] = type(f"Bound{type(inner).__name__}", (BoundProcessor,), members)
    return made()


def unbound(processor: Any) -> Any:
    """The stock processor behind one that other code has kept from an attachment and put back after its end."""
    while isinstance(processor, BoundProcessor):
        processor = processor.binding.inner
    return processor


def positional_names(inner: Any) -> tuple[str, ...]:
    """Names of what a processor's call takes by position, behind itself and the layer."""
    parameters = inspect.signature(type(inner).__call__).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD)[2:]


def _is_alone(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call brings tokens (B, N, C) and nothing else, and gives tokens back."""
    given = [value for value in (*args, *kwargs.values()) if value is not None]
    return len(given) == 1 and isinstance(given[0], Tensor) and given[0].ndim == 3
