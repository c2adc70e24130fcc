"""Mutation testing: runs every small change of the token maps and methods against the tests that reach it.

    python tests/mutation.py cover COVER/1.json TESTS...       which tests reach which line, and how long they take
    python tests/mutation.py run COVER RESULTS.jsonl [...]     a line for each mutant; goes on where it ended
    python tests/mutation.py table RESULTS.jsonl...            counts by file, and what survived

Mutants run in forked processes of one that has imported everything, and the fastest tests first: a body of a function
is exchanged where it is, and what runs at import (defaults, constants) is imported anew with the change. A mutant is
seen if a test fails, or needs several times its time. `cover` needs the package coverage.
"""

from __future__ import annotations

import argparse
import collections
import functools
import gc
import importlib
import json
import os
import random
import resource
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [os.getcwd(), "tests"]
from tests.mutants import Changed, Mutant, Ordered, Told, codes_of, mutants  # noqa: E402

FILES = sorted(map(str, [*Path("gen_turbo/tokens").glob("*.py"), *Path("gen_turbo/methods").glob("*.py")]))
OPTIONS = ["-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "no:threadexception",
           "-o", "tmp_path_retention_policy=none", "-W", "ignore::pytest.PytestAssertRewriteWarning"]  # fmt: skip
OURS = {
    "gen_turbo",
    "tests",
    "hypothesis",
    "_hypothesis",
    "coverage",
    *(path.stem for path in Path("tests").rglob("*.py")),
}
"""Not imported before a change: the package, what imports it, and what reads it in other ways."""


class Quiet:
    """No test fails for being slow on a busy machine."""

    def pytest_configure(self, config: pytest.Config) -> None:
        from hypothesis import HealthCheck, settings

        settings.register_profile("mutation", settings(), suppress_health_check=list(HealthCheck))
        settings.load_profile("mutation")


class Cover(Quiet):
    """Notes which test reaches which line."""

    def __init__(self, file: Path) -> None:
        import coverage

        self.file, self.seconds = file, collections.defaultdict[str, float](float)
        self.unfit: set[str] = set()
        self.coverage = coverage.Coverage(data_file=None, include=FILES, config_file=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        # What an earlier test has cached would not be reached by this one.
        for cached in self.cached:
            cached.cache_clear()
        self.coverage.switch_context(item.nodeid)
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.unfit.add(report.nodeid)

    def pytest_collection_finish(self) -> None:
        with warnings.catch_warnings(action="ignore"):
            self.cached = [found for found in gc.get_objects() if type(found) is functools._lru_cache_wrapper]
        self.cached = [found for found in self.cached if (found.__module__ or "").startswith("gen_turbo")]
        self.coverage.start()

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.coverage.stop()
        seconds = {test: round(taken, 3) for test, taken in self.seconds.items() if test not in self.unfit}
        data, numbers = self.coverage.get_data(), {test: n for n, test in enumerate(seconds)}
        reached = {
            os.path.relpath(file): {
                line: sorted(numbers[test] for test in tests if test in numbers)
                for line, tests in data.contexts_by_lineno(file).items()
            }
            for file in data.measured_files()
        }
        modules = [name for name in sys.modules if name.split(".")[0] not in {"__main__", *OURS}]
        found = {"seconds": seconds, "reached": reached, "modules": modules}
        self.file.write_text(json.dumps(found))


class Runs(Quiet):
    """Runs tests on mutants, each in a process of its own."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.ends = args, time.monotonic() + args.seconds
        self.seconds: dict[str, float] = {}
        self.modules: dict[str, None] = {}
        self.reached: dict[str, dict[int, set[str]]] = {}
        for path in sorted(args.cover.glob("*.json")):
            cover = json.loads(path.read_text())
            tests = list(cover["seconds"])
            self.seconds |= cover["seconds"]
            self.modules |= dict.fromkeys(cover["modules"])
            for file, lines in cover["reached"].items():
                known = self.reached.setdefault(file, {})
                for line, numbers in lines.items():
                    known.setdefault(int(line), set()).update(tests[n] for n in numbers)
        done = [*args.done, args.results]
        known = [json.loads(line) for file in done if file.exists() for line in file.read_text().splitlines()]
        ran = {(entry["file"], entry["number"]) for entry in known}
        again = {(entry["file"], entry["number"]) for entry in known if args.again and not entry["seen"]}
        every = [mutant for file in FILES for mutant in mutants(file)]
        random.Random(0).shuffle(every)
        place, of = map(int, args.shard.split("/"))
        every = [m for m in every if ((m.file, m.number) in again if args.again else (m.file, m.number) not in ran)]
        self.todo = every[place::of]

    def tests_of(self, mutant: Mutant) -> list[str]:
        """The tests that reach a mutant, fastest first, as many as there is time for."""
        reached = self.reached.get(mutant.file, {})
        found = set().union(*reached.values()) if not mutant.is_inner else set()
        first, last = mutant.lines
        # The lines of a statement that spans several are those of its beginning.
        while mutant.is_inner and first > 0 and not found:
            found = set().union(*(reached.get(line, ()) for line in range(first, last + 1)))
            first -= 1
        taken, total = [], 0.0
        # What an import runs may show in any test.
        for test in sorted(found if mutant.is_inner else self.seconds, key=lambda t: (t not in found, self.seconds[t])):
            if taken and (total + self.seconds[test] > self.args.most):
                break
            taken.append(test)
            total += self.seconds[test]
        return taken

    def outer(self) -> None:
        """Runs what an import runs, from a process that has imported everything but the package."""
        for name in self.modules:
            try:
                importlib.import_module(name)
            except Exception:
                continue
        early = [name for name in sys.modules if name.startswith("gen_turbo")]
        assert not early, f"imported before any change: {early}"
        for mutant in self.todo:
            if not mutant.is_inner and not self.is_over():
                tests = self.tests_of(mutant)
                self.one(mutant, tests, lambda mutant=mutant, tests=tests: self.imported(mutant, tests))

    def imported(self, mutant: Mutant, tests: list[str]) -> int:
        module = mutant.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        sys.meta_path.insert(0, Changed(module, mutant))
        order = {test: place for place, test in enumerate(tests)}
        return int(pytest.main([*OPTIONS, "-x", *tests], plugins=[Quiet(), Ordered(order), Told(self.told)]) != 0)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Runs what functions run, from a process that has collected every test."""
        items = {item.nodeid: item for item in session.items}
        gc.collect()
        self.functions = [f for f in gc.get_objects() if type(f) is types.FunctionType]
        gc.freeze()
        for mutant in self.todo:
            if mutant.is_inner and not self.is_over():
                tests = self.tests_of(mutant)
                chosen = [items[test] for test in tests if test in items]
                self.one(mutant, tests, lambda mutant=mutant, chosen=chosen: self.exchanged(session, mutant, chosen))
        return True

    def exchanged(self, session: pytest.Session, mutant: Mutant, chosen: list[pytest.Item]) -> int:
        file, codes = os.path.abspath(mutant.file), {}
        codes_of(compile(mutant.tree(), file, "exec"), codes)
        num_exchanged = 0
        for function in self.functions:
            code = codes.get((function.__code__.co_qualname, function.__code__.co_firstlineno))
            if function.__code__.co_filename == file and code is not None:
                function.__code__ = code
                num_exchanged += 1
        assert num_exchanged, mutant
        session.items, session.config.option.maxfail = chosen, 1
        session.config.pluginmanager.register(Told(self.told))
        try:
            from _pytest.main import pytest_runtestloop

            pytest_runtestloop(session)
        except session.Failed:
            return 1
        return int(session.testsfailed > 0)

    def one(self, mutant: Mutant, tests: list[str], run: Any) -> None:
        """Runs tests on a mutant in a process of its own, and writes down what came of it."""
        begin = time.monotonic()
        read, self.told = os.pipe()
        pid = os.fork() if tests else 0
        if tests and pid == 0:
            code = 2
            try:
                null = os.open(os.devnull, os.O_RDWR)
                for stream in (0,) if self.args.loud else (0, 1, 2):
                    os.dup2(null, stream)
                allowed = 60 + int(5 * sum(map(self.seconds.__getitem__, tests)))
                resource.setrlimit(resource.RLIMIT_CPU, (allowed, allowed))
                code = run()
            except BaseException as error:
                os.write(self.told, repr(error).encode()[:200])
                if self.args.loud:
                    import traceback

                    traceback.print_exc()
            finally:
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) if tests else 0
        os.close(self.told)
        by = os.read(read, 1000).decode(errors="replace")
        os.close(read)
        entry = {"file": mutant.file, "number": mutant.number, "what": str(mutant), "seen": status != 0, "by": by,
                 "status": status, "tests": len(tests), "seconds": round(time.monotonic() - begin, 2)}  # fmt: skip
        with self.args.results.open("a") as out:
            out.write(json.dumps(entry) + "\n")

    def is_over(self) -> bool:
        return time.monotonic() > self.ends


