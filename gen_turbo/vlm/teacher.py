"""What a frozen vision-language model says by itself, and what it would have said on any route.

Shape names: B prompts, K routes of each, L columns of a prompt, T tokens of an answer, V words, D decoder layers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_turbo.api import attach
from gen_turbo.method import LayerInfo, StepInfo, TokenReducer
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.masks import real_columns
from gen_turbo.vlm.routes import Prompt, Routed, Routing, Scores

_TEXT = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Answers:
    """What a model says to prompts by itself.

    Attributes:
        answer_BT: Its greedy answers.
        logits_BTV: What they were chosen from.
        counts_BT: True up to the end of each answer, the end included.
    """

    answer_BT: Tensor
    logits_BTV: Tensor
    counts_BT: Tensor

    def behind(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of the prompts with the answers but their last token behind them."""
        told_BT = self.answer_BT[:, :-1]
        longer = {
            name: F.pad(value, (0, told_BT.shape[1]), value=int(name == "attention_mask"))
            for name, value in inputs.items()
            if name in _TEXT
        }
        return {**inputs, **longer, "input_ids": torch.cat([inputs["input_ids"], told_BT], 1)}

    def moved(self, logits: Tensor) -> Tensor:
        """KL(own || other) of each word, nats, zero behind the ends: (..., B, T) for logits (..., B, L, V), L >= T."""
        own_BTV = self.logits_BTV.log_softmax(-1)
        other = logits[..., -own_BTV.shape[1] :, :].float().log_softmax(-1)
        each: Tensor = (own_BTV.exp() * (own_BTV - other)).sum(-1) * self.counts_BT
        return each


@dataclass(frozen=True)
class Lesson(Answers):
    """Prompts with the model's own answers.

    Attributes:
        inputs: The text arguments of the prompts, with sizes of their images where the model wants them.
        images: What the vision tower gave for their images.
        prompt: The prompts as the language model read them.
    """

    inputs: dict[str, Tensor]
    images: Any
    prompt: Prompt


class Teacher:
    """A frozen model that answers prompts and is asked again on other routes.

    Args:
        model: Any vision-language model that a router can be attached to; nothing is attached while it is not asked.
        max_new_tokens: The longest answer.
    """

    def __init__(self, model: Any, max_new_tokens: int = 16) -> None:
        self.model = model
        self._settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            # An image's mark is no word: an answer that held one could not be read again.
            "suppress_tokens": [model.config.image_token_id],
            "do_sample": False,
            "num_beams": 1,
            "output_logits": True,
            "return_dict_in_generate": True,
        }

    @torch.no_grad()
    def lesson(self, inputs: Mapping[str, Tensor]) -> Lesson:
        """Has prompts answered; `inputs` are those of the model's preparer, padded on the left."""
        given = {name: value for name, value in inputs.items() if name in _TEXT}
        shown = {name: value for name, value in inputs.items() if name not in _TEXT}
        images = self.model.get_image_features(**shown)
        rest = {name: value for name, value in shown.items() if name.startswith("image_grid")}
        seen: list[Prompt] = []
        text: nn.Module = self.model.get_decoder()
        handle = text.register_forward_pre_hook(self._listener(given["input_ids"], seen), with_kwargs=True)
        try:
            out = self.model.generate(**given, **rest, mm_encoder_outputs={"image": images}, **self._settings)
        finally:
            handle.remove()
        answer = out.sequences[:, given["input_ids"].shape[1] :]
        ends = torch.tensor(self._ends, device=answer.device)
        is_end = torch.isin(answer, ends)
        counts = (is_end.cumsum(1) - is_end.long()) == 0
        return Lesson(answer, torch.stack(out.logits, 1).float(), counts, {**given, **rest}, images, seen[0])

    def divergence(self, lesson: Lesson, scores: Scores, routing: Routing) -> Tensor:
        """How far the model's answers move on given routes.

        Args:
            lesson: B prompts.
            scores: Of K * B rows, the B prompts K times over: token_BL and layer_BD.
            routing: Budget and form; its chooser is not asked.

        Returns:
            KL(own || routed), mean over the answer's tokens, (K, B). It has a gradient where `scores` do and the form
            is "soft".
        """
        routes = len(scores.layer_BD) // len(lesson.answer_BT)
        length = lesson.answer_BT.shape[1] - 1
        given = lesson.behind(lesson.inputs)
        given = {name: value.repeat(routes, *[1] * (value.ndim - 1)) for name, value in given.items()}
        forced = _Given(Scores(F.pad(scores.token_BL, (0, length)), scores.layer_BD))
        routing = replace(routing, chooser=forced)
        reducer = _Forced(forced, routing.ratio, routing.num_layers, routing.first, routing.mode)
        with attach(self.model, reducer):
            encoded = {"image": _tiled(lesson.images, routes)}
            logits = self.model(**given, mm_encoder_outputs=encoded, use_cache=False).logits
        divergence: Tensor = lesson.moved(logits.unflatten(0, (routes, -1))).sum(-1) / lesson.counts_BT.sum(-1)
        return divergence

    def _listener(self, ids_BL: Tensor, seen: list[Prompt]) -> Any:
        """Keeps the prompt of the first call."""

        def before(text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not seen:
                embeds = kwargs["inputs_embeds"]
                real = real_columns(kwargs.get("attention_mask"), embeds)
                seen.append(Prompt(embeds, ids_BL == self.model.config.image_token_id, real))

        return before

    @property
    def _ends(self) -> list[int]:
        end = self.model.generation_config.eos_token_id
        return [] if end is None else list(end) if isinstance(end, (list, tuple)) else [int(end)]


def _tiled(images: Any, times: int) -> Any:
    """The tower's output for the same images several times over."""
    tiled = copy.copy(images)
    for name in ("pooler_output", "deepstack_features"):
        value = getattr(images, name, None)
        if isinstance(value, Tensor):
            setattr(tiled, name, torch.cat([value] * times))
        elif value is not None and name == "pooler_output":
            setattr(tiled, name, list(value) * times)
        elif value is not None:
            setattr(tiled, name, [torch.cat([one] * times) for one in value])
    return tiled


class _Given:
    """Scores that are known already."""

    def __init__(self, scores: Scores) -> None:
        self._scores = scores

    def __call__(self, prompt: Prompt) -> Scores:
        return self._scores

    def flops(self, batch: int, length: int) -> int:
        return 0


class _Forced(TokenReducer, Routed):
    """Any routing as a reducer."""

    def __init__(self, *settings: Any) -> None:
        super().__init__(0.0)
        self._routing = Routing(*settings)

    def routing(self, model: nn.Module, text: nn.Module) -> Routing:
        return self._routing

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        return TokenMap.identity(1, tokens.shape[1], tokens.device)
