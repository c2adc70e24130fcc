"""`gen-turbo batch`: what an item becomes depends on nothing but itself, and nothing is lost or done twice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from gen_turbo.commands import batch_ray, batch_work, cli
from gen_turbo.commands.batch_rows import Row, read_rows
from gen_turbo.commands.batch_work import Job, Outcome
from gen_turbo.config import ConfigError

ROOT = Path(__file__).parents[1]
SETTINGS = "pipeline: text-to-image\ncheckpoint: {checkpoint}\ndevice: cpu\nsteps: 2\nheight: 32\nwidth: 32\n"
PATIENCE_S = 240.0


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Writes a file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prompts(count: int) -> list[dict[str, Any]]:
    """Items of which no two have the same seed."""
    return [{"id": f"item {number}", "prompt": "a large red circle", "number": number} for number in range(count)]


def results(folder: Path, name: str = "results.jsonl") -> list[dict[str, Any]]:
    """The lines of a file of results."""
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def images(folder: Path) -> dict[str, bytes]:
    """The content of every image."""
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.fixture
def settings(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A configuration of the small checkpoint; the current folder is an empty one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(SETTINGS.format(checkpoint=tiny_checkpoint))
    return "tiny.yaml"


class Stub:
    """Gives an image of one color, and fails as often as it was made to."""

    failures: dict[str, int] = {}
    worked: list[str] = []

    def __init__(self, job: Job) -> None:
        pass

    def work(self, row: Row, content: bytes | None) -> Outcome:
        """Fails or gives its number."""
        self.worked.append(row.id)
        if self.failures.get(row.id, 0) > 0:
            self.failures[row.id] -= 1
            return Outcome(error="no such luck")
        return Outcome({"seed": row.seed_of(0)}, batch_work.png_of(Image.new("RGB", (8, 8), "red")))


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Stub]]:
    """Items are worked on by the stub."""
    monkeypatch.setattr(batch_work, "Worker", Stub)
    monkeypatch.chdir(tmp_path)
    Stub.failures, Stub.worked = {}, []
    yield Stub


def test_formats_hold_the_same_items(tmp_path: Path) -> None:
    """Catches a reader that changes ids, seeds or texts, and ids that depend on the order."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="the batch extra is not installed")
    import pyarrow

    rows = [{"prompt": "a red fox", "seed": 7}, {"prompt": "1e3", "seed": None}, {"prompt": "a red fox", "seed": 7}]
    lines = write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.csv").write_text("prompt,seed\na red fox,7\n1e3,\na red fox,7\n")
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read_rows(lines, wants_image=False)
    assert [row.prompt for row in found] == ["a red fox", "1e3", "a red fox"]
    assert len({row.id for row in found}) == 3
    assert read_rows(tmp_path / "a.parquet", wants_image=False) == found
    by_text = read_rows(tmp_path / "a.csv", wants_image=False)
    assert [(row.prompt, row.seed) for row in by_text] == [(row.prompt, row.seed) for row in found]
    turned = read_rows(write(tmp_path / "b.jsonl", rows[::-1]), wants_image=False)
    assert {(row.id, row.prompt) for row in turned} == {(row.id, row.prompt) for row in found}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a", "prompt": "x"}\n{"id": "a", "prompt": "y"}', "the id 'a' occurs twice"),
        ('{"prompt": 3}', "item 1: prompt must be a text; got 3"),
        ('{"image": "a.png"}', "item 1: there is no prompt"),
        ('{"prompt": "x", "seed": -1}', "seed must be a whole number from 0"),
        ('{"prompt": "x", "seed": 1.5}', "seed must be a whole number from 0"),
        ('{"prompt": "x", "note": NaN}', "other columns must be plain values"),
        ('{"id": "", "prompt": "x"}', "an id must have 1 to 200 characters"),
        ("no", "line 1 is no JSON"),
        ("[1]", "line 1 must be an object"),
        ("", "holds no items"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_done(
    text: str, message: str, stub: type[Stub], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a batch that stops in the middle because of a line that could have been read first."""
    Path("in.jsonl").write_text(text)
    assert cli.main(["batch", "in.jsonl", "--output", "out"]) == 2
    assert message in capsys.readouterr().err
    assert not Path("out").exists() and not stub.worked


def test_seeds_follow_from_ids_alone() -> None:
    """Catches seeds by position, and one seed for all."""
    seeds = [Row(str(number)).seed_of(0) for number in range(1000)]
    assert len(set(seeds)) == 1000 and all(0 <= seed < 2**63 for seed in seeds)
    assert Row("5", prompt="other").seed_of(0) == seeds[5] != Row("5").seed_of(1)
    assert Row("5", seed=3).seed_of(1) == 3


def test_ids_of_any_form_become_files_inside_of_the_folder(stub: type[Stub]) -> None:
    """Catches an id that is a path, and two ids that become one file."""
    names = ["../../a", "/etc/b", "a.b", "a.c", "A", "..", "\u00e9\n", "c" * 190]
    write(Path("in.jsonl"), [{"id": name, "prompt": "x"} for name in names])
    assert cli.main(["batch", "in.jsonl", "--output", "out"]) == 0
    assert [line["id"] for line in results(Path("out"))] == names
    assert len(images(Path("out"))) == len(names) and {path.name for path in Path().iterdir()} == {"in.jsonl", "out"}


def test_a_failing_item_is_tried_again_and_then_quarantined(
    stub: type[Stub], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches one failure that ends a run, an item that is tried for ever, and one that every run tries again."""
    write(Path("in.jsonl"), prompts(4))
    stub.failures = {"item 1": 2, "item 2": 9}
    command = ["batch", "in.jsonl", "--output", "out"]
    assert cli.main(command) == 1
    assert "item 2: no such luck" in capsys.readouterr().err
    assert [stub.worked.count(f"item {number}") for number in range(4)] == [1, 3, 3, 1]
    assert [line["number"] for line in results(Path("out"))] == [0, 1, 3]
    assert results(Path("out"), "quarantine.jsonl") == [{"id": "item 2", "error": "no such luck"}]
    stub.worked.clear()
    assert cli.main(command) == 1 and not stub.worked
    stub.failures = {}
    assert cli.main([*command, "--retry-quarantined"]) == 0 and stub.worked == ["item 2"]
    assert len(results(Path("out"))) == 4 and results(Path("out"), "quarantine.jsonl") == []


def test_results_are_a_table_as_well(stub: type[Stub]) -> None:
    """Catches a table that differs from the lines."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="the batch extra is not installed")
    write(Path("in.jsonl"), [{"id": "a", "prompt": "x", "note": 1}, {"id": "b", "prompt": "x", "note": "two"}])
    assert cli.main(["batch", "in.jsonl", "--output", "out"]) == 0
    table = parquet.read_table("out/results.parquet").to_pylist()
    assert [row["note"] for row in table] == ["1", "two"]
    assert [row["output"] for row in table] == [line["output"] for line in results(Path("out"))]


def test_images_of_a_folder_are_captioned(tmp_path: Path, vlm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an image that is read by its place, and a bad file that ends the run."""
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Image.new("RGB", (32, 32), "red").save("in/red.png")
    Path("in/broken.png").write_bytes(b"no image")
    Path("say.yaml").write_text(f"pipeline: caption\ncheckpoint: {vlm}\ndevice: cpu\nmax_new_tokens: 3\n")
    assert cli.main(["batch", "in", "--output", "out", "--config", "say.yaml"]) == 1
    (line,) = results(Path("out"))
    assert line["id"] == "red.png" and line["caption"] and line["tokens"] > 0
    assert [line["id"] for line in results(Path("out"), "quarantine.jsonl")] == ["broken.png"]


def test_an_image_depends_on_its_item_alone(settings: str) -> None:
    """Catches noise that is drawn in the order of work, and a result that its neighbors change."""
    write(Path("a.jsonl"), prompts(3))
    write(Path("b.jsonl"), prompts(3)[::-1][:2])
    for name in "ab":
        assert cli.main(["batch", f"{name}.jsonl", "--output", name, "--config", settings]) == 0
    few, all_of_them = images(Path("b")), images(Path("a"))
    assert len(set(all_of_them.values())) == 3
    assert len(few) == 2 and few.items() <= all_of_them.items()


class Run:
    """A run in a process of its own that can be killed in the middle."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "gen_turbo.commands.cli", "batch", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.log = Path("log")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log, stdout=log, env=environment)

    def wait_for(self, folder: Path, count: int) -> None:
        """Waits until so many images are there."""
        end = time.monotonic() + PATIENCE_S
        while len(images(folder)) < count:
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-2000:]
            time.sleep(0.02)

    def workers(self) -> list[int]:
        """The numbers of the processes that work."""
        return [int(number) for number in re.findall(r"worker (\d+) is ready", self.log.read_text())]

    def kill(self) -> None:
        """Ends the run at once."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def finish(self) -> str:
        """Waits for the end."""
        code = self.process.wait(PATIENCE_S)
        assert code == 0, self.log.read_text()[-2000:]
        return self.log.read_text()


def test_a_run_that_is_killed_twice_loses_and_repeats_nothing(settings: str) -> None:
    """Catches results that exist in memory only, and a run that begins anew."""
    source = str(write(Path("in.jsonl"), prompts(9)))
    for name, count in (("first", 2), ("second", 5)):
        run = Run(source, "--output", "out", "--config", settings)
        run.wait_for(Path("out"), count)
        run.kill()
        times = {path: path.stat().st_mtime_ns for path in Path("out").glob("*.png")}
        assert len(times) >= count, name
    assert cli.main(["batch", source, "--output", "out", "--config", settings]) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert [line["number"] for line in results(Path("out"))] == list(range(9))
    assert len(images(Path("out"))) == 9 and not list(Path("out").glob(".*"))


def test_ray_survives_the_death_of_a_worker_and_of_the_driver(settings: str) -> None:
    """Catches an item that dies with its worker, one that is worked on twice, and results that differ from local."""
    pytest.importorskip("ray", reason="the ray extra is not installed")
    source = str(write(Path("in.jsonl"), prompts(12)))
    arguments = (source, "--output", "out", "--config", settings, "--engine", "ray")
    run = Run(*arguments, "--workers", "2")
    run.wait_for(Path("out"), 2)
    first, _ = run.workers()
    os.kill(first, signal.SIGKILL)
    run.wait_for(Path("out"), 5)
    run.kill()
    before = {path: path.stat().st_mtime_ns for path in Path("out").glob("*.png")}
    said = Run(*arguments).finish()
    assert re.search(r"[0-9]+ done, ([5-9]|1[0-2]) finished before, 0 quarantined", said), said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [line["number"] for line in results(Path("out"))] == list(range(12))
    write(Path("few.jsonl"), prompts(2))
    assert cli.main(["batch", "few.jsonl", "--output", "few", "--config", settings]) == 0
    assert images(Path("few")).items() <= images(Path("out")).items()


class FakeRay:
    """Two workers, of which each dies with one item."""

    exceptions = SimpleNamespace(RayError=type("RayError", (Exception,), {}))

    def __init__(self) -> None:
        self.started = 0

    def init(self, **options: Any) -> None:
        """Starts nothing."""

    def shutdown(self) -> None:
        """Ends nothing."""

    def kill(self, actor: Any) -> None:
        """Ends nothing."""

    def remote(self, **options: Any) -> Any:
        """Makes a class of workers."""

        def start() -> Any:
            self.started += 1
            return SimpleNamespace(
                load=SimpleNamespace(remote=lambda job: (1, None)),
                work=SimpleNamespace(remote=lambda row, content: (row.id, object())),
            )

        return lambda cls: SimpleNamespace(remote=start)

    def wait(self, references: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        """The first is done."""
        return references[:1], references[1:]

    def get(self, reference: Any) -> Any:
        """Dies with one item."""
        if isinstance(reference, list):
            return reference
        if reference[0] == "bad":
            raise self.exceptions.RayError("killed")
        return Outcome({})


def test_an_item_that_kills_its_workers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a batch that one item keeps for ever, and workers that are not replaced."""
    ray = FakeRay()
    monkeypatch.setattr(batch_ray, "import_module", lambda name: ray)
    said: list[str] = []
    engine = batch_ray.RayEngine(Job(None, 0, 1), workers=2, address=None, gpus=0, say=said.append)
    engine.submit(Row("bad"), None)
    engine.submit(Row("good"), None)
    found = {row.id: outcome for _ in range(2) for row, outcome in engine.collect()}
    assert found["good"].error is None
    assert found["bad"].error == "3 workers died while working on it: killed"
    assert ray.started == 3 and sum("died" in text for text in said) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "2"], "are of the engine ray; add --engine ray"),
        (["--tries", "0"], "tries must be at least 1"),
    ],
)
def test_wrong_options_are_one_sentence(
    arguments: list[str], message: str, stub: type[Stub], capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an option that the engine does not read."""
    write(Path("in.jsonl"), prompts(1))
    assert cli.main(["batch", "in.jsonl", "--output", "out", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback in place of the command that installs Ray."""

    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(batch_ray, "import_module", absent)
    with pytest.raises(ConfigError, match=r"pip install 'gen_turbo\[ray\]'"):
        batch_ray.RayEngine(Job(None, 0, 1), workers=1, address=None, gpus=0)
