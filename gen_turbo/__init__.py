"""Makes diffusers pipelines and transformers vision-language models faster without retraining.

Importing this package loads neither diffusers nor transformers; the names below load what they need on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gen_turbo.api import attach, detach, reattach
    from gen_turbo.engine.report import report
    from gen_turbo.factory import list_methods, list_pipelines, load_pipeline
    from gen_turbo.methods.identity import IdentityProcessor
    from gen_turbo.methods.par import PARProcessor
    from gen_turbo.methods.random import RandomProcessor
    from gen_turbo.methods.tome import ToMeProcessor
    from gen_turbo.methods.turbo import TurboProcessor
    from gen_turbo.methods.vistog import VisToGProcessor
    from gen_turbo.tokens.token_map import TokenMap

_HOME = {
    "IdentityProcessor": "methods.identity",
    "PARProcessor": "methods.par",
    "RandomProcessor": "methods.random",
    "TokenMap": "tokens.token_map",
    "ToMeProcessor": "methods.tome",
    "TurboProcessor": "methods.turbo",
    "VisToGProcessor": "methods.vistog",
    "attach": "api",
    "detach": "api",
    "list_methods": "factory",
    "list_pipelines": "factory",
    "load_pipeline": "factory",
    "reattach": "api",
    "report": "engine.report",
}

__all__ = [
    "IdentityProcessor",
    "PARProcessor",
    "RandomProcessor",
    "ToMeProcessor",
    "TokenMap",
    "TurboProcessor",
    "VisToGProcessor",
    "attach",
    "detach",
    "list_methods",
    "list_pipelines",
    "load_pipeline",
    "reattach",
    "report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
