"""Write a random-weight checkpoint of a GLM-4-0414 geometry in Hugging Face layout, one shard in memory at a time.

    python tools/make_checkpoint.py out/glm-4-9b-2layers --geometry glm-4-9b --layers 2

For benchmarks and for trying a build at full size where the real weights can't be had. There is no tokenizer in it
unless ``--tokenizer`` names a folder to copy one from, say ``glm4export/demo``: then the build can calibrate, and a
session take text. Fewer tokens than the model's vocabulary are no mistake.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from geometries import GEOMETRIES
from safetensors.torch import save_file

from glm4export.sources.ledger import expected_tensors
from glm4graphs.config import Glm4Config

EOS = [151329, 151336, 151338]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def config_json(config: Glm4Config) -> dict[str, object]:
    """The config.json of a geometry, in the spelling of the published checkpoints."""
    fields = {name: getattr(config, name) for name in Glm4Config.__dataclass_fields__ if name != "rope"}
    return {
        "architectures": ["Glm4ForCausalLM"],
        "model_type": "glm4",
        "torch_dtype": "bfloat16",
        **fields,
        "rope_theta": config.rope.theta,
        "partial_rotary_factor": config.rope.partial_rotary_factor,
        "eos_token_id": EOS,
        "pad_token_id": EOS[0],
    }


def shards(shapes: dict[str, tuple[int, ...]], limit: int) -> Iterator[list[str]]:
    """Group tensors, in order, into shards of at most ``limit`` bytes as bf16 (a larger tensor gets its own)."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * math.prod(shape)
        if names and size + nbytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """bf16: norms near 1, matrices with the spread that keeps activations of a random model ordinary."""
    data = torch.empty(shape, dtype=torch.bfloat16)
    return data.uniform_(0.9, 1.1) if name.endswith("norm.weight") else data.normal_(std=0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="glm-4-9b", help="default: %(default)s")
    parser.add_argument("--layers", type=int, help="fewer (or more) layers than the model has")
    parser.add_argument("--shard-size", type=float, default=1.0, metavar="GB", help="default: %(default)s")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="copy the tokenizer's files from there")
    arguments = parser.parse_args()

    config = GEOMETRIES[arguments.geometry]
    if arguments.layers:
        config = replace(config, num_hidden_layers=arguments.layers)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES if arguments.tokenizer else ():
        shutil.copyfile(arguments.tokenizer / name, arguments.out / name)
    shapes = dict(expected_tensors(config))
    groups = list(shards(shapes, int(arguments.shard_size * 1e9)))
    weight_map = {}
    torch.manual_seed(0)
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        save_file({name: random_tensor(name, shapes[name]) for name in names}, arguments.out / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
        print(f"{file}: {len(names)} tensors", flush=True)
    total = 2 * sum(math.prod(shape) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (arguments.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (arguments.out / "config.json").write_text(json.dumps(config_json(config), indent=2))


if __name__ == "__main__":
    main()