def table(files: list[Path]) -> None:
    """Prints counts by file and what survived; of a mutant that was run again the last result counts."""
    entries = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    last = {(entry["file"], entry["number"]): entry for entry in entries}
    every = collections.Counter({file: len(mutants(file)) for file in FILES})
    ran = collections.Counter(entry["file"] for entry in last.values())
    seen = collections.Counter(entry["file"] for entry in last.values() if entry["seen"])
    for file, number in every.items():
        if number:
            share = f"{seen[file] / max(1, ran[file]):.0%}"
            print(f"| `{file.removeprefix('gen_turbo/')}` | {number} | {ran[file]} | {seen[file]} | {share} |")
    print(f"| all | {every.total()} | {ran.total()} | {seen.total()} | {seen.total() / max(1, ran.total()):.1%} |")
    for _, entry in sorted(last.items()):
        if not entry["seen"]:
            print(f"{entry['tests']:5d} {entry['number']:4d} {entry['what']}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cover = commands.add_parser("cover")
    cover.add_argument("cover", type=Path)
    cover.add_argument("tests", nargs=argparse.REMAINDER)
    run = commands.add_parser("run")
    run.add_argument("cover", type=Path)
    run.add_argument("results", type=Path)
    run.add_argument("--done", type=Path, nargs="*", default=[], help="results of others, which are not run again")
    run.add_argument("--again", action="store_true", help="run what has survived again")
    run.add_argument("--shard", default="0/1", help="the mutants K, K + N, ... of what is left: K/N")
    run.add_argument("--seconds", type=float, default=1e9, help="begin no mutant after that time")
    run.add_argument("--most", type=float, default=1e9, help="most seconds of tests for one mutant")
    run.add_argument("--loud", action="store_true")
    commands.add_parser("table").add_argument("results", type=Path, nargs="+")
    args = parser.parse_args()
    if args.command == "table":
        table(args.results)
    elif args.command == "cover":
        sys.exit(pytest.main([*OPTIONS, *args.tests], plugins=[Cover(args.cover)]))
    else:
        runs = Runs(args)
        print(f"{len(runs.todo)} mutants", flush=True)
        runs.outer()
        files = dict.fromkeys(test.split("::")[0] for test in runs.seconds)
        pytest.main([*OPTIONS, *files], plugins=[runs])


if __name__ == "__main__":
    main()
