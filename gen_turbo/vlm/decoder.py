"""Decoder layers in prefill: image tokens leave from one layer on, and every later layer's mask and cache follow.

Shape names: B rows, L columns that reach the first layer, M of them that stay, C channels, H heads, D channels of one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from gen_turbo.vlm.cache import ShortenedCache
from gen_turbo.vlm.cache_argument import cache_in
from gen_turbo.vlm.call import CallState
from gen_turbo.vlm.columns import Columns
from gen_turbo.vlm.gate import Gate
from gen_turbo.vlm.masks import check_mask
from gen_turbo.vlm.run import Images, Planner, Reduction, reduce

Attention = Callable[[str], Tensor]
"""Gives, by the name of a layer, the attention (B, M) that the last token of each row pays there to every column.

"last" is the layer before the cut, "next" the first one behind it, as it would run without the cut.
"""


class Cut:
    """The hooks on the decoder layers behind the first of one or more cuts.

    Attributes:
        attention: Attention of the last token around the cut that is planned, for methods that ask for it.
        images: The images in the columns that enter the layer that runs; None in calls that bring none.
        on_reduction: Receives the first layer of a cut, the images before it and what left.
        is_skipped: Whether no row of this call runs a layer, which then needs no mask.

    Args:
        text: The language model.
        gate: What knows the running call.
        planners: What plans each cut, by its first layer without the dropped tokens.
    """

    attention: CallState[Attention] = CallState(lambda: _no_attention)
    _here: CallState[Columns | None] = CallState(lambda: None)
    images: CallState[Images | None] = CallState(lambda: None)
    _shorter: CallState[dict[str, Any]] = CallState(dict)

    def __init__(self, text: nn.Module, gate: Gate, planners: Mapping[int, Planner]) -> None:
        self.on_reduction: Callable[[int, Images, Reduction], None] = lambda first, images, reduction: None
        self.is_skipped: Callable[[int], bool] = lambda index: False
        self._text, self._gate, self._planners, self._first = text, gate, planners, min(planners)
        stack: Any = text
        self._layers: list[nn.Module] = list(stack.layers)[: stack.config.num_hidden_layers]
        gate.joined.append(self)

    def install(self) -> Iterator[Any]:
        """Puts the hooks in place, one after the other, and gives the handle of each."""
        for index in range(self._first - 1, len(self._layers)):
            layer = self._layers[index]
            if index >= self._first:
                yield layer.register_forward_pre_hook(self._hook(index), with_kwargs=True)
            if index + 1 in self._planners:
                # Behind the hook above, so that it sees what the layer will.
                yield layer.register_forward_pre_hook(self._before_cut(index + 1), with_kwargs=True)

    def _before_cut(self, first: int) -> Any:
        """Remembers what enters the layer before a cut until the cut is made."""

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if first == self._first:
                self._here, self.images = None, self._gate.images
            self.attention = _no_attention
            if self.images is not None:
                hidden = args[0] if args else kwargs["hidden_states"]
                real, rotary = self._real(kwargs.get("attention_mask")), kwargs["position_embeddings"]
                self.attention = lambda name: last_attention(layer, hidden, rotary, real)

        return before

    def _hook(self, index: int) -> Any:
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if index in self._planners and self.images is not None:
                hidden = self._cut(index, layer, hidden, kwargs, self.images)
            total = self._total(index, cache_in(kwargs))
            if total is None:
                return None
            changed = dict(kwargs)
            if self._here is not None:
                changed.update(self._positions(kwargs))
            if not self.is_skipped(index):
                changed["attention_mask"] = self._mask(kwargs, hidden, total, index)
            changed.pop("hidden_states", None)
            return (hidden, *args[1:]), changed

        return before

    def _cut(self, first: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], images: Images) -> Tensor:
        """Plans one cut; gives back the columns that enter its first layer."""
        gate, mask, cache = self._gate, kwargs.get("attention_mask"), cache_in(kwargs)
        real, before = self._real(mask), self.attention

        def attention(name: str) -> Tensor:
            if name != "next":
                return before(name)
            rotary = kwargs["position_embeddings"] if self._here is None else self._positions(kwargs)
            rotary = rotary["position_embeddings"] if isinstance(rotary, dict) else rotary
            return last_attention(layer, hidden, rotary, real)

        self.attention = attention
        reduction = reduce(images, hidden, self._planners[first], gate.shared)
        self.attention = _no_attention
        check_mask(mask)
        reduction.num_columns = hidden.shape[0] * hidden.shape[1]
        if not reduction.is_identity:
            step = Columns.of_kept(reduction.keep_BL if real is None else reduction.keep_BL & real)
            reduction.num_columns = hidden.shape[0] * step.num_kept
            self._here = step if self._here is None else self._here.then(step)
            self._shorter = {}
            self.images = images.shortened(step, reduction)
            hidden = step.take(hidden, 1)
        self.on_reduction(first, images, reduction)
        if self._here is not None:
            known = cache.cut_at(first) if isinstance(cache, ShortenedCache) else None
            held = Columns.all_of(len(hidden), gate.held, hidden.device) if known is None else known
            gate.cuts[first] = held.grown(gate.held).beside(self._here)
            gate.dropped = self._here
        return hidden

    def _real(self, mask: Tensor | None) -> Tensor | None:
        """Which columns that enter a layer are no padding; None if all are."""
        here = self._here
        if here is None:
            return _real(self._gate, mask)
        return here.valid_BM if here.is_ragged else None

    def _total(self, index: int, cache: Any) -> Columns | None:
        """Which of the first layer's columns, held and new, this layer works on; None if on all."""
        made = [first for first in self._gate.cuts if first <= index]
        if made:
            return self._gate.cuts[max(made)]
        known = cache.cut_at(index) if isinstance(cache, ShortenedCache) else None
        return known.grown(self._gate.held + self._gate.length) if known is not None else None

    def _positions(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The positions of the columns that stay, taken once for all layers that are given the same ones."""
        here, given = self._here, tuple(map(id, kwargs["position_embeddings"]))
        assert here is not None
        if self._shorter.get("given") != given:
            rotary = tuple(here.take(table, -2, batch_dim=-3) for table in kwargs["position_embeddings"])
            positions = kwargs.get("position_ids")
            ids = None if positions is None else here.take(positions, -1, batch_dim=-2)
            self._shorter = {"given": given, "position_embeddings": rotary, "position_ids": ids}
        return {name: self._shorter[name] for name in ("position_embeddings", "position_ids")}

    def _mask(self, kwargs: dict[str, Any], hidden: Tensor, total: Columns, index: int) -> Tensor | None:
        mask = kwargs.get("attention_mask")
        if mask is None:
            if not total.is_ragged:
                return None
            cache = cache_in(kwargs)
            made: Tensor | None = create_causal_mask(
                self._text.config, hidden, total.valid_BM.long(), cache, layer_idx=index
            )
            return made
        if mask.ndim == 2:
            return total.mask(mask)
        keys = total.keys(mask)
        return keys if self._here is None else self._here.queries(keys)


def last_attention(
    layer: nn.Module, hidden_BLC: Tensor, rotary: tuple[Tensor, Tensor], real_BL: Tensor | None
) -> Tensor:
    """Computes the attention that the last token of each row pays to every column of this call, averaged over heads.

    One row of queries against all keys, so that no attention matrix is made and any attention kernel will do: the
    score of FastV (Chen et al., 2024, arXiv 2403.06764, as released).

    Args:
        layer: A decoder layer whose attention has `q_proj`, `k_proj` and, in some models, norms on heads.
        hidden_BLC: What enters the layer.
        rotary: Cosine and sine of the positions, (b, L, D).
        real_BL: False where a column is padding.

    Returns:
        (B, L), every row summing to one.
    """
    attn: Any = layer.self_attn
    rotate = getattr(sys.modules[type(attn).__module__], "apply_rotary_pos_emb")  # noqa: B009  a name mypy cannot know
    batch, length = hidden_BLC.shape[:2]
    column = torch.arange(length, device=hidden_BLC.device).expand(batch, -1)
    last = column[:, -1] if real_BL is None else column.masked_fill(~real_BL, -1).amax(1)
    normed = layer.input_layernorm(hidden_BLC)  # type: ignore[operator]
    query = _heads(attn, "q", normed[torch.arange(batch, device=last.device), last][:, None])
    key = _heads(attn, "k", normed)
    tables = [table.expand(batch, -1, -1) for table in rotary]
    at_last = [table[torch.arange(batch, device=last.device), last][:, None] for table in tables]
    query, key = rotate(query, query, *at_last)[0], rotate(key, key, *tables)[0]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = (query @ key.transpose(-1, -2)).float()[:, :, 0] * attn.scaling
    if real_BL is not None:
        logits = logits.masked_fill(~real_BL[:, None], torch.finfo(logits.dtype).min)
    attention: Tensor = logits.softmax(-1).mean(1)
    return attention


def check_cut(model: nn.Module, config: Any, first: int, setting: str = "layer") -> None:
    """Says before anything is changed why tokens cannot leave at a layer, which the user gave as `setting`.

    Raises:
        ValueError: If the layer is none of the model's, has a sliding window, or comes before later image features.
    """
    name = type(model).__name__
    if not first < config.num_hidden_layers:
        raise ValueError(f"{setting}={first} is not one of the {config.num_hidden_layers} layers of {name}")
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        advice = "; use place='pre_llm'" if setting == "layer" else ""
        raise ValueError(f"{name} has layers with sliding windows, whose masks cannot follow a cut{advice}")
    stacked = len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    if first < stacked:
        raise ValueError(f"{name} adds image features up to layer {stacked - 1}; use {setting}={stacked} or later")


def _heads(attn: Any, kind: str, normed: Tensor) -> Tensor:
    """Queries or keys by head, (B, H, L, D), with the norm that some models put on them."""
    projected: Tensor = getattr(attn, f"{kind}_proj")(normed)
    heads = projected.reshape(*projected.shape[:2], -1, attn.head_dim)
    norm = getattr(attn, f"{kind}_norm", None)
    heads = norm(heads) if norm is not None else heads
    return heads.transpose(1, 2)


def _real(gate: Gate, mask: Tensor | None) -> Tensor | None:
    """Which columns of this call are no padding, from the 2D mask or from what the last query may see."""
    if isinstance(gate.real_BM, Tensor) and gate.real_BM.ndim == 2:
        return gate.real_BM[:, -gate.length :].bool()
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return None
    seen = mask[:, 0, -1, -gate.length :]
    return seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2


def _no_attention(name: str) -> Tensor:
    raise ValueError("attention of the last token is known only while a cut is planned; use place='decoder'")
