"""Settings for your own model and device: search, load what was found, generate with it.

python examples/tune.py [--tiny]
"""

import argparse
from pathlib import Path

import gen_turbo
from gen_turbo.commands import cli

CONFIG = "sdxl"
PROMPTS = ("a red fox in the snow", "a street in the rain at night")


def main() -> None:
    """Searches settings that stay near stock, and generates one image with them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="the embedded model and one counted trial")
    parser.add_argument("--output", type=Path, default=Path("tuned.yaml"), help="the settings that are found")
    options = parser.parse_args()
    if options.tiny:
        config, small = "tiny", ["steps=4", "height=64", "width=64"]
        search = ["--target", "psnr>=20", "--trials", "1", "--images", "1", "--counted", *small]
    else:
        # A search that is stopped continues where it was; more trials find more.
        config, search = CONFIG, ["--target", "psnr>=30", "--trials", "12"]
        search += [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    if cli.main(["tune", "--config", config, "--output", str(options.output), *search]):
        raise SystemExit("no setting was found")
    pipe = gen_turbo.load_pipeline(config, processor=str(options.output))
    size = {"num_inference_steps": 4, "height": 64, "width": 64} if options.tiny else {}
    pipe(PROMPTS[0], **size).images[0].save(options.output.with_suffix(".png"))
    print(gen_turbo.report(pipe))


if __name__ == "__main__":
    main()
