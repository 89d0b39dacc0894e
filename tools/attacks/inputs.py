"""The cases of tools/attack_inputs.py: each is made from its seed alone, and returns "accepted" or raises."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from attacks.mutator import ESCAPE, Mutator

FAMILIES = ("configs", "files", "manifests")
CONFIG: dict[str, Any] = {
    "architectures": ["Glm4ForCausalLM"],
    "attention_bias": True,
    "eos_token_id": [1, 2, 3],
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 96,
}
ORIGINAL = {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "factor": 4.0, **ORIGINAL, "attention_factor": 1.1}
SCALINGS: tuple[dict[str, Any], ...] = (
    YARN,
    {"type": "linear", "factor": 2.0},
    {"type": "dynamic", "factor": 2.0},
    {"type": "longrope", **ORIGINAL, "short_factor": [1.5] * 8, "long_factor": [3.0] * 8},
    {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL},
)


def config_case(folder: Path, seed: str, compiles: bool) -> str:
    """config.json and generation_config.json through everything that reads them, beside a checkpoint that is right."""
    from glm4export.inspection.facts import inspect_model, model_text
    from glm4export.sources.checkpoint import Checkpoint, Location
    from glm4export.sources.config_json import read_config, read_token_ids

    mutator, data = Mutator(seed), json.loads(json.dumps(CONFIG))
    rope = mutator.random.random()
    if rope < 0.4:
        data["rope_scaling"] = json.loads(json.dumps(mutator.random.choice(SCALINGS)))
    elif rope < 0.6:
        names = ("rope_theta", "partial_rotary_factor")
        data["rope_parameters"] = {"rope_type": "default", **{name: data.pop(name) for name in names}}
        if rope < 0.5:
            data["rope_parameters"] |= YARN
    for _ in range(mutator.random.choice((1, 1, 1, 2, 5))):
        mutator.change(data)
    (folder / "config.json").write_bytes(mutator.bytes(mutator.text(data).encode(errors="surrogatepass")))
    config = read_config(folder / "config.json")
    model_text(str(folder), inspect_model(Location(folder, {}), mutator.random.choice(("cpu", "cuda", "tensorrt"))))
    read_token_ids(folder)
    Checkpoint.open(folder).check(config)
    if compiles:
        compile_config(config, mutator.random)
    return "accepted"


def compile_config(config: Any, choice: random.Random) -> None:
    """Compile a graph that isn't run, and compute its rotary tables' first and last rows."""
    import torch

    from glm4export.build.build import compile_graph
    from glm4export.build.options import BuildOptions
    from glm4export.sources.config_json import sequence_limit
    from glm4export.weights.fp16 import Fp16Scales
    from glm4export.weights.recipes import RotaryTable

    builds = (("cpu", "fp32", "decode"), ("cpu", "fp16", "prefill"), ("tensorrt", "fp16", "step"))
    target, precision, name = choice.choice(builds)
    positions = sequence_limit(config, None)
    options = BuildOptions(precision, target)
    skeleton = compile_graph(config, name, options, max_seq_len=positions, scales=Fp16Scales(2.0**-7, 0.25))
    tables = [recipe for recipe in skeleton.recipes.values() if isinstance(recipe.expr, RotaryTable)]
    assert len(tables) == 2, "cos and sin"
    for recipe in tables:
        for first in (0, positions - 1):
            row = recipe.expr.read(None, ((first, first + 1), (0, recipe.shape[1]))).to(recipe.torch_dtype)
            assert torch.isfinite(row).all(), f"{recipe} row {first} isn't finite"


def file_case(folder: Path, seed: str, compiles: bool) -> str:
    """Shards and their index, or a single file: opened, checked, and read whole where they're accepted."""
    from glm4export.sources.checkpoint import Checkpoint
    from glm4export.sources.config_json import read_config
    from glm4export.weights.tensors import whole

    mutator = Mutator(seed)
    case = folder / "case"
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    (case / "config.json").write_text(json.dumps(CONFIG))
    header, data = split_file(folder / "model.safetensors")
    names = list(header)
    cuts = (0, len(names)) if mutator.random.random() < 0.5 else (0, len(names) // 3, len(names))
    index: dict[str, Any] = {"metadata": {"total_size": len(data)}, "weight_map": {}}
    for number, (first, last) in enumerate(pairwise(cuts)):
        name = "model.safetensors" if len(cuts) == 2 else f"model-{number + 1:05}-of-{len(cuts) - 1:05}.safetensors"
        index["weight_map"] |= dict.fromkeys(names[first:last], name)
        start = header[names[first]]["data_offsets"][0]
        part = {
            key: {**header[key], "data_offsets": [offset - start for offset in header[key]["data_offsets"]]}
            for key in names[first:last]
        }
        size = part[names[last - 1]]["data_offsets"][1]
        content = data[start : start + size]
        if mutator.random.random() < 0.6:
            part, content = mutate_header(part, content, mutator)
        text = mutator.text(part).encode(errors="surrogatepass")
        length = len(text) + (
            mutator.random.choice((-1, 1, 1000, 2**40, 2**63)) if mutator.random.random() < 0.05 else 0
        )
        (case / name).write_bytes(mutator.bytes(max(0, length).to_bytes(8, "little") + text + content))
    if len(cuts) > 2 or mutator.random.random() < 0.05:
        for _ in range(mutator.random.choice((0, 0, 1, 3))):
            change_index(index, mutator)
        (case / "model.safetensors.index.json").write_bytes(
            mutator.bytes(mutator.text(index).encode(errors="surrogatepass"))
        )
    checkpoint = Checkpoint.open(case)
    checkpoint.check(read_config(case / "config.json"))
    for name, tensor in checkpoint.tensors.items():
        assert checkpoint.read(name, whole(tensor.shape)).shape == tensor.shape
    return "accepted"


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    header.pop("__metadata__", None)
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"])), data[size:]


def mutate_header(part: dict[str, Any], content: bytes, mutator: Mutator) -> tuple[dict[str, Any], bytes]:
    """What lies in a safetensors header in particular; anything else is :meth:`Mutator.change`."""
    choice = mutator.random
    name = choice.choice(list(part))
    kind = choice.randrange(10)
    if kind == 0:  # overlapping or leaving the file
        start = choice.choice((0, 4, 100, len(content), 2**62))
        part[name]["data_offsets"] = [start, start + choice.choice((-8, 0, 4, 100, 2**62))]
    elif kind == 1:
        part[name]["dtype"] = choice.choice(("I8", "F64", "BOOL", "F8_E4M3", "F4", "", "f32", ESCAPE, "C64", "BF16"))
    elif kind == 2:
        part[name]["shape"] = choice.choice(([], [0], [2**62, 2**62], [-1], [1.5], "64", [2**31] * 8, [1] * 100_000))
    elif kind == 3:
        prefix = choice.choice(("_orig_mod.", "module.", "base_model.model.", ESCAPE, "model.", "\u202e", "x" * 50_000))
        part = {prefix + key: value for key, value in part.items()}
    elif kind == 4:  # thousands that nobody asked for
        extra = choice.choice(("model.layers.{}.mlp.down_proj.weight", "x{}", ESCAPE + "{}", "a.lora_A.{}"))
        size = len(content)
        part |= {extra.format(n): {"dtype": "F32", "shape": [0], "data_offsets": [size, size]} for n in range(3000)}
    elif kind == 5:
        part[choice.choice((ESCAPE, "model.layers.99999999999.x", "model.layers.٣.x", "模", ""))] = part.pop(name)
    elif kind == 6:
        part["__metadata__"] = choice.choice(({"format": "pt"}, {"a": 1}, [], ESCAPE, {ESCAPE: ESCAPE}))
    elif kind == 7:
        content = content[: choice.randrange(len(content))] if choice.random() < 0.5 else content + b"\0" * 100
    else:
        mutator.change(part)
    return part, content


def change_index(index: dict[str, Any], mutator: Mutator) -> None:
    """Tensors given to other files, to files that aren't there, or nowhere."""
    choice, places = mutator.random, index.get("weight_map")
    if not isinstance(places, dict) or not places or choice.random() < 0.3:
        mutator.change(index)
        return
    name = choice.choice(list(places))
    files = [file for file in places.values() if isinstance(file, str)]
    elsewhere = ("../x.safetensors", "/etc/passwd", "", ".", "..", "model.safetensors", "a\0b", ESCAPE, "\ud800")
    places[name] = choice.choice((*files[:1], *files[-1:], *elsewhere))


def manifest_case(folder: Path, seed: str, compiles: bool) -> str:
    """A bundle's manifest beside files of the sizes it states."""
    from glm4runtime.contract import read_manifest

    mutator = Mutator(seed)
    data = json.loads((folder / "whole.json").read_text())
    for _ in range(mutator.random.choice((1, 1, 1, 2, 5))):
        mutator.change(data)
    (folder / "manifest.json").write_bytes(mutator.bytes(mutator.text(data).encode(errors="surrogatepass")))
    manifest = read_manifest(folder, check_hashes=mutator.random.random() < 0.2)
    assert manifest.cache.bytes_per_token > 0
    return "accepted"


CASES: dict[str, Callable[[Path, str, bool], str]] = dict(
    zip(FAMILIES, (config_case, file_case, manifest_case), strict=True)
)


def prepare(folder: Path) -> None:
    """A whole checkpoint of random weights, and a manifest with the files it lists."""
    import torch
    from safetensors.torch import save_file

    from glm4export.sources.config_json import parse_config
    from glm4export.sources.ledger import expected_tensors
    from glm4runtime.contract import CacheSpec, FileSpec, GraphSpec, Manifest, TensorSpec, TokenIds, sha256_of

    shapes = dict(expected_tensors(parse_config(CONFIG, "config.json")))
    save_file({name: torch.rand(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    specs = {}
    for name in ("weights.bin", "prefill.onnx", "decode.onnx", "config.json", "tokenizer.json"):
        (folder / name).write_bytes(b"\0" * 100)
        specs[name] = FileSpec(100, sha256_of(folder / name))
    tensors = (TensorSpec("input_ids", "int64", ("batch", "seq")), TensorSpec("logits", "float32", ("batch", 1, 96)))
    graphs = {name: GraphSpec(f"{name}.onnx", tensors[:1], tensors[1:]) for name in ("prefill", "decode")}
    manifest = Manifest(
        producer="glm4export",
        producer_version="0.1.0",
        family="glm4",
        task="causal-lm",
        target="cpu",
        precision="fp32",
        vocab_size=96,
        config=CONFIG,
        source={"fingerprint": "0"},
        tokens=TokenIds((1, 2, 3), 0, None),
        kv_cache=CacheSpec(2, 2, 32, "float32", 64),
        graphs=graphs,
        files=specs,
    )
    (folder / "whole.json").write_text(manifest.to_json())
