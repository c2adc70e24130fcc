"""A pipeline that a processor was attached through: a model that takes the place of the attached one is stock."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

from torch import nn

from gen_turbo.engine.base import NoEffectWarning, Part
from gen_turbo.engine.placed import NotPickled


class Record(NamedTuple):
    """What was attached to one component of a pipeline; the part is gone when its model is."""

    component: str
    processor: str
    part: Callable[[], Part | None]


class Followed(NotPickled):
    """Stands in front of a pipeline's `progress_bar`, which its runs ask for before their first step.

    Args:
        pipeline: The pipeline.
        is_attached: Whether a processor is attached to a model.

    Attributes:
        records: What was attached through the pipeline and was not taken off again.
    """

    def __init__(self, pipeline: Any, is_attached: Callable[[nn.Module], bool]) -> None:
        self.records: list[Record] = []
        self._is_attached = is_attached
        self._pipeline = weakref.ref(pipeline)
        self._before = vars(pipeline).get("progress_bar")
        self._placed: Any = self.progress_bar
        pipeline.progress_bar = self._placed

    @property
    def pipeline(self) -> Any | None:
        """The pipeline, for as long as it exists."""
        return self._pipeline()

    def progress_bar(self, *args: Any, **kwargs: Any) -> Any:
        """Warns of models that are not attached, and gives the pipeline's progress bar."""
        for sentence in self.replaced():
            warnings.warn(sentence, NoEffectWarning, stacklevel=4)
        pipeline: Any = self.pipeline
        return (self._before or MethodType(type(pipeline).progress_bar, pipeline))(*args, **kwargs)

    def replaced(self) -> list[str]:
        """A sentence for each model that has taken the place of an attached one."""
        pipeline, sentences = self.pipeline, {}
        for name, processor, _ in self.records:
            model = getattr(pipeline, name, None)
            if isinstance(model, nn.Module) and not self._is_attached(model):
                sentences[name] = (
                    f"{name} of this {type(pipeline).__name__} is another model than the one that {processor} was "
                    "attached to and runs as stock; attach to the pipeline again, or detach from it"
                )
        return list(sentences.values())

    def forget(self, part: Part) -> None:
        """After a part was taken off."""
        self.records = [record for record in self.records if record.part() is not part]

    def remove(self) -> None:
        """Gives the pipeline its own back; where another one was placed over this, that stays and this is silent."""
        pipeline = self.pipeline
        self.records = []
        if pipeline is None or vars(pipeline).get("progress_bar") is not self._placed:
            return
        if self._before is None:
            del pipeline.progress_bar
        else:
            pipeline.progress_bar = self._before

    def __deepcopy__(self, memo: dict[int, Any]) -> Followed:
        """Stands in front of a copy of the pipeline, to which nothing is attached."""
        twin = memo.get(id(self._pipeline()))
        if twin is None:
            return self
        off = object.__new__(type(self))
        off.records, off._is_attached, off._placed = [], self._is_attached, None
        off._pipeline, off._before = weakref.ref(twin), copy.deepcopy(self._before, memo)
        return off
