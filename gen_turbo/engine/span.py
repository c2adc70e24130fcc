"""Consecutive blocks on one short sequence: merged before the first, restored after the last.

In a refresh each block runs on the merged sequence too, right after it ran in full, so that nothing of the span need be
kept until its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gen_turbo.engine.layer import ReducedLayer, shorten
from gen_turbo.engine.state import Phase
from gen_turbo.kernels import merge

_BETWEEN_BLOCKS = ("controlnet", "skip_layers")


@dataclass
class Span:
    """What the blocks of a span hand on in the running call.

    Attributes:
        long: The tokens that the first block was given; None where the span runs in full.
        short: The same, merged.
        carried: In a refresh, what the merged sequence has become: arguments of the next block.
    """

    long: Tensor | None = None
    short: Tensor | None = None
    carried: dict[str, Any] = field(default_factory=dict)


class SpanBlock(ReducedLayer):
    """One block of a span of several; all of them share the state of the first.

    The first, those between and the last are classes of their own, each with a `forward`, for torch.compile makes no
    more than a few graphs of one function.

    Attributes:
        span: What its blocks hand on.
    """

    span = Span()
    is_first = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a block between the first and the last as the phase says."""
        span = self.span
        if self.phase is Phase.FULL or span.long is None:
            return self.inner(*args, **kwargs)
        given = dict(zip(self.names[: len(args)], args, strict=True))
        given.update(kwargs)
        full = None
        if self.phase is Phase.REFRESH:
            full = self.inner(**given)
            given.update(span.carried)
        shorten(self, given, span.long)
        output = self.inner(**given)
        if full is None:
            return output
        span.carried = self.handed_on(output)
        return full

    def handed_on(self, output: Any) -> dict[str, Any]:
        """The arguments of the next block that the output of this one becomes."""
        if not isinstance(output, tuple):
            return {self.tokens: output}
        place = self.outputs[0]
        carried = {self.tokens: output[place]}
        if len(output) == 2:
            carried[self.spec.signature.carries] = output[1 - place]
        return carried


class FirstBlock(SpanBlock):
    """The block that merges; the span runs in full where its arguments do not allow it."""

    is_first = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the block as the phase says."""
        span = self.span
        span.long, span.short, span.carried = None, None, {}
        if self.phase is Phase.FULL:
            return self.inner(*args, **kwargs)
        given = dict(zip(self.names[: len(args)], args, strict=True))
        given.update(kwargs)
        if not self.may_merge(given):
            return self.inner(**given)
        full = self.inner(**given) if self.phase is Phase.REFRESH else None
        tokens, run_map = given[self.tokens], self.state.map
        assert run_map is not None
        span.long = tokens
        span.short = given[self.tokens] = merge(tokens, run_map.order, run_map.offsets, run_map.share)
        shorten(self, given, tokens)
        output = self.inner(**given)
        if full is None:
            return output
        span.carried = self.handed_on(output)
        return full


class LastBlock(SpanBlock):
    """The block that restores."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the block as the phase says."""
        span = self.span
        if self.phase is Phase.FULL or span.long is None:
            return self.inner(*args, **kwargs)
        given = dict(zip(self.names[: len(args)], args, strict=True))
        given.update(kwargs)
        full = None
        if self.phase is Phase.REFRESH:
            full = self.inner(**given)
            given.update(span.carried)
        long, short = span.long, span.short
        shorten(self, given, long)
        output = self.inner(**given)
        span.long, span.short, span.carried = None, None, {}
        if full is None:
            return self.restored(output, long, short)
        self.remember(full, output if isinstance(output, tuple) else (output,), long, short)
        return full


def spans_of(
    model: nn.Module, layers: Iterable[ReducedLayer], length: int, is_whole: bool = False
) -> list[list[ReducedLayer]]:
    """Cuts consecutive blocks of one ratio into spans.

    Args:
        model: The model.
        layers: Its blocks, in the order in which they run.
        length: The most blocks of a span; 0 sets no limit.
        is_whole: Whether a span goes on from one stack into the next.

    Raises:
        ValueError: If a block takes what an earlier one gave, as with long skip connections, or the model reads every
            token between any two blocks.
    """
    spans: list[list[ReducedLayer]] = []
    for layer in layers:
        if spans and _follows(spans[-1][-1], layer, is_whole) and (length == 0 or len(spans[-1]) < length):
            spans[-1].append(layer)
        else:
            spans.append([layer])
    if any(len(span) > 1 and span[-1].spec.signature.also for span in spans):
        raise ValueError(
            f"the blocks of {type(model).__name__} are linked across spans; use scope='block' with merge_span=1"
        )
    if length != 1 and len(spans) > 1 and all(span[-1].spec.ends_span for span in spans):
        raise ValueError(
            f"no blocks of {type(model).__name__} can share a short sequence, for it reads every token between them; "
            "use scope='block' with merge_span=1"
        )
    return spans


def joined(layers: list[ReducedLayer]) -> list[SpanBlock]:
    """The same layers, two or more, as the blocks of one span."""
    span, blocks = Span(), []
    for kind, layer in zip((FirstBlock, *[SpanBlock] * (len(layers) - 2), LastBlock), layers, strict=True):
        block = kind(layer.spec, layer.module, layer.ratio, layer.beginning)
        block.span = span
        blocks.append(block)
    return blocks


def check_between(arguments: Mapping[str, Any]) -> None:
    """Raises ValueError if the model is asked to add to, or to leave out, blocks inside of a span."""
    for name, value in arguments.items():
        if value is not None and any(part in name for part in _BETWEEN_BLOCKS):
            raise ValueError(
                f"{name} reaches between blocks that share one short sequence; use scope='block' with merge_span=1"
            )


def _follows(before: ReducedLayer, after: ReducedLayer, is_whole: bool) -> bool:
    stack, _, number = before.name.rpartition(".")
    if before.spec.ends_span:
        return False
    is_next = is_whole or after.name == f"{stack}.{int(number) + 1}"
    return is_next and before.ratio == after.ratio
