"""What is put in front of the layers of a denoiser for each run, where the settings leave that open."""

from __future__ import annotations

import warnings
import weakref
from typing import TYPE_CHECKING

from gen_turbo.engine.arrangement import Arrangement, Arranger
from gen_turbo.engine.auto import LEAST_GAIN, TYPICAL_STEPS, Choice, advice, choose
from gen_turbo.engine.base import NoEffectWarning
from gen_turbo.engine.context import Context, Run
from gen_turbo.engine.devices import device_class
from gen_turbo.engine.expected import Costs, RunFacts
from gen_turbo.engine.work import Workload
from gen_turbo.method import TokenReducer
from gen_turbo.models.adapter import ModelCall

if TYPE_CHECKING:
    from gen_turbo.engine.root import Root


class Settling:
    """Queries the cost model in the first call of a run, and changes what is in place where the run wants another.

    Args:
        reducer: The settings, of which some are open.
        arranger: Makes arrangements of the model.
        first: What is in place before the first run.

    Attributes:
        current: What is in place.
    """

    def __init__(self, reducer: TokenReducer, arranger: Arranger, first: Arrangement) -> None:
        self.current = first
        self._reducer, self._arranger = reducer, arranger
        self._costs = Costs(arranger.model, arranger.adapter)
        self._choices: dict[RunFacts, Choice] = {}
        self._arrangements: dict[tuple[object, ...], Arrangement] = {}
        self._of: weakref.WeakKeyDictionary[Run, Arrangement] = weakref.WeakKeyDictionary()

    def settle(self, root: Root, context: Context, call: ModelCall) -> None:
        """Puts in place what the run of a call wants; a run keeps what its first call was given."""
        wanted = self._of.get(context.run)
        if wanted is None:
            wanted = self._of[context.run] = self._arrangement(root, context, call)
        if wanted is self.current:
            return
        self.current.remove()
        if root.graphs is not None:
            root.graphs.drop()
        self.current = wanted
        root.take(wanted)
        wanted.install()

    def _arrangement(self, root: Root, context: Context, call: ModelCall) -> Arrangement:
        load = Workload.of(call, context.geometry)
        is_captured = root.graphs is not None and call.sample.is_cuda
        # The caches of diffusers compare whole sequences between blocks.
        has_blocks = not getattr(root.module, "is_cache_enabled", False)
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
