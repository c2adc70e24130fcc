"""`gen-turbo batch`: any number of prompts or images, on this machine or a cluster, in runs that may be killed."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gen_turbo.commands.batch_rows import NOTES, Row, read_rows
from gen_turbo.commands.batch_work import Engine, Job, Outcome, engine_of
from gen_turbo.commands.caption import MANIFEST, SOME_FAILED, settings_digest
from gen_turbo.commands.failures import shown
from gen_turbo.commands.parsing import add_model_arguments, model_overrides
from gen_turbo.config import ConfigError, PipelineConfig, load_config
from gen_turbo.lines import Item, Line
from gen_turbo.manifest import Manifest
from gen_turbo.output import check_writable, write_file, write_text
from gen_turbo.schemas import check_count

ENGINES = ("local", "ray")


def add_batch_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument(
        "input",
        type=Path,
        metavar="INPUT",
        help="a .jsonl, .csv or .parquet file with a column prompt or image (id, seed and others may follow), or a "
        "folder of images",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder; a run with the same one continues"
    )
    add_model_arguments(parser, "tiny")
    parser.add_argument("--engine", choices=ENGINES, default="local", help="where the work is done (default: local)")
    parser.add_argument("--seed", type=int, default=0, help="an item's seed follows from this and its id (default: 0)")
    parser.add_argument("--tries", type=int, default=3, help="tries of an item before it is quarantined (default: 3)")
    parser.add_argument(
        "--retry-quarantined", action="store_true", help="try quarantined items again (default: skip them)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each worker (default: 1)")
    group = parser.add_argument_group("engine ray")
    group.add_argument("--workers", type=int, default=1, help="processes, each with a model of its own (default: 1)")
    group.add_argument("--address", help="a running cluster, such as auto or HOST:6379 (default: start one here)")
    group.add_argument(
        "--gpus-per-worker", type=float, help="may be a fraction (default: 1 where there is a GPU, else 0)"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as processor.ratio=0.3")
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> int:
    """Works on every item that is not done; returns the exit code.

    Raises:
        ConfigError: If the input, the configuration, an option or the model does not fit.
    """
    name, given = model_overrides(namespace)
    config = load_config(name, [*given, *namespace.overrides])
    for option in ("tries", "threads", "workers"):
        check_count(option, getattr(namespace, option))
    if namespace.engine == "local" and (namespace.workers > 1 or namespace.address or namespace.gpus_per_worker):
        raise ConfigError("--workers, --address and --gpus-per-worker are of the engine ray; add --engine ray")
    rows = read_rows(namespace.input, wants_image=not isinstance(config, PipelineConfig))
    check_writable(namespace.output)
    from gen_turbo.factory import processors_of

    settings = settings_digest(asdict(config), processors_of(config), namespace.seed)
    job = Job(config, namespace.seed, namespace.threads)
    with Manifest(namespace.output / MANIFEST) as manifest:
        batch = Batch(manifest, rows, namespace.input, settings, namespace.tries, namespace.retry_quarantined)
        if batch.pending:
            batch.check_seeds(namespace.seed)
            options = {"workers": namespace.workers, "address": namespace.address, "gpus": _gpus(namespace)}
            with closing(engine_of(namespace.engine, job, options, _say)) as engine:
                batch.go(engine)
        batch.write_results(namespace.output)
    return batch.finish()


def _gpus(namespace: argparse.Namespace) -> float:
    if namespace.gpus_per_worker is not None:
        return float(namespace.gpus_per_worker)
    import torch

    return float(torch.cuda.is_available())


def _say(text: str) -> None:
    tqdm.write(f"gen-turbo: {shown(text)}", file=sys.stderr)


class Batch:
    """The items of one input and what the manifest knows of them; nothing else is remembered between runs.

    Args:
        manifest: The state.
        rows: The items.
        source: Where they come from.
        settings: Digest of all else that results depend on.
        tries: Of an item before it is quarantined.
        retries_quarantined: Whether quarantined items are tried again.

    Attributes:
        pending: What is to be done, in order.
    """

    def __init__(
        self,
        manifest: Manifest,
        rows: list[Row],
        source: Path,
        settings: str,
        tries: int = 3,
        retries_quarantined: bool = False,
    ) -> None:
        self._manifest, self._most_tries = manifest, tries
        self._rows = {row.item(source, settings): row for row in rows}
        self._items = {row.id: item for item, row in self._rows.items()}
        undone = [item for item in self._rows if not manifest.finished(item)]
        self._quarantined = [] if retries_quarantined else [i for i in undone if manifest.is_quarantined(i)]
        held = set(self._quarantined)
        self.pending = [item for item in undone if item not in held]
        self._before = len(self._rows) - len(undone)
        self._tries: Counter[Item] = Counter()
        self._count: Counter[str] = Counter()

    def check_seeds(self, run: int) -> None:
        """Raises ConfigError where a finished item was made with another seed than this run's seed gives it."""
        known = {str(item.path): item for item in self._rows}
        for line in self._manifest.lines():
            item = known.get(line["input"])
            if item is None or "error" in line or not item.is_of(line):
                continue
            row = self._rows[item]
            made, seed = line.get("seed"), row.seed_of(run)
            if made not in (None, seed):
                raise ConfigError(
                    f"{row.id} was made with seed {made} by a version that derived seeds otherwise, and now has "
                    f"{seed}; start in another --output folder, or give every item a seed"
                )

    def go(self, engine: Engine) -> None:
        """Works on all that is pending and in no other run's hands."""
        with tqdm(total=len(self._rows), initial=self._before, unit="item", disable=None, leave=False) as bar:
            again: deque[Item] = deque()
            source, running, is_over = iter(self.pending), 0, False
            while True:
                while running < engine.room and (item := self._next(again, source)) is not None:
                    running += self._submit(engine, item, again)
                if running == 0:
                    if is_over or not (source := self._left()):
                        return
                    # Once more at the end, for another run may have died meanwhile.
                    is_over = True
                    continue
                for row, outcome in engine.collect():
                    running -= 1
                    bar.update(self._settle(self._items[row.id], outcome, again))

    def _left(self) -> Iterator[Item]:
        return iter(
            [i for i in self.pending if not self._manifest.finished(i) and not self._manifest.is_quarantined(i)]
        )

    def _next(self, again: deque[Item], source: Iterator[Item]) -> Item | None:
        if again:
            return again.popleft()
        claimed = self._manifest.claim(source, 1)
        return claimed[0] if claimed else None

    def _submit(self, engine: Engine, item: Item, again: deque[Item]) -> bool:
        """Submits a claimed item; one whose image cannot be read has failed."""
        row = self._rows[item]
        try:
            content = None if row.image is None else row.image.read_bytes()
        except OSError as error:
            self._settle(item, Outcome(error=f"cannot read {row.image}: {error.strerror}"), again)
            return False
        engine.submit(row, content)
        return True

    def _settle(self, item: Item, outcome: Outcome, again: deque[Item]) -> bool:
        """Commits an outcome, or has the item tried again; whether it is settled for this run."""
        row = self._rows[item]
        if outcome.values is not None:
            self._manifest.keep(item, {"id": row.id, **row.extra, **outcome.values}, outcome.png)
            self._count["done"] += 1
            return True
        self._tries[item] += 1
        if self._tries[item] < self._most_tries:
            again.append(item)
            return False
        message = outcome.error or "unknown"
        self._manifest.fail(item, message, id=row.id, tries=self._tries[item], quarantined=True)
        self._count["quarantined"] += 1
        _say(f"{row.id}: {message}")
        return True

    def write_results(self, folder: Path) -> None:
        """Writes what is known of this input's items: results as JSON lines and, with pyarrow, Parquet; failures."""
        known = {str(item.path): item for item in self._rows}
        results: list[Line] = []
        failures: list[Line] = []
        for line in self._manifest.lines():
            item = known.get(line["input"])
            if item is not None and (item.is_of(line) or "error" in line):
                shared = {name: value for name, value in line.items() if name not in NOTES}
                (failures if "error" in line else results).append(shared)
        order = {row.id: place for place, row in enumerate(self._rows.values())}
        for name, lines in (("results.jsonl", results), ("quarantine.jsonl", failures)):
            lines.sort(key=lambda line: order[line["id"]])
            write_text(folder / name, "".join(json.dumps(line) + "\n" for line in lines))
        _write_parquet(folder / "results.parquet", results)

    def finish(self) -> int:
        """Says how it went; returns the exit code."""
        skipped, done, failed = len(self._quarantined), self._count["done"], self._count["quarantined"]
        elsewhere = len(self.pending) - done - failed
        others = f", {elsewhere} in other runs" if elsewhere else ""
        _say(f"{done} done, {self._before} finished before, {failed + skipped} quarantined{others}")
        return SOME_FAILED if failed or skipped else 0


def _write_parquet(path: Path, lines: list[Line]) -> None:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        return
    names = list(dict.fromkeys(name for line in lines for name in line))
    columns: dict[str, Any] = {name: [line.get(name) for line in lines] for name in names}
    try:
        table = pyarrow.table(columns)
    except pyarrow.ArrowException:
        # Columns of mixed types are texts.
        table = pyarrow.table({n: [None if v is None else str(v) for v in vs] for n, vs in columns.items()})
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    write_file(path, sink.getvalue().to_pybytes())
