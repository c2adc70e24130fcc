"""Runs one model's cells in a process of its own, so that a crash costs a cell and not the benchmark."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

Announce = Callable[[str], object]
_POLL_S = 0.5


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: What it gave back; negative where a signal ended it.
        announced: What it announced last.
    """

    code: int
    announced: str


def apart(work: Callable[[Announce], int], limit_s: float) -> Ended:
    """Runs work in a fork of this process and stops it after some seconds.

    A fork need not import anything again; this process must not have used a GPU.

    Args:
        work: Is given what to announce by, and gives its exit code.
        limit_s: Seconds after which the process is killed.
    """
    context: Any = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(work, sender))
    process.start()
    sender.close()
    announced, end = "", time.monotonic() + limit_s
    while True:
        try:
            if receiver.poll(_POLL_S):
                announced = receiver.recv()
            elif time.monotonic() > end or not process.is_alive():
                break
        except EOFError:
            break
    process.join(0 if time.monotonic() > end else _POLL_S * 20)
    if process.is_alive():
        process.kill()
        process.join()
    return Ended(process.exitcode, announced)


def _run(work: Callable[[Announce], int], sender: Connection) -> None:
    sys.exit(work(sender.send))
