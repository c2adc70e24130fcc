"""`gen-turbo bench check`: how many images show what their caption says, stock against settings, without times."""

from __future__ import annotations

import argparse

import torch

from gen_turbo.bench.quality import run_settings


def run(options: argparse.Namespace) -> None:
    """Checks stock and the selected settings; the default one where none is selected."""
    torch.set_num_threads(options.threads)
    run_settings("check", options.settings or ["stock", "turbo-default"], options, num_timed=0)
