"""`gen-turbo bench readme`: rewrites the tables of Markdown pages between their markers, and draws the plots."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from gen_turbo.bench.tables import TABLES

_MARKED = re.compile(r"<!-- table:(?P<name>\S+) -->\n(?P<body>.*?)<!-- /table -->", re.DOTALL)


def run(options: argparse.Namespace) -> None:
    """Rewrites the tables of all pages and, with `--plots`, draws the plots of the records."""
    for page in pages_of(options.files):
        print(f"{page}: {'rewritten' if rewrite(page, options.records) else 'up to date'}")
    if options.plots is not None:
        from gen_turbo.bench.plot import plot_quality, plot_skipping, plot_understanding

        plots = {"quality": plot_quality, "understanding": plot_understanding, "skipping": plot_skipping}
        for name, plot in plots.items():
            path = options.plots / f"{name}.png"
            plot(options.records, path)
            print(f"{path}: drawn")


def pages_of(paths: Sequence[Path]) -> list[Path]:
    """The Markdown pages with tables: files as they are named, and those inside of folders."""
    pages: list[Path] = []
    for path in paths:
        if path.is_dir():
            pages += [
                page for page in sorted(path.glob("**/*.md")) if "<!-- table:" in page.read_text(encoding="utf-8")
            ]
        else:
            pages.append(path)
    return pages


def with_tables(text: str, folder: Path) -> str:
    """Replaces what stands between `<!-- table:NAME -->` and `<!-- /table -->` by the table of the records.

    Args:
        text: Markdown; without markers it is returned as it is.
        folder: Where the records are.

    Raises:
        ValueError: If a marker names no table or is not closed.
    """
    opened, closed = text.count("<!-- table:"), text.count("<!-- /table -->")
    if not opened == closed == len(_MARKED.findall(text)):
        raise ValueError(f"{opened} table markers are opened and {closed} closed; write each marker on its own line")

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"no table is called {name!r}; there are: {', '.join(TABLES)}")
        return f"<!-- table:{name} -->\n{TABLES[name](folder)}\n<!-- /table -->"

    return _MARKED.sub(table, text)


def rewrite(path: Path, folder: Path) -> bool:
    """Brings the tables of a file up to date and says whether the file changed; raises ValueError without a file."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}; name a Markdown file with table markers, such as README.md")
    before = path.read_text(encoding="utf-8")
    after = with_tables(before, folder)
    if after != before:
        path.write_text(after, encoding="utf-8")
    return after != before
