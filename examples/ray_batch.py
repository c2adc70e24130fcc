"""Many prompts on several processes or machines: write the items, run the batch, read the results.

python examples/ray_batch.py [--tiny] [--address HOST:6379]
"""

import argparse
import json
from pathlib import Path

from gen_turbo.commands import cli

ANIMALS, PLACES = ("fox", "owl", "hare", "deer"), ("in the snow", "in a forest", "by a lake", "at night")


def main() -> None:
    """Writes sixteen prompts, works through them with Ray, and prints what became of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="two prompts, the embedded model and one worker on the CPU")
    parser.add_argument("--address", help="a running cluster (default: Ray is started here)")
    parser.add_argument("--workers", type=int, default=2, help="processes, each with a model of its own (default: 2)")
    parser.add_argument("--output", type=Path, default=Path("animals"), help="folder of the results")
    options = parser.parse_args()
    items = [
        {"id": f"{animal}-{number}", "prompt": f"a {animal} {place}", "place": place}
        for animal in ANIMALS
        for number, place in enumerate(PLACES)
    ]
    source = options.output.with_suffix(".jsonl")
    source.write_text("".join(json.dumps(item) + "\n" for item in items[: 2 if options.tiny else None]))
    command = ["batch", str(source), "--output", str(options.output), "--engine", "ray"]
    command += ["--address", options.address] if options.address else []
    if options.tiny:
        command += ["--workers", "1", "--config", "tiny", "device=cpu", "steps=2", "height=64", "width=64"]
    else:
        command += ["--workers", str(options.workers), "--config", "sdxl", "processor.ratio=0.4"]
    # The same command continues after a crash. 1: some items were quarantined, see quarantine.jsonl.
    code = cli.main(command)
    if code > 1:
        raise SystemExit(code)
    for line in (options.output / "results.jsonl").read_text().splitlines():
        result = json.loads(line)
        print(f"{result['id']}: {result['output']}, seed {result['seed']}, {result['place']}")
    raise SystemExit(code)


if __name__ == "__main__":
    main()
