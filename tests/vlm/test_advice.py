"""What a refusal advises works: on every family, of every method at every place that it may be given."""

from __future__ import annotations

import re

import pytest

import gen_turbo.methods  # noqa: F401  registers the methods
from gen_turbo import attach
from gen_turbo.registry import METHODS
from gen_turbo.vlm.settings import PLACES, Placed
from tests.vlm.test_blip import MODELS
from tests.vlm.tiny_mllama import mllama
from tests.vlm.tiny_vlms import VLMS

_ADVISED = re.compile(r"use place='(?P<place>\w+)'|use the method (?P<method>\w+)|, such as (?P<other>\w+)")
FAMILIES = {**{name: family.make for name, family in VLMS.items()}, **MODELS, "mllama": mllama}
_ROUTERS = {"par": {"router": "uniform", "tokens": 0.5, "layers": 3}}


def _made(name, place=None):
    """A method at a place, its own where none is named."""
    settings = _ROUTERS.get(name, {"ratio": 0.6})
    if place is None or name in _ROUTERS:
        return METHODS[name](**settings)
    try:
        return METHODS[name](place=place, **settings)
    except TypeError:
        return Placed(METHODS[name](**settings), place=place)


def _methods():
    """Every method at its own place and at each other that its settings allow."""
    for name in METHODS.names():
        if name == "own":
            continue
        for place in (None, *PLACES):
            try:
                yield name, _made(name, place)
            except ValueError:
                continue


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_refusal_advises_works(family):
    """Catches a place that this method cannot take or this model does not have, and a refusal that leads nowhere."""
    model, is_refused = FAMILIES[family](), False
    for name, method in _methods():
        try:
            attach(model, method).detach()
            continue
        except ValueError as error:
            is_refused, said = True, str(error)
        advised = [found.groupdict() for found in _ADVISED.finditer(said)]
        assert advised, said
        for one in advised:
            other = one["method"] or one["other"]
            attach(model, _made(other) if other else _made(name, one["place"])).detach()
    assert is_refused or family in ("llava", "llava_siglip")
