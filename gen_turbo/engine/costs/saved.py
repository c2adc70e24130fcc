"""What reduced layers cost and have saved, counted from the shapes of their calls when a report is made."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gen_turbo.engine.base import LayerReport
from gen_turbo.engine.costs.names import rows_of, self_attentions, shares_of
from gen_turbo.engine.state import Phase, SequenceShape, Totals
from gen_turbo.models.adapter import LayerSpec

_OFF = "fuser"
"""Attention to boxes, which runs where they are given."""


@dataclass(frozen=True)
class Cost:
    """What one layer costs.

    Attributes:
        linear_weights: Weights of the linear layers that every token of the sequence goes through.
        width: Channels of all heads of the attention together.
        kv_only: Whether every token keeps a query of its own.
    """

    linear_weights: int
    width: int
    kv_only: bool = False

    @classmethod
    def of(cls, module: nn.Module, kv_only: bool) -> Cost:
        """Counts the linear weights that image tokens go through: not those of text, time or cross-attention's keys."""
        linears = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]
        # By its sides, for quantised weights are stored as fewer numbers.
        shares, alone = shares_of(module), self_attentions(module)
        sizes = ((name, round(m.in_features * m.out_features * shares.get(name, 1))) for name, m in linears)
        read = ((name, size) for name, size in sizes if name.startswith(alone) or rows_of(name) == "image")
        weights = sum(size for name, size in read if _OFF not in name)
        width = next((m.out_features for name, m in linears if name.endswith(("to_q", "to_query"))), 0)
        # Of a projection that is fused with others, the attention says its share.
        width = width or next((int(m.inner_dim) for m in module.modules() if hasattr(m, "inner_dim")), 0)  # type: ignore[arg-type]
        return cls(weights, width, kv_only)

    def flops(self, shape: SequenceShape, num_kept: int, more_text: int = 0) -> int:
        """Operations on so many image tokens; text that shares the attention is counted with it."""
        num_queries = shape.image if self.kv_only else num_kept
        inside = shape.leading + shape.trailing + (more_text if shape.leading else 0)
        num_text = max(shape.text + more_text, inside)
        asking = 0 if shape.caches_text else num_text
        softmax = 2 * (num_queries + asking) * (num_kept + num_text) * self.width
        return 2 * shape.batch * ((num_queries + inside) * self.linear_weights + softmax)

    def report(self, spec: LayerSpec, totals: Totals) -> LayerReport:
        """What happened at a layer."""
        flops = stock = num_reduced = 0
        for (phase, shape, kept), count in totals.calls.items():
            num_reduced += count if phase is Phase.REDUCED else 0
            if shape is None:
                continue
            stock += count * self.flops(shape, shape.image, shape.merged_text)
            if phase is not Phase.REDUCED:
                flops += count * self.flops(shape, shape.image)
            if phase is not Phase.FULL:
                flops += count * self.flops(shape, kept)
        grid, last, num_kept = totals.last
        num_full = sum(totals.calls.values()) - num_reduced
        num_tokens = last.image if last is not None else 0
        return LayerReport(
            spec.name,
            spec.downsample,
            "reduced",
            grid,
            num_tokens,
            num_kept,
            num_full,
            num_reduced,
            flops,
            stock,
            totals.plan_age,
        )
