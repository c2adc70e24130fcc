"""What is to stand in front of the layers of a denoiser in each run, where the settings leave that open."""

from __future__ import annotations

import warnings
import weakref

from gen_turbo.engine.arrangement import Arrangement, Arranger
from gen_turbo.engine.base import NoEffectWarning
from gen_turbo.engine.context import Context, Run
from gen_turbo.engine.costs.auto import LEAST_GAIN, TYPICAL_STEPS, Choice, advice, choose
from gen_turbo.engine.costs.devices import device_class
from gen_turbo.engine.costs.expected import Costs, RunFacts
from gen_turbo.engine.costs.work import Workload
from gen_turbo.method import TokenReducer
from gen_turbo.models.adapter import ModelCall


class Settling:
    """Queries the cost model in the first call of a run.

    Args:
        reducer: The settings, of which some are open.
        arranger: Makes arrangements of the model.
    """

    def __init__(self, reducer: TokenReducer, arranger: Arranger) -> None:
        self._reducer, self._arranger = reducer, arranger
        self._costs = Costs(arranger.model, arranger.adapter)
        self._choices: dict[RunFacts, Choice] = {}
        self._arrangements: dict[tuple[object, ...], Arrangement] = {}
        self._of: weakref.WeakKeyDictionary[Run, Arrangement] = weakref.WeakKeyDictionary()

    def wanted(self, context: Context, call: ModelCall, is_captured: bool) -> Arrangement:
        """What is to be in place for the run of a call; a run keeps what its first call was given.

        Args:
            context: What the call belongs to.
            call: The call.
            is_captured: Whether calls after the first are replayed from CUDA graphs.
        """
        known = self._of.get(context.run)
        if known is None:
            known = self._of[context.run] = self._arrangement(context, call, is_captured)
        return known

    def _arrangement(self, context: Context, call: ModelCall, is_captured: bool) -> Arrangement:
        load = Workload.of(call, context.geometry)
        # The caches of diffusers compare whole sequences between blocks.
        has_blocks = not getattr(self._arranger.model(), "is_cache_enabled", False)
        steps = context.run.num_calls or TYPICAL_STEPS
        facts = RunFacts(load, device_class(call.sample.device), steps, is_captured, has_blocks)
        if facts not in self._choices:
            self._choices[facts] = choose(self._costs, self._reducer, facts)
        choice = self._choices[facts]
        if choice.gain < LEAST_GAIN:
            warnings.warn(advice(self._costs, self._reducer, facts), NoEffectWarning, stacklevel=2)
        key = (choice.scope, choice.rhythm, choice.layers)
        if key not in self._arrangements:
            made = self._arranger.arranged(choice.settled(self._reducer), choice.layers)
            made.chosen, made.left = str(choice), choice.left
            self._arrangements[key] = made
        return self._arrangements[key]
