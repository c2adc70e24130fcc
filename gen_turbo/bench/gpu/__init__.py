"""`gen-turbo bench gpu`: whole denoisers and LLaVA-1.5 on a GPU, eager, captured and compiled, beside stock."""

from __future__ import annotations

import argparse


def run(options: argparse.Namespace) -> None:
    """Measures what has no record yet; raises ValueError as `command.run`."""
    # The tables of this package are read without diffusers and transformers.
    from gen_turbo.bench.gpu import command

    command.run(options)
