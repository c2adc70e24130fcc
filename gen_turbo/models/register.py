"""The two methods that gen_turbo adds to diffusers' pipelines; nothing else of diffusers is altered."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from gen_turbo.method import TokenReducer


def set_attn_processor(self: DiffusionPipeline, processor: Any) -> None:
    """Attaches a gen_turbo processor to the pipeline's denoisers in place of one attached before.

    None detaches. A processor of diffusers' own, or a dict of them, goes to each denoiser's `set_attn_processor`.

    Raises:
        TypeError: If the class of a processor is given, not a processor.
        ValueError: If the processor would reduce nothing on this pipeline.
    """
    from gen_turbo import api

    if isinstance(processor, type):
        raise TypeError(
            f"expected a processor such as TurboProcessor(0.4), got the class {processor.__name__}; call it"
        )
    if processor is None:
        api.detach(self)
    elif isinstance(processor, TokenReducer):
        api.attach(self, processor, replace=True)
    else:
        api.detach(self)
        for model in api.denoisers(self)[1]:
            # diffusers empties the dict it is given.
            model.set_attn_processor(dict(processor) if isinstance(processor, dict) else processor)  # type: ignore[operator]


def reset_attn_processor(self: DiffusionPipeline) -> None:
    """Takes gen_turbo off the pipeline: every layer has the processor it had before."""
    from gen_turbo import api

    api.detach(self)


def add_pipeline_methods() -> None:
    """Adds both methods to `DiffusionPipeline` where it has none of that name."""
    for method in (set_attn_processor, reset_attn_processor):
        if method.__name__ not in vars(DiffusionPipeline):
            setattr(DiffusionPipeline, method.__name__, method)
