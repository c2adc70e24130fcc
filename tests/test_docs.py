"""README and the site: tables are those of the records, every code block runs, links hold, the site builds."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline

from gen_turbo import TurboProcessor
from gen_turbo.bench.readme import pages_of, with_tables
from gen_turbo.commands.cli import main
from gen_turbo.config import config_files

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "gen_turbo" / "bench" / "records"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
MOST_README_LINES = 150
BLOCK = re.compile(r"^```(?P<kind>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE)
OTHER_COMMANDS = ("pip install", "make ", "RAY_AUTH_MODE=token ")
UNWANTED = re.compile(r"\b(told|tells?|asks|leaves|pictures?|takes up where|comes off)\b", re.IGNORECASE)
STRINGS = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
QUOTED = re.compile(r"`[^`]*`|describe the picture")
NAMED = re.compile(r"`((?:gen_turbo|tests|examples|configs|docs|pipelines)/(?!.*NAME)[\w./-]+)`")
PROSE = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]


def name_of(page: Path) -> str:
    """The page's path in the repository."""
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[re.Match[str]]:
    """The code blocks of a page that are written there, not included from a file."""
    return [match for match in BLOCK.finditer(page.read_text(encoding="utf-8")) if "--8<--" not in match["code"]]


@pytest.mark.parametrize("page", [ROOT / "README.md", *pages_of([ROOT / "docs"])], ids=name_of)
def test_tables_are_those_of_the_committed_records(page: Path) -> None:
    """Catches a number that no record backs."""
    text = page.read_text(encoding="utf-8")
    assert with_tables(text, RECORDS) == text, "run: gen-turbo bench readme README.md docs"


def test_readme_is_short_and_has_one_generated_table() -> None:
    """Catches a README that grows tables again."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_README_LINES
    assert text.count("<!-- table:") == 1


def test_readme_links_to_files_that_exist() -> None:
    """Catches an image or page that was moved or never committed; the site's links are checked by its build."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert links and [link for link in links if link and not (ROOT / link).exists()] == []


@pytest.mark.parametrize("page", PROSE, ids=name_of)
def test_words_are_those_of_the_field(page: Path) -> None:
    """Catches words that nobody in the field uses, outside of code and of the generated tables."""
    text = re.sub(r"<!-- table:.*?<!-- /table -->|^```.*?^```|`[^`]*`|\]\([^)]*\)|--8<--.*", "",
                  page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)  # fmt: skip
    assert UNWANTED.findall(text) == []


SOURCES = [path for name in ("gen_turbo", "pipelines", "examples") for path in sorted((ROOT / name).glob("**/*.py"))]


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_words_of_the_source_are_those_of_the_field(source: Path) -> None:
    """Catches the same words in docstrings, comments, help texts and messages: texts of more than one word."""
    with source.open("rb") as file:
        texts = [
            (token.start[0], token.string)
            for token in tokenize.tokenize(file.readline)
            if token.type == tokenize.COMMENT or (token.type in STRINGS and " " in token.string.strip())
        ]
    assert [(line, text) for line, text in texts if UNWANTED.search(QUOTED.sub("", text))] == []


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints on the hub are small stand-ins of the same classes, and the current folder is an empty one."""
    spec = importlib.util.spec_from_file_location("tiny_models", ROOT / "examples" / "tiny_models.py")
    tiny_models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny_models)
    stock = DiffusionPipeline.from_pretrained.__func__

    def pipeline(cls: type, name: str, **settings: object) -> object:
        return stock(cls, name, **settings) if Path(name).exists() else tiny_models.pipeline(cls.__name__)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(pipeline))
    for name in tiny_models.READERS:
        cls = getattr(transformers, name)
        original = cls.from_pretrained.__func__

        def model(cls: type, path: object, original: object = original, **settings: object) -> object:
            is_local = Path(path).exists()
            return original(cls, path, **settings) if is_local else tiny_models.reader(cls.__name__)[0]

        monkeypatch.setattr(cls, "from_pretrained", classmethod(model))
    source = tmp_path / "docs" / "images" / "source.png"
    source.parent.mkdir(parents=True)
    shutil.copy(ROOT / "docs" / "images" / "source.png", source)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
@pytest.mark.usefixtures("stand_ins")
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_every_code_block_runs(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an example that was never run, or no longer does: Python in one namespace, YAML as files, commands."""
    names: dict[str, object] = {"__name__": "docs"}
    diffusers.utils.logging.disable_progress_bar()
    with torch.compiler.set_stance("force_eager"):
        for number, block in enumerate(blocks(page), 1):
            code, where = block["code"], f"{name_of(page)}, block {number}"
            if block["kind"] == "python":
                exec(compile(shortened(code), where, "exec"), names)
            elif block["kind"] in ("yaml", "jsonl"):
                Path(block["title"]).write_text(code)
            else:
                assert block["kind"] == "console", f"{where}: say of which kind it is"
                run_commands(code, capsys)


def shortened(code: str) -> str:
    """The same on a CPU in four steps; a schedule of PAR fits one number of steps only."""
    code = code.replace('"cuda"', '"cpu"').replace("torch.float16", "torch.float32")
    return code if "PARProcessor" in code else re.sub(r"num_inference_steps=\d+", "num_inference_steps=4", code)


def run_commands(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs the lines that begin with the command; others must be known to be run elsewhere."""
    for line in code.splitlines():
        command = line.removeprefix("$ ")
        if command.startswith("gen-turbo "):
            words = [*shlex.split(command)[1:], *(["steps=3"] if " generate " in command else [])]
            assert main(words) == 0, f"{line}\n{capsys.readouterr().err}"
        else:
            assert command.startswith(OTHER_COMMANDS), line


def test_files_that_pages_name_exist() -> None:
    """Catches a page that sends the reader to a file which was moved or split."""
    named = {name for page in PROSE for name in NAMED.findall(page.read_text(encoding="utf-8"))}
    assert named and sorted(name for name in named if not (ROOT / name).exists()) == []


def test_configurations_of_the_docs_exist() -> None:
    """Catches a page that names a configuration which was renamed."""
    named = {name for page in PAGES for name in re.findall(r"--config ([a-z][\w-]*)(?=[\s`])", page.read_text())}
    assert named <= {*config_files("pipeline"), "NAME"}


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    """Catches a broken link, a page outside of the navigation, a docstring that cannot be shown, hidden defaults."""
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stdout + built.stderr
    page = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert "gen_turbo.api.attach" in page
    turbo = (tmp_path / "methods" / "turbo" / "index.html").read_text(encoding="utf-8")
    default = str(TurboProcessor().value_weight)
    assert f'class="mf">{default}</span>' in turbo and "TurboProcessor.unread" not in turbo
