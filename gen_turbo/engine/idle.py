"""Buffers and graphs of runs that have ended, for later runs of the same shapes."""

from __future__ import annotations

from dataclasses import replace

from gen_turbo.engine.context import Context
from gen_turbo.engine.text import MergedText

_MOST = 4


class Idle:
    """Contexts that have ended."""

    def __init__(self) -> None:
        self._contexts: list[Context] = []

    def keep(self, context: Context) -> None:
        """Takes a context that has ended, without the text of its prompt."""
        text = context.text
        if text is not None and text.num_merged:
            if context.text_source is not None:
                # A prefix comes no sooner than in the second call, when it is late to look for buffers.
                return
            context.text = replace(text, arguments={})
        self._contexts = [*self._contexts[-_MOST + 1 :], context]

    def revive(self, context: Context) -> None:
        """Gives a new context the buffers of one that has ended, if there are such.

        Graphs read sizes of merged text where they were in the run that was captured, so they are written there.
        """
        form = _form(context.text)
        for old in self._contexts:
            if old.layout == context.layout and old.geometry == context.geometry and _form(old.text) == form:
                self._contexts.remove(old)
                context.maps, context.states, context.groups = old.maps, old.states, old.groups
                context.captured, context.extras = old.captured, old.extras
                context.is_revived = True
                new, before = context.text, old.text
                if new is not None and before is not None and new.sizes is not None and before.sizes is not None:
                    context.text = replace(new, sizes=before.sizes.copy_(new.sizes))
                return
        if context.num_merged_text:
            # How much is left of a text depends on the prompt, and there is no room for buffers of every length.
            self._contexts = [old for old in self._contexts if not old.num_merged_text or old.run is context.run]

    def drop(self) -> None:
        """Forgets all, and frees their graphs."""
        for context in self._contexts:
            context.captured.clear()
        self._contexts = []


def _form(text: MergedText | None) -> tuple[object, ...]:
    """What graphs depend on of a prompt's text beside the arguments of a call: all but values."""
    if text is None or (not text.num_merged and text.hides is None):
        return ()
    return text.num_merged, text.num_text, text.hides, None if text.sizes is None else text.sizes.shape
