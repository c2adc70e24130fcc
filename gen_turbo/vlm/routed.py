"""A routed method on one vision-language model: the route of each prompt, what it does to a call, and the way back."""

from __future__ import annotations

from dataclasses import replace
from threading import Lock
from typing import Any

from torch import Tensor, nn

from gen_turbo.engine.base import LayerReport, OnModel
from gen_turbo.method import TokenReducer
from gen_turbo.training.layouts import layer_multiplications
from gen_turbo.vlm.call import CallState
from gen_turbo.vlm.decoder import Cut, check_cut
from gen_turbo.vlm.family import Family
from gen_turbo.vlm.gate import Gate
from gen_turbo.vlm.hooks import placed, settle
from gen_turbo.vlm.layers import Choice, Skipping
from gen_turbo.vlm.origin import Seen
from gen_turbo.vlm.routes import Route, Routed, Routing
from gen_turbo.vlm.run import Images, Reduction
from gen_turbo.vlm.settings import check_settings
from gen_turbo.vlm.weighing import Weighing

_ROUTER = "the router itself"


class RoutedPart(OnModel):
    """A routed method on one model.

    Raises:
        ValueError: If the family cannot be routed, or the routing does not fit the model.
    """

    _prompt: CallState[tuple[int, int] | None] = CallState(lambda: None)
    _keep_BL: CallState[Tensor | None] = CallState(lambda: None)
    _route: CallState[Route | None] = CallState(lambda: None)

    def __init__(self, model: nn.Module, family: Family, reducer: TokenReducer) -> None:
        super().__init__(model)
        assert isinstance(reducer, Routed)
        self.reducer = reducer
        self._family = family
        self._handles: list[Any] = []
        self._counting = Lock()
        name = type(model).__name__
        if family.is_cross:
            raise ValueError(f"{name} has no image tokens in its prompt; a router cannot choose among them")
        text: Any = model.get_submodule(family.text)
        check_settings(reducer, name, family.grids is not None)
        self._routing = routing = reducer.routing(model, text)
        _check(model, text, routing)
        self._choice = Choice(routing)
        drops = routing.mode == "drop" and routing.ratio > 0
        planner = self._choice.plan if drops and routing.first == 0 else None
        self._gate = Gate(model.get_submodule(family.base), text, family, planner, False)
        self._cut = Cut(text, self._gate, {routing.first: self._choice.plan}) if drops and routing.first else None
        self._layers = Skipping(text, self._choice) if routing.mode == "drop" else Weighing(text, self._choice)
        self._listen(text)

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The decoder layers."""
        return tuple(name for name, row in self._rows.items() if row.status == "reduced")

    @property
    def remembered_bytes(self) -> int:
        """Bytes held now between the calls of the model: the features of the images seen last."""
        return self._gate.seen.num_bytes

    @property
    def most_remembered_bytes(self) -> int:
        """The most bytes held at once: nothing is kept of images seen before."""
        return self.remembered_bytes

    def rows(self) -> list[LayerReport]:
        """One row per decoder layer, of tokens that a prompt brings and tokens that the layer runs on."""
        return list(self._rows.values())

    def install(self) -> None:
        """Puts every hook in place."""
        if not self._is_whole:
            self._handles.append(self._gate.watch(lambda seen: None))
            for stage in (self._gate, self._layers, self._cut):
                placed(stage.install() if stage is not None else (), self._handles)
            text = self.model.get_submodule(self._family.text)
            self._handles.append(text.register_forward_hook(lambda module, args, output: self._after_text()))
            settle(self.model, self._handles)

    def remove(self) -> None:
        """Takes every hook off; doing it twice is harmless."""
        for handle in reversed(self._handles):
            handle.remove()
        self._handles = []
        self._gate.seen = Seen()
        self._choice.forget()

    @property
    def _is_whole(self) -> bool:
        """Whether everything is kept, so that there is nothing to choose."""
        routing = self._routing
        return routing.mode != "soft" and routing.ratio == 0 and routing.num_layers >= len(self._costs)

    def _listen(self, text: Any) -> None:
        layers = list(text.layers)[: text.config.num_hidden_layers]
        # Operations of one token in a layer, without attention between tokens.
        self._costs = [2 * layer_multiplications(one, text.config) for one in layers]
        self._names = [f"{self._family.text}.layers.{index}" for index in range(len(layers))]
        self._rows = {_ROUTER: LayerReport("router", 1, _ROUTER)}
        self._rows |= {name: LayerReport(name, 1, "reduced") for name in self._names}
        self._gate.joined += [self, self._choice, self._layers]
        self._gate.on_prompt = self._ask
        self._gate.on_reduction = self._note_tokens
        if self._cut is not None:
            self._cut.on_reduction = lambda first, images, reduction: self._note_tokens(images, reduction)
        if isinstance(self._layers, Skipping):
            self._layers.on_route = self._note_route
            if self._cut is not None:
                self._cut.is_skipped = self._layers.is_skipped

    def _ask(self, images: Images, embeds_BLC: Tensor, mask: Any) -> None:
        self._prompt, self._keep_BL, self._route = (embeds_BLC.shape[0], embeds_BLC.shape[1]), None, None
        self._choice.ask(images, embeds_BLC, mask)

    def _note_tokens(self, images: Images, reduction: Reduction) -> None:
        self._keep_BL = reduction.keep_BL

    def _note_route(self, route: Route | None) -> None:
        self._route = route

    def _after_text(self) -> None:
        """Counts what each layer did for a prompt."""
        if self._prompt is None:
            return
        batch, length = self._prompt
        kept = [length] * batch if self._keep_BL is None else self._keep_BL.sum(1).tolist()
        for index, (name, cost) in enumerate(zip(self._names, self._costs, strict=True)):
            runs = [True] * batch if self._route is None else self._route.runs_BD[:, index].tolist()
            counts = kept if index >= self._routing.first else [length] * batch
            self._count(name, batch * length, sum(n for n, is_run in zip(counts, runs, strict=True) if is_run), cost)
        with self._counting:
            row = self._rows[_ROUTER]
            self._rows[_ROUTER] = replace(row, flops=row.flops + self._routing.chooser.flops(batch, length))
        self._prompt = self._keep_BL = self._route = None

    def _count(self, name: str, before: int, after: int, cost: int) -> None:
        is_full = before == after
        with self._counting:
            row = self._rows[name]
            self._rows[name] = replace(
                row,
                num_tokens=before,
                num_kept=after,
                num_full=row.num_full + is_full,
                num_reduced=row.num_reduced + (not is_full),
                flops=row.flops + after * cost,
                stock_flops=row.stock_flops + before * cost,
            )


def _check(model: nn.Module, text: Any, routing: Routing) -> None:
    """Says before anything is changed why a routing does not fit a model."""
    config = text.config
    if not 1 <= routing.num_layers <= config.num_hidden_layers:
        raise ValueError(
            f"{routing.num_layers} layers are to run, but {type(model).__name__} has {config.num_hidden_layers}"
        )
    # Before the first layer only sliding windows are in the way.
    check_cut(model, config, routing.first or config.num_hidden_layers - 1, "first")
    attention = config._attn_implementation
    if routing.mode != "drop" and "flash" in (attention or ""):
        raise ValueError(f"mode={routing.mode!r} hides tokens by a mask, which {attention} does not take; use 'sdpa'")
