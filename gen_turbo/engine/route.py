"""What one context of a denoiser remembers of the schedule that it follows, and what that says of its running call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gen_turbo.engine.gates import NUM_USED, UnitMemory
from gen_turbo.engine.guided import by_result, num_results, with_first
from gen_turbo.engine.values import refilled, tensors
from gen_turbo.training.schedule import WHOLE, Schedule, Weights, by_branch


@dataclass
class Route:
    """The schedule of one context, and what it remembers.

    Attributes:
        schedule: The schedule that its run follows; None where no schedule is for a run like it.
        is_generic: Whether the schedule was made for the run by a rule, so that its calls are the run's steps.
        batch: Rows of its batch.
        num_branches: Guidance branches in it.
        call: The call of the schedule that is running.
        form: Of the results that the whole model is asked for.
        memories: By module.
    """

    schedule: Schedule | None
    is_generic: bool = False
    batch: int = 1
    num_branches: int = 1
    call: int = -1
    form: object = None
    memories: dict[str, UnitMemory] = field(default_factory=dict)

    def given(self, unit: str, module: str) -> Weights | None:
        """What the schedule says that results of a unit weigh at the running call; None where it says it of others.

        Those that are remembered may be others, as in a run that began late.
        """
        assert self.schedule is not None
        memory, weights = self.memories.get(module), self.schedule.weights.get(unit, {}).get(self.call)
        if weights is None or memory is None:
            return None
        # At a call at which the unit runs the first weight is that of its own result.
        count = num_results(weights) - (self.call not in self.schedule.skips.get(unit, ()))
        due = self.schedule.ran_before(unit, self.call)[:count]
        return weights if len(memory.calls) >= count and memory.calls[:count] == due else None

    def forecast_by(self, unit: str, module: str) -> Sequence[Any]:
        """What remembered results weigh in a forecast: as the schedule says where it does, else by the slope."""
        assert self.schedule is not None
        memory = self.memories[module]
        given = self.given(unit, module) if self.call in self.schedule.skips.get(unit, ()) else None
        if given is not None:
            return by_result(self.schedule.for_branches(given, self.call, self.num_branches))
        if len(memory.calls) < NUM_USED:
            return (1.0,)
        newest, older = memory.calls[:NUM_USED]
        reach = self.schedule.slopes.get(unit, 1.0) * (self.call - newest) / (newest - older)
        return (1 + reach, -reach)

    def rows(self) -> slice | None:
        """The rows of a call that runs without the first guidance branch; None where the batch has no such branches."""
        weights = self.given(WHOLE, "")
        count = 0 if weights is None else len(by_branch(weights))
        return slice(self.batch // count, None) if count > 1 and count == self.num_branches else None

    def completed(self, output: Any) -> Any:
        """The result of a call without the first branch, with that branch as it is forecast."""
        weights = self.given(WHOLE, "")
        assert weights is not None
        return refilled(output, with_first(tensors(output), self.memories[""].results, weights))

    def corrected(self, output: Any) -> Any:
        """The result of a call that ran, with what forecasts before it missed made good."""
        weights = self.given(WHOLE, "") if self.schedule is not None else None
        if self.schedule is None or weights is None:
            return output
        branches = self.schedule.for_branches(weights, self.call, self.num_branches)
        return refilled(output, self.memories[""].corrected(tensors(output), by_result(branches)))
