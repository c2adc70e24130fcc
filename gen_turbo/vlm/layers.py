"""Decoder layers by route: each layer runs for the rows that chose it, in prefill and in every later call.

Shape names: B rows, L columns of the call, D decoder layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.select import keep_highest
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.cache import ShortenedCache, shortened
from gen_turbo.vlm.cache_argument import cache_in
from gen_turbo.vlm.call import Calls
from gen_turbo.vlm.counts import Counts, token_flops
from gen_turbo.vlm.hooks import InstanceMethod
from gen_turbo.vlm.images import Group, Images
from gen_turbo.vlm.masks import real_columns
from gen_turbo.vlm.routes import Prompt, Route, Routing
from gen_turbo.vlm.run import Reduction, pass_all
from gen_turbo.vlm.running import Running
from gen_turbo.vlm.stage import Handle, Stage
from gen_turbo.vlm.static import refuse_static

_ROUTER = "router"


class Choice:
    """What is chosen for the call that is running, by the scores of its prompt, asked for once.

    Attributes:
        routing: The chooser and its budget.
    """

    def __init__(self, routing: Routing, calls: Calls[Running]) -> None:
        self.routing, self._calls = routing, calls

    def ask(self, images: Images, embeds_BLC: Tensor, mask: Any) -> None:
        """Has a prompt scored."""
        prompt = Prompt(embeds_BLC, images.is_image_BL, real_columns(mask, embeds_BLC))
        self._calls.now.scores = self.routing.chooser(prompt), images

    def plan(self, tokens: Tensor, group: Group) -> TokenMap:
        """Keeps the tokens of highest score of each image of one size."""
        leaving = num_removed(group.length, self.routing.ratio)
        if leaving == 0:
            return pass_all(tokens, group)
        found = self._calls.now.scores
        assert found is not None
        scores, images = found
        return keep_highest(images.tokens(scores.token_BL, group), group.length - leaving)

    def route(self) -> Route | None:
        """Which rows run which layers; None in calls that bring no image."""
        found = self._calls.now.scores
        if found is None:
            return None
        scores, images = found
        return Route.of_scores(scores.layer_BD, self.routing.num_layers, images.is_image_BL.any(1))


class Skipping(Stage):
    """Runs each decoder layer for the rows that chose it only.

    A layer's cache holds those rows alone, so nothing has to be masked. The choice stays with the cache: later calls
    that go on with it, later images included, run the layers that its first prompt chose. Without a cache every call
    is a prompt and chooses anew.
    """

    def __init__(self, text: nn.Module, calls: Calls[Running], choice: Choice) -> None:
        self._text, self._calls, self._choice = text, calls, choice

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Puts hooks on the language model and takes the place of its layers' `forward`."""
        layers: Any = self._text.layers
        yield self._text.register_forward_pre_hook(self._before_text, with_kwargs=True)
        yield self._text.register_forward_hook(self._after_text, with_kwargs=True)
        for index, layer in list(enumerate(layers))[1:]:
            yield InstanceMethod(layer, "forward", self._run(index))

    def _before_text(self, text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call, cache = self._calls.now, cache_in(kwargs)
        call.route = cache.route if isinstance(cache, ShortenedCache) else None
        call.is_prompt = call.scores is not None and (cache is None or cache.get_seq_length() == 0)
        if not call.is_prompt:
            return
        route = self._choice.route()
        call.route = None if route is None or route.is_whole else route
        if cache is not None and (call.route is not None or self._choice.routing.ratio):
            if call.route is not None or self._choice.routing.first:
                refuse_static(cache)
            shortened(cache)

    def _after_text(self, text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call, cache = self._calls.now, cache_in(kwargs)
        if call.is_prompt and call.route is not None and cache is not None:
            shortened(cache).route = call.route

    def _run(self, index: int) -> Any:
        def run(forward: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
            route = self._calls.now.route
            rows = route.rows(index, hidden_states.device) if route is not None else None
            if rows is None:
                return forward(hidden_states, **kwargs)
            if len(rows) == 0:
                return hidden_states
            taken = {name: _rows(name, value, rows, len(hidden_states)) for name, value in kwargs.items()}
            return hidden_states.index_copy(0, rows, forward(hidden_states.index_select(0, rows), **taken))

        return run


def _rows(name: str, value: Any, rows: Tensor, batch: int) -> Any:
    """The rows of one argument of a decoder layer; a batch axis of 1 serves every row."""
    if isinstance(value, tuple):
        return tuple(_rows(name, one, rows, batch) for one in value)
    if not isinstance(value, Tensor):
        return value
    dim = value.ndim - {"position_embeddings": 3, "position_ids": 2}.get(name, value.ndim)
    return value.index_select(dim, rows) if value.shape[dim] == batch else value


class RoutedCounts(Stage):
    """Counts the tokens that each decoder layer ran on, for the report.

    Args:
        text: The language model.
        path: Its path.
        calls: The calls of the base model.
        counts: Receives the rows.
        routing: The chooser and its budget.
    """

    def __init__(self, text: Any, path: str, calls: Calls[Running], counts: Counts, routing: Routing) -> None:
        self._text, self._calls, self._counts, self._routing = text, calls, counts, routing
        depth = text.config.num_hidden_layers
        self._costs = {f"{path}.layers.{index}": token_flops(text, index, index + 1) for index in range(depth)}
        counts.add(_ROUTER, "the router itself")
        for name in self._costs:
            counts.add(name)

    @property
    def depth(self) -> int:
        """Decoder layers."""
        return len(self._costs)

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Puts a hook on the language model."""
        yield self._text.register_forward_hook(self._after_text)

    def note(self, first: int, images: Images, reduction: Reduction) -> None:
        """Remembers what stays of a prompt until its layers have run."""
        self._calls.now.keep_BL = reduction.keep_BL

    def _after_text(self, text: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self._calls.now
        if call.scores is None:
            return
        batch, length = call.scores[1].is_image_BL.shape
        kept = [length] * batch if call.keep_BL is None else call.keep_BL.sum(1).tolist()
        for index, (name, cost) in enumerate(self._costs.items()):
            runs = [True] * batch if call.route is None else call.route.runs_BD[:, index].tolist()
            counts = kept if index >= self._routing.first else [length] * batch
            before, after = batch * length, sum(n for n, is_run in zip(counts, runs, strict=True) if is_run)
            self._counts.count(name, before, after, flops=after * cost, stock_flops=before * cost)
        self._counts.add_flops(_ROUTER, self._routing.chooser.flops(batch, length))
