"""`gen-turbo calibrate ...`: what has to be learned or measured once for a model before a method can use it."""

from __future__ import annotations

import argparse
from importlib import import_module

CALIBRATIONS = {
    "par": (
        "gen_turbo.commands.calibrate_par",
        "make PAR's router or schedule for a vision-language model or a denoiser, no labels",
    ),
    "vistog": (
        "gen_turbo.commands.calibrate_vistog",
        "train VisToG's semantic tokens for a vision-language model, no labels",
    ),
}
"""For each method the module with its `add_arguments`, which sets `run`, and what the command does."""


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds one subcommand for each method that can be calibrated."""
    subparsers = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    for name, (module, text) in CALIBRATIONS.items():
        child = subparsers.add_parser(name, help=text, description=text, allow_abbrev=False)
        import_module(module).add_arguments(child)
