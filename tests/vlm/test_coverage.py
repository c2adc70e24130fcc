"""The table of vision-language families says what is so."""

from __future__ import annotations

import pytest

from gen_turbo.vlm.families import FAMILIES
from tests.vlm.coverage import NAMES, TABLE, line
from tests.vlm.test_settings_matrix import model_of

# Built as a class that is tried, with the same code where tokens leave.
UNTRIED = {"Glm4vMoeForConditionalGeneration", "Glm46VForConditionalGeneration"}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_model_takes_is_what_the_table_says(name):
    """Catches a place that a family has lost or gained, and other numbers of tokens."""
    assert line(name) in TABLE.read_text().splitlines()


def test_every_family_is_tried():
    """Catches an entry that no tiny model shows to work."""
    assert {name for family in FAMILIES for name in family.models} - UNTRIED == {
        type(model_of(name)).__name__ for name in NAMES
    }
