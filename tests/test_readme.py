"""README: its tables are those of the committed records, its code runs, its pictures exist."""

import os
import re
from pathlib import Path

from gen_turbo.bench.readme import with_tables

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RECORDS = ROOT / "gen_turbo" / "bench" / "records"


def test_tables_are_those_of_the_committed_records() -> None:
    """Catches a number in README that no record backs."""
    assert with_tables(README, RECORDS) == README, "run: gen-turbo bench readme README.md"


def test_linked_files_exist() -> None:
    """Catches a picture or file that was moved or never committed."""
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", README) if "://" not in link]
    assert [link for link in links if link and not (ROOT / link).exists()] == []


def test_python_blocks_run(tmp_path: Path) -> None:
    """Catches an example that was never run, or no longer does."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    before, names = Path.cwd(), {"__name__": "readme"}
    os.chdir(tmp_path)
    try:
        for number, block in enumerate(blocks):
            exec(compile(block, f"README.md, python block {number + 1}", "exec"), names)
    finally:
        os.chdir(before)
