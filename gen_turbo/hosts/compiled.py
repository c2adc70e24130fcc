"""What torch.compile sees of an attached reducer: three opaque operators, so one graph serves every kind of step.

Which step it is, which plan is due and what is remembered are Python state. Traced, every step would be a graph of its
own; inside an operator they are read when the graph runs. Outside of compiled code the operators are not used. They
serve inference: no gradient goes through them. What they cannot express, `outside` keeps out of graphs, which end
before it and go on behind it: blocks (scope="block"), merged text, and attention that gets text, positions or a mask.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")
_NUMBERS = itertools.count()
_OWNERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
# CUDA graphs would replay the kernels of one step for all; older versions of torch have no name for that.
_TAGS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
_REASON = (
    "gen_turbo reduces this call outside of graphs, as with scope='block', text_ratio, attention_backend and attention "
    "on text, positions or a mask; compile without fullgraph=True"
)


def number_of(owner: Any) -> int:
    """Registers the owner of an operator's state, held weakly, and returns its number."""
    number = next(_NUMBERS)
    _OWNERS[number] = owner
    return number


def outside(function: Callable[..., _T]) -> Callable[..., _T]:
    """The function, run as it is where compiled code calls it; under `fullgraph=True` that is an error."""
    disable: Any = torch.compiler.disable
    takes_reason = "reason" in inspect.signature(disable).parameters
    kept_out: Callable[..., _T] = disable(function, **({"reason": _REASON} if takes_reason else {}))
    return kept_out


@torch.library.custom_op("gen_turbo::begin", mutates_args=(), **_TAGS)
def begin(tensors: list[Tensor], names: str, part: int) -> Tensor:
    """Notes in `part` that the root is called, and gives its first argument, copied, so that all layers come later."""
    _OWNERS[part].begin(dict(zip(names.split(), tensors, strict=True)))
    return tensors[0].clone()


@torch.library.custom_op("gen_turbo::attend", mutates_args=(), **_TAGS)
def attend(tokens: Tensor, layer: int) -> Tensor:
    """Runs one layer on tokens (B, N, C), reduced or in full as the step of the running call asks."""
    output: Tensor = _OWNERS[layer].run_alone(tokens)
    return output.contiguous()


@torch.library.custom_op("gen_turbo::end", mutates_args=(), **_TAGS)
def end(output: Tensor, part: int) -> Tensor:
    """Notes in `part` that the root returns, and gives its output, copied."""
    _OWNERS[part].end()
    return output.clone()


@begin.register_fake
def _(tensors: list[Tensor], names: str, part: int) -> Tensor:
    return torch.empty_like(tensors[0])


@attend.register_fake
def _(tokens: Tensor, layer: int) -> Tensor:
    return tokens.new_empty(tokens.shape)


@end.register_fake
def _(output: Tensor, part: int) -> Tensor:
    return torch.empty_like(output)


def begun(parameters: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any], part: int) -> tuple[Any, Any]:
    """Puts `begin` into the graph and gives the root's arguments with its first one made to depend on it."""
    given = {**dict(zip(parameters, args, strict=False)), **kwargs}
    if isinstance(given.get("timestep"), int | float):
        given["timestep"] = torch.tensor(given["timestep"])
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    first = parameters[0]
    shown = [tensors.pop(first), *tensors.values()]
    sample = begin(shown, " ".join([first, *tensors]), part)
    return ((sample, *args[1:]), kwargs) if args else (args, {**kwargs, first: sample})


def ended(output: Any, part: int) -> Any:
    """Puts `end` into the graph and gives the root's output made to depend on it."""
    first = end(output[0], part)
    return (first, *output[1:]) if type(output) is tuple else type(output)(first)
