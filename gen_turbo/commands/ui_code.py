"""What was chosen on the page, as Python and as YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import yaml

from gen_turbo.config import PipelineConfig


def as_python(name: str, settings: Mapping[str, Any], call: Mapping[str, Any], seed: int) -> str:
    """The lines that generate the accelerated image by the configuration of a name or a file."""
    given = ", ".join(f"{key}={value!r}" for key, value in settings.items() if key != "method")
    arguments = "".join(f"    {key}={value!r},\n" for key, value in call.items() if value is not None)
    return (
        "import torch\n\nfrom gen_turbo import TurboProcessor, load_pipeline\n\n"
        f"pipe = load_pipeline({name!r}, processor=TurboProcessor({given}))\n"
        f"image = pipe(\n{arguments}    generator=torch.Generator().manual_seed({seed}),\n).images[0]\n"
    )


def as_yaml(config: PipelineConfig, settings: Mapping[str, Any], steps: int) -> str:
    """A configuration file with the same settings, for `load_pipeline` and `gen-turbo generate --config`."""
    plain = PipelineConfig(checkpoint=config.checkpoint)
    changed = {k: v for k, v in asdict(replace(config, steps=steps)).items() if v != getattr(plain, k)}
    tree = {"pipeline": config.pipeline, "checkpoint": config.checkpoint, **changed, "processor": dict(settings)}
    return str(yaml.safe_dump(tree, sort_keys=False))
