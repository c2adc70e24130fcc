"""What an attached vision-language model carries, and its copies do not: hooks, and methods of one module."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial, update_wrapper
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from gen_turbo.engine.placed import NotPickled


def settle(model: nn.Module, handles: list[Any], is_idle: bool = False) -> None:
    """Makes hooks, just registered, known to copies of their modules and to compilers; adds to their handles.

    Hooks do nothing in copies of their modules, and refuse to be pickled. Each module that carries one has a `forward`
    of its own as long: compiled graphs are not checked for hooks that came or went since they were made
    (`skip_nnmodule_hook_guards` of torch.compile), but they are for methods of an instance.

    Args:
        model: The model.
        handles: What takes the hooks off; modules that carry any add to it.
        is_idle: Whether nothing is ever reduced. Compilers then leave the hooks out, so that one graph holds the model
            and nothing is counted.
    """
    changed = set()
    for handle in handles:
        if isinstance(handle, InstanceMethod):
            handle.is_idle = is_idle
        hooks: Any = handle.hooks_dict_ref() if isinstance(handle, RemovableHandle) else None
        if hooks is not None and not isinstance(hooks[handle.id], _Hook):
            kind = _Idle if is_idle else _Traced if isinstance(hooks[handle.id], Keeper | Traced) else _Hook
            hooks[handle.id] = kind(hooks[handle.id])
            changed.add(id(hooks))
    carriers = [
        module for module in model.modules() if {id(module._forward_hooks), id(module._forward_pre_hooks)} & changed
    ]
    for module in carriers:
        if not isinstance(vars(module).get("forward"), _Same):
            handles.append(_Marked(module))


class InstanceMethod(NotPickled):
    """Takes the place of a method of one module until `remove`; copies of the module have what it had before.

    Attributes:
        is_idle: Whether compiled code calls the method that was there.

    Args:
        module: The module.
        name: The method's name.
        replacement: Is called with the method that was there and its arguments.
    """

    def __init__(self, module: nn.Module, name: str, replacement: Callable[..., Any]) -> None:
        self._module, self._name, self._replacement = module, name, replacement
        self._had, self._method = vars(module).get(name), getattr(module, name)
        self._is_on, self.is_idle = True, False
        update_wrapper(self, self._method)
        setattr(module, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What a call of the method gives."""
        if not self._is_on or (self.is_idle and torch.compiler.is_compiling()):
            return self._method(*args, **kwargs)
        return self._replacement(self._method, *args, **kwargs)

    def remove(self) -> None:
        """Puts back what was there; where another function was placed over this one, it stays and this is stock."""
        self._is_on = False
        if vars(self._module).get(self._name) is not self:
            return
        if self._had is None:
            delattr(self._module, self._name)
        else:
            setattr(self._module, self._name, self._had)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """What a copy of the module has: the method that was there before, bound to the copy."""
        twin = memo.get(id(self._module))
        if twin is None:
            return self
        return (
            MethodType(getattr(type(twin), self._name), twin) if self._had is None else copy.deepcopy(self._had, memo)
        )


class Keeper:
    """A hook that keeps what a module gives, without a break in the graph of compiled code.

    Args:
        kept: Has it as an attribute.
        name: Of the attribute.
    """

    def __init__(self, kept: threading.local, name: str) -> None:
        self._kept, self._name = kept, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keeps the output."""
        setattr(self._kept, self._name, output)


class Traced(partial[Any]):
    """A hook that compiled code is to have in its graph: what it keeps belongs to the thread, and it takes no lock."""


class _Hook(NotPickled):
    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    # Compiled models run hooks as they are, between their graphs: what they keep belongs to the running call.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _nothing


class _Traced(_Hook):
    """A hook that compiled code has in its graph."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


class _Idle(_Hook):
    """A hook that changes nothing, and is not there in compiled code."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if torch.compiler.is_compiling() else super().__call__(*args, **kwargs)


class _Marked:
    """Gives a module a `forward` of its own that is its class's, until `remove`."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._had = module, vars(module).get("forward")
        self._forward = module.forward = _Same(module.forward)

    def remove(self) -> None:
        """Puts back what was there, where nothing was placed over it since."""
        if vars(self._module).get("forward") is self._forward:
            delattr(self._module, "forward")
            vars(self._module).update({} if self._had is None else {"forward": self._had})


class _Same(partial[Any], NotPickled):
    """Calls a method without a frame of Python: one that all modules shared would have the graphs of all of them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        module = memo.get(id(getattr(self.func, "__self__", None)))
        return MethodType(type(module).forward, module) if module is not None else copy.deepcopy(self.func, memo)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A hook that changes neither arguments nor outputs."""
