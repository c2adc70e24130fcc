"""What an attached reducer reaches, what it does not reach and why, and what it has saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gen_turbo.api import attachments, replaced
from gen_turbo.engine.base import LayerReport as LayerReport
from gen_turbo.engine.base import counted
from gen_turbo.engine.denoiser import DenoiserPart
from gen_turbo.method import Grid


@dataclass(frozen=True)
class Report:
    """All attention layers of a model or pipeline, and what is remembered for them.

    Attributes:
        layers: One row per attention layer.
        remembered_bytes: Bytes held now for residuals, forecasts, token maps and merged text; 0 between the runs of a
            pipeline.
        most_remembered_bytes: The most held at once so far.
        text_tokens: Text tokens of the last prompt whose text was merged, and what was left of them, with references
            where the model keeps the keys of both; else 0.
        skipped: For each unit of a schedule, the calls in which it was skipped and in which it ran.
        graphs: What became of CUDA graphs; empty where none were wanted.
        choice: What `scope="auto"` chose for the last run and expects of it; empty where everything was given.
        notes: What else has to be said, such as that a route is generic.
    """

    layers: list[LayerReport] = field(default_factory=list)
    remembered_bytes: int = 0
    most_remembered_bytes: int = 0
    text_tokens: tuple[int, int] = (0, 0)
    skipped: dict[str, tuple[int, int]] = field(default_factory=dict)
    graphs: str = ""
    choice: str = ""
    notes: tuple[str, ...] = ()

    @property
    def flops_saved(self) -> float:
        """Fraction of the reached layers' attention FLOPs that was not spent; 0 before the first call."""
        stock = sum(layer.stock_flops for layer in self.layers)
        return 1 - sum(layer.flops for layer in self.layers) / stock if stock else 0.0

    @property
    def tokens_by_grid(self) -> dict[Grid, tuple[int, int, int]]:
        """Tokens, the fewest kept of them, and layers that were reduced, by the (height, width) that they last saw."""
        found: dict[Grid, tuple[int, int, int]] = {}
        for layer in self.layers:
            if layer.num_reduced and layer.grid is not None:
                _, kept, layers = found.get(layer.grid, (layer.num_tokens, layer.num_kept, 0))
                found[layer.grid] = layer.num_tokens, min(kept, layer.num_kept), layers + 1
        return found

    def __str__(self) -> str:
        if not self.layers and not self.skipped:
            return "\n  ".join(["no gen_turbo processor is attached", *self.notes])
        reached = [layer for layer in self.layers if layer.status == "reduced"]
        # Before the first call nothing was reduced, and with a ratio of 0 nothing is after it.
        done = [layer for layer in reached if layer.num_reduced]
        what = "reduced" if any(layer.num_full or layer.num_reduced for layer in reached) else "reached"
        those = f"{len(done if what == 'reduced' else reached)} of {len(self.layers)} layers {what}"
        lines = [f"{those}, {self.flops_saved:.0%} of their FLOPs saved"]
        lines += [f"  auto: {self.choice}"] if self.choice else []
        for (height, width), (before, kept, layers) in self.tokens_by_grid.items():
            lines.append(f"  {height} x {width}: {before} -> {kept} tokens in {counted(layers, 'layer')}")
        if self.text_tokens[0]:
            lines.append(f"  text: {self.text_tokens[0]} -> {self.text_tokens[1]} tokens")
        lines += [f"  {layer.name}: {_so_far(layer)}" for layer in reached]
        for unit, (num_skipped, num_run) in self.skipped.items():
            lines.append(f"  {unit}: skipped in {num_skipped} of {counted(num_skipped + num_run, 'call')}")
        left: dict[str, int] = {}
        for layer in self.layers:
            if layer.status != "reduced":
                left[layer.status] = left.get(layer.status, 0) + 1
        lines += [f"  left alone, {reason}: {count}" for reason, count in left.items()]
        lines += [f"  {note}" for note in self.notes]
        if self.graphs:
            lines.append(f"  CUDA graphs: {self.graphs}")
        lines.append(f"  remembered at most: {self.most_remembered_bytes / 1e6:.1f} MB")
        return "\n".join(lines)


def _so_far(layer: LayerReport) -> str:
    """What happened at a layer that is reduced."""
    if not layer.num_tokens:
        return f"in full in all of {counted(layer.num_full, 'call')}" if layer.num_full else "not run yet"
    grid = f"{layer.grid[0]} x {layer.grid[1]}" if layer.grid else "no grid"
    tokens = f"{layer.num_tokens} -> {layer.num_kept} tokens"
    calls = f"{layer.num_reduced} reduced and {counted(layer.num_full, 'full call')}"
    return f"reduced, {grid}, {tokens}, {calls}, token maps up to {counted(layer.plan_age, 'step')} old"


def report(target: Any) -> Report:
    """Says which layers of a pipeline or model are reached, which are left alone and why, and what was saved.

    Raises:
        TypeError: If the target is neither a model nor a pipeline with a denoiser.
    """
    parts = attachments(target)
    denoisers = [part for part in parts if isinstance(part, DenoiserPart)]
    return Report(
        [row for part in parts for row in part.rows()],
        sum(part.remembered_bytes for part in parts),
        sum(part.most_remembered_bytes for part in parts),
        max((part.text_tokens for part in denoisers), default=(0, 0)),
        {unit: (stats.num_skipped, stats.num_run) for part in denoisers for unit, stats in part.skipped_units.items()},
        "; ".join(dict.fromkeys(part.graph_status for part in denoisers if part.graph_status)),
        "; ".join(dict.fromkeys(part.choice for part in denoisers if part.choice)),
        tuple(dict.fromkeys([*(note for part in denoisers for note in part.notes), *replaced(target)])),
    )
