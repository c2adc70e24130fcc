"""The settings that methods have of themselves: those of the paper, or those that were measured best."""

from __future__ import annotations

import pytest

import gen_turbo.methods  # noqa: F401  registers the methods
from gen_turbo.registry import METHODS

DEFAULTS = {
    "divprune": {"ratio": 0.66, "restore": "copy", "combine": "prune", "place": "pre_llm"},
    "eadaprune": {"ratio": 0.95, "energy": 0.9, "combine": "prune"},
    "fastv": {"ratio": 0.5, "restore": "copy", "place": "decoder", "combine": "prune", "layer": 2},
    "identity": {"restore": "copy", "text_ratio": 0.0},
    "par": {"ratio": 0.7, "full_every": 8, "budget": 0.5, "first": 2, "mode": "drop", "inner": "auto"},
    "pool": {"ratio": 0.5, "restore": "copy", "combine": "merge"},
    "pyramiddrop": {"ratio": 0.875, "restore": "copy", "place": "decoder", "combine": "prune", "cuts": []},
    "random": {"restore": "copy", "match_every": 1, "seed": 0},
    "resize": {"ratio": 0.5, "restore": "copy", "place": "input"},
    "stride": {"restore": "copy", "combine": "prune"},
    "tome": {"restore": "copy", "match_every": 1, "is_hashed": True, "seed": 0},
    "turbo": {"ratio": 0.7, "scope": "auto", "restore": "auto", "semantic": "self", "value_weight": 0.002, "tile": 8},
    "turbo_vit": {
        "ratio": 0.66, "restore": "copy", "place": "tower", "num_removed": 0, "semantic": "class", "value_weight": 0.26,
        "alpha": None, "scale": 30.0, "beta": 1.0, "gamma": 0, "threshold": 0, "num_merges": 8,
        "beyond_half": "repeat",
    },
    "visionzip": {"ratio": 0.66, "restore": "copy", "contextual": 10 / 64, "semantic": "class"},
    "vistog": {"ratio": 0.7, "window": 5, "num_refinements": 1, "free": 0.25},
    "vistog_vit": {"ratio": 0.75, "restore": "copy", "num_tokens": 0, "weights": None, "first_block": 0},
    "vscan": {"ratio": 0.66, "restore": "copy", "local": 0.5, "late": 1 / 3, "cut": 0, "semantic": "class"},
}  # fmt: skip
NEEDS = {
    "fastv": ("last",), "pyramiddrop": ("next",), "resize": ("input",),
    "visionzip": ("class", "self"), "vscan": ("class", "self", "next"),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS.names())
def test_defaults_are_those_that_were_published_or_measured(name):
    """Catches a default that another change has moved, and a method that reads what it does not say."""
    made = METHODS[name]()
    assert {setting: getattr(made, setting) for setting in DEFAULTS[name]} == DEFAULTS[name]
    assert getattr(made, "needs", ()) == NEEDS.get(name, ())
    assert made.keeps_all == (name == "identity")
    assert made.plans_videos == (name not in ("pool", "stride", "tome", "turbo_vit"))
    assert made.map_period == {"turbo": 2, "vistog": 1}.get(name, 0)


def test_every_method_registers_itself():
    """Catches a file of a method that is not imported, whose tests would all be left out."""
    assert sorted(METHODS.names()) == sorted(DEFAULTS)
