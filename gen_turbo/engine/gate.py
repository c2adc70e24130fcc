"""A gate in front of one module: it lets a call through, answers it by a forecast, or with zeros that nobody reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gen_turbo.engine.base import Form
from gen_turbo.engine.call import flat, like
from gen_turbo.engine.compiled import outside
from gen_turbo.engine.forward import InForward
from gen_turbo.engine.routing import Routing
from gen_turbo.engine.values import mapped, refilled, tensors

_OTHER_STREAM = "encoder_hidden_states"


class Gate(InForward):
    """Takes the place of a module's `forward`; its result is what is remembered and forecast.

    Attributes:
        names: Names of what the module takes by position.
    """

    def __init__(self, name: str, module: nn.Module, routing: Routing) -> None:
        super().__init__(name, module)
        self.routing = routing
        self.names = tuple(inspect.signature(type(module).forward).parameters)[1:]

    def as_placed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A forward that compiled code does not look into."""
        return outside(forward)

    def answer(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the module or stands for it, as the route of the running call asks."""
        memory, action = self.routing.memory, self.routing.actions.get(self.name)
        if memory is None:
            return inner(*args, **kwargs)
        if action == "idle":
            return mapped(memory.shapes[self.name], _zeros)
        if action is not None:
            return refilled(memory.shapes[self.name], self.routing.forecast(self.name))
        result = inner(*args, **kwargs)
        memory.note_shape(self.name, result)
        self.routing.keep(self.name, lambda: [tensor.detach().clone() for tensor in tensors(result)])
        return result


class RootGate(Gate):
    """The gate of the whole model, which opens and closes the route of a call."""

    def answer(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answers within the route of the running call."""
        self.routing.begin(kwargs.get("return_dict", True))
        try:
            return super().answer(inner, args, kwargs)
        finally:
            self.routing.end()


class BlockGate(Gate):
    """The gate of a block with a residual stream: the change that it adds is remembered and forecast.

    Hooks see what goes in and comes out of the whole block, also where another hook shortens it on the way.
    """

    def __init__(self, name: str, module: nn.Module, routing: Routing, form: Form) -> None:
        super().__init__(name, module, routing)
        self.form = form
        self._handles: list[RemovableHandle] = []

    def install(self) -> None:
        """Replaces the forward and hooks the block."""
        super().install()
        module: Any = self._module()
        self._handles = [
            module.register_forward_pre_hook(outside(self._enter), with_kwargs=True, prepend=True),
            module.register_forward_hook(outside(self._leave)),
        ]

    def remove(self) -> None:
        """Takes the hooks off and puts the forward back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        super().remove()

    def answer(self, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs the block, or adds the change as it is forecast."""
        memory = self.routing.memory
        if memory is None or self.name not in self.routing.actions:
            return inner(*args, **kwargs)
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        changes = self.routing.forecast(self.name)
        outputs = flat(memory.shapes[self.name])
        given = [self._given(arguments, index, shape) for index, shape in enumerate(outputs)]
        left = iter(changes)
        return like(
            [
                None if shape is None else next(left) if before is None else before + next(left)
                for shape, before in zip(outputs, given, strict=True)
            ]
        )

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.routing.is_kept(self.name):
            self.routing.entered[self.name] = {**dict(zip(self.names, args, strict=False)), **kwargs}

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        memory, arguments = self.routing.memory, self.routing.entered.pop(self.name, None)
        if memory is None or arguments is None:
            return
        outputs = flat(output)
        memory.note_shape(self.name, output)
        given = [self._given(arguments, index, value) for index, value in enumerate(outputs)]
        changes = [
            value.detach().clone() if before is None else value.detach() - before.detach()
            for value, before in zip(outputs, given, strict=True)
            if value is not None
        ]
        self.routing.keep(self.name, lambda: changes)

    def _given(self, arguments: dict[str, Any], index: int, output: Tensor | None) -> Tensor | None:
        """The input that an output adds to; None where there is none of its shape."""
        given = arguments.get(self.form.tokens if index in self.form.outputs else _OTHER_STREAM)
        is_same = isinstance(given, Tensor) and output is not None and given.shape == output.shape
        return given if is_same else None


class Gates:
    """The gates of all modules that a routing skips or leaves idle, that of the whole model first.

    Args:
        model: The model; nothing is changed yet.
        routing: What the gates ask; without units there are no gates.
        root: The gate of the whole model.
    """

    def __init__(self, model: nn.Module, routing: Routing, root: type[RootGate] = RootGate) -> None:
        gates: dict[str, Gate] = {"": root("", model, routing)} if routing.units else {}
        for unit in routing.units.values():
            for name in (unit.module, *unit.idle):
                if name in gates:
                    continue
                module = model.get_submodule(name)
                if name == unit.module and unit.form is not None:
                    gates[name] = BlockGate(name, module, routing, unit.form)
                else:
                    gates[name] = Gate(name, module, routing)
        self._gates = tuple(gates.values())

    def install(self) -> None:
        """Puts all gates in place."""
        for gate in self._gates:
            gate.install()

    def remove(self) -> None:
        """Takes all gates off."""
        for gate in reversed(self._gates):
            gate.remove()


def _zeros(shape: Tensor) -> Tensor:
    return shape.new_zeros(shape.shape)
