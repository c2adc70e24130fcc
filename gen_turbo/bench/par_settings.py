"""PAR among the settings of `gen-turbo bench understanding`: tokens, layers and both, each beside its controls."""

from __future__ import annotations

from typing import Any

from gen_turbo.bench.settings import Method, Setting
from gen_turbo.training.files import artefact_folder
from gen_turbo.training.router_file import FOLDER

BUDGETS = (0.8, 0.7, 0.6, 0.5, 0.4)
TOKENS = (0.5, 0.33, 0.22, 0.11)
LAYERS = (5, 4)
BOTH = ((0.5, 5), (0.33, 5))
_ROUTER = "tiny-vlm"


def par_settings() -> list[Setting]:
    """The controls, and the router that ships for the embedded model once there is one.

    A layout is given by its tokens and layers, so that router and controls cost the same but for the router itself;
    with a budget the layout is that of the router's calibration.
    """
    has_router = (artefact_folder() / FOLDER / f"{_ROUTER}.safetensors").is_file()
    settings: list[Setting] = []
    layouts: list[tuple[str, dict[str, Any]]] = [
        *((_percent(tokens), {"tokens": tokens}) for tokens in TOKENS),
        *((f"l{layers}", {"layers": layers}) for layers in LAYERS),
        *((f"{_percent(tokens)}-l{layers}", {"tokens": tokens, "layers": layers}) for tokens, layers in BOTH),
    ]
    for name, layout in layouts:
        for router in ([None] if has_router else []) + ["random", "uniform"]:
            family = "par" if router is None else f"par, {router}"
            title = "par" if router is None else f"par_{router}"
            settings.append(Method(f"{title}-{name}", family, "par", {**layout, "router": router, "first": 1}))
    if has_router:
        settings += [Method(f"par-budget-{_percent(share)}", "par", "par", {"budget": share}) for share in BUDGETS]
    return settings


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"
