"""What torch.compile sees of an attached reducer: three opaque operators, so one graph serves every kind of step.

Which step it is, which plan is due and what is remembered are Python state. Traced, every step would be a graph of its
own; inside an operator they are read when the graph runs. Outside of compiled code the operators are not used. They
serve inference: no gradient goes through them. What they cannot express, `outside` keeps out of graphs, which end
before it and go on behind it: blocks (scope="block"), and the root of models whose layers get text, positions or a
mask. `compile_repeated_blocks` leaves the root alone, and all layers of one kind share a graph.
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
_TOKENS, _TEXT = "hidden_states", "encoder_hidden_states"
_NUMBERS = itertools.count()
_OWNERS: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
# CUDA graphs would replay the kernels of one step for all; older versions of torch have no name for that.
_TAGS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
_REASON = (
    "gen_turbo reduces this call outside of graphs, as with scope='block', and at the root of models whose attention "
    "gets text, positions or a mask; compile without fullgraph=True, or by compile_repeated_blocks"
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
def attend(tensors: list[Tensor], names: str, layer: Tensor) -> list[Tensor]:
    """Runs one layer, reduced or in full as the step of the running call asks; `layer` is the binding's number.

    Attention gives one output for the tokens and one for the text that comes beside them.
    """
    outputs = _OWNERS[int(layer)].run_shown(tensors, names)
    # What an operator gives must not share memory: the two outputs may be two parts of one.
    return [y.clone(memory_format=torch.contiguous_format) if len(outputs) > 1 else y.contiguous() for y in outputs]


@torch.library.custom_op("gen_turbo::end", mutates_args=(), **_TAGS)
def end(output: Tensor, part: int) -> Tensor:
    """Notes in `part` that the root returns, and gives its output, copied."""
    _OWNERS[part].end()
    return output.clone()


@begin.register_fake
def _(tensors: list[Tensor], names: str, part: int) -> Tensor:
    return torch.empty_like(tensors[0])


@attend.register_fake
def _(tensors: list[Tensor], names: str, layer: Tensor) -> list[Tensor]:
    given = dict(zip(_tensor_names(names), tensors, strict=True))
    return [given[name].new_empty(given[name].shape) for name in (_TOKENS, _TEXT) if name in given]


@end.register_fake
def _(output: Tensor, part: int) -> Tensor:
    return torch.empty_like(output)


def shown(arguments: Mapping[str, Any]) -> tuple[list[Tensor], str] | None:
    """The tensors of an attention call on tokens (B, N, C), and their names; None for any other call."""
    tokens = arguments.get(_TOKENS)
    if not isinstance(tokens, Tensor) or tokens.ndim != 3 or arguments.get(_TEXT) is tokens:
        return None
    tensors: list[Tensor] = []
    names: list[str] = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            tensors.append(value)
            names.append(name)
        elif isinstance(value, tuple) and all(isinstance(item, Tensor) for item in value):
            tensors.extend(value)
            names.append(f"{name}*{len(value)}")
        elif value is None:
            names.append(f"{name}*")
        else:
            return None
    return tensors, " ".join(names)


def attended(tensors: list[Tensor], names: str, layer: Tensor) -> Any:
    """Puts `attend` into the graph; one output as it is, two as a tuple."""
    outputs = attend(tensors, names, layer)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def named(tensors: list[Tensor], names: str) -> dict[str, Any]:
    """The arguments that `shown` took apart."""
    left, arguments = iter(tensors), dict[str, Any]()
    for entry in names.split():
        name, star, number = entry.partition("*")
        items = tuple(itertools.islice(left, int(number or not star)))
        arguments[name] = (items if number else items[0]) if items else None
    return arguments


def _tensor_names(names: str) -> list[str]:
    """A name per tensor."""
    return [
        name for name, star, number in (e.partition("*") for e in names.split()) for _ in range(int(number or not star))
    ]


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
