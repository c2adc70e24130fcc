"""`python -m gen_turbo.report README.md`: brings tables, and if wished a plot, up to date with the records."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gen_turbo.report.markdown import rewrite


def main(arguments: list[str] | None = None) -> int:
    """Rewrites and draws; gives the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gen_turbo.report", description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", help="Markdown file with table markers")
    parser.add_argument("--records", type=Path, default=Path("gen_turbo/bench/records"), help="folder of the records")
    parser.add_argument("--plot", type=Path, help="picture of the quality records to draw, PNG or SVG")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps of stock in the plot")
    options = parser.parse_args(arguments)
    try:
        if options.file is not None:
            print(f"{options.file}: {'rewritten' if rewrite(options.file, options.records) else 'up to date'}")
        if options.plot is not None:
            from gen_turbo.report.plot import plot_quality

            plot_quality(options.records, options.steps, options.plot)
            print(f"{options.plot}: drawn")
    except (ImportError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
