"""Mutated configs, weights with their index, and bundle manifests against what reads them: only UserError may come.

    python tools/attack_inputs.py --configs 5000 --files 2000 --manifests 5000
    python tools/attack_inputs.py --case configs/17

Each case is made from the seed and its number alone. A worker process runs them; what ends it, keeps it longer than
20 s or takes it past 2 GB is a finding, as is any exception but UserError, or a message that no terminal should get.
Exit status 1 on any finding.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

FAMILIES = ("configs", "files", "manifests")
OUTCOMES = ("accepted", "refused", "traceback", "hang", "death", "memory", "message")
MOST_SECONDS, MOST_MEGABYTES, MOST_LINES = 20, 2000, 40
GRAPHS = 40  # accepted configs whose graphs are compiled

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

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
ESCAPE = "\x1b[2J\x1b]0;owned\x07\r\n  forged: line"
NUMBERS = (
    *("0", "-1", "1", "2", "3", "7", "-0.0", "0.5", "1e-30", "1e-46", "5e-324", "1e30", "1e39", "1e308", "1e400"),
    *("NaN", "Infinity", "-Infinity", "2147483647", "2147483648", str(2**60), str(2**63), str(2**64), "100000000"),
    *("1" + "0" * 400, "1" + "0" * 5000, "1.0", "64.0", "16777216", "16777217", "1E5", "1.0000000000000002"),
)
OTHERS = (
    *("null", "true", "false", '""', '"x"', '"64"', "[]", "{}", "[1]", "[[]]", '{"a": 1}', '[null, 1, "x"]'),
    *('"yarn"', '"linear"', '"default"', '"dynamic"', '"gelu"', '"模型"', '"\\ud800"', '"\\u0000"', '"\\u202e"'),
    *(json.dumps(ESCAPE), json.dumps("x" * 100_000), "[" * 100_000, "[" * 500 + "]" * 500, "[" * 990 + "]" * 990),
    *('{"a":' * 300 + "1" + "}" * 300, "[" + "1," * 50_000 + "1]", json.dumps(["\x1b[31m"] * 20)),
)


class Mutator:
    """JSON with values that json.dumps wouldn't write, and texts that aren't JSON."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self._raw: list[str] = []

    def value(self) -> str:
        """A marker that :meth:`text` replaces by some JSON text."""
        self._raw.append(self.random.choice(self.random.choice((NUMBERS, OTHERS))))
        return f"@raw{len(self._raw) - 1}@"

    def text(self, data: Any) -> str:
        """The JSON, now and then with a key twice."""
        text = json.dumps(data, ensure_ascii=self.random.random() < 0.5)
        for index, raw in enumerate(self._raw):
            text = text.replace(f'"@raw{index}@"', raw)
        if self.random.random() < 0.03 and text.startswith('{"'):
            text = f'{{"{self.random.choice(list(data))}": {self.random.choice(NUMBERS)}, {text[1:]}'
        return text

    def change(self, data: Any) -> None:
        """One change somewhere in nested objects and lists."""
        places = [data]
        for place in places:
            children = place.values() if isinstance(place, dict) else place
            places += [child for child in children if isinstance(child, dict | list) and child]
        place = self.random.choice(places)
        key = self.random.choice(list(place)) if isinstance(place, dict) else self.random.randrange(len(place))
        kind, old = self.random.random(), place[key]
        if kind < 0.1:
            del place[key]
        elif kind < 0.2 and isinstance(place, dict):
            place[self.random.choice((ESCAPE, key + " ", key.upper(), "模型", "type", "x" * 10_000))] = place.pop(key)
        elif kind < 0.5 and type(old) in (int, float):
            factor = 10.0 ** self.random.uniform(-12, 12)
            place[key] = old + self.random.choice((-1, 1)) if kind < 0.3 else type(old)(old * factor)
        else:
            place[key] = self.value()

    def bytes(self, data: bytes) -> bytes:
        """Now and then the file is damaged as a whole."""
        kind, at = self.random.random(), self.random.randrange(len(data) + 1)
        if kind < 0.02:
            return data[:at]
        if kind < 0.04:
            return data[:at] + self.random.randbytes(self.random.randrange(1, 9)) + data[at + 1 :]
        if kind < 0.05:
            start = (b"", b"\xef\xbb\xbf" + data, POINTER.encode(), b"\0" * 100, data.decode("latin1").encode("utf-16"))
            return self.random.choice(start)
        return data


def config_case(folder: Path, seed: str, compiles: bool) -> str:
    """config.json and generation_config.json through everything that reads them, beside a checkpoint that is right."""
    from glm4export.inspection.facts import inspect_model, model_text
    from glm4export.sources.checkpoint import Checkpoint, Location
    from glm4export.sources.config import read_config, read_token_ids

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
    from glm4export.sources.config import sequence_limit
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
    from glm4export.sources.config import read_config
    from glm4export.weights.recipes import whole

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

    from glm4export.sources.config import parse_config
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


def attack(family: str, folder: Path, seed: str, compiles: bool = False) -> tuple[str, str]:
    """Run one case: its outcome, and what to say of it."""
    from glm4export.terminal.errors import message_text
    from glm4runtime.contract import UserError

    try:
        return CASES[family](folder, seed, compiles), ""
    except UserError as error:
        text = message_text(str(error))
        lines = text.split("\n")
        if len(lines) > MOST_LINES or any(line and not line.isprintable() for line in lines) or "\n  forged" in text:
            return "message", text[:300]
        return "refused", text[:300]
    except BaseException as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        return "traceback", f"{type(error).__name__} at {at.filename}:{at.lineno}: {str(error)[:200]}"


def work(connection: Connection) -> None:
    """The worker: warmed up, then case after case."""
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)

        connection.send("ready")
        while (case := connection.recv()) is not None:
            outcome, detail = attack(case[0], folder, case[1], case[2])
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            connection.send((outcome, detail, peak))


class Worker:
    """A process that runs cases until one ends it."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=work, args=(other,), daemon=True)
        self.process.start()
        other.close()
        self.connection.recv()

    def run(self, family: str, seed: str, compiles: bool) -> tuple[str, str, int]:
        """Outcome, detail and peak memory in MB; the worker is gone after ``hang``, ``death`` and ``memory``."""
        self.connection.send((family, seed, compiles))
        if not self.connection.poll(MOST_SECONDS):
            self.end()
            return "hang", f"more than {MOST_SECONDS} s", 0
        try:
            outcome, detail, peak = self.connection.recv()
        except EOFError:
            self.end()
            return "death", f"exit status {self.process.exitcode}", 0
        if peak > MOST_MEGABYTES:
            self.end()
            return "memory", f"{peak} MB, {outcome}", peak
        return outcome, detail, peak

    def stop(self) -> None:
        """Let it end by itself."""
        self.connection.send(None)
        self.process.join()

    def end(self) -> None:
        """End it, whatever it's doing."""
        self.process.kill()
        self.process.join()


def run_family(family: str, count: int, seed: int) -> Counter[str]:
    """All cases of a family; prints what it found."""
    counts: Counter[str] = Counter()
    worker, compiled = Worker(), 0
    for number in range(count):
        case = f"{seed}/{family}/{number}"
        outcome, detail, peak = worker.run(family, case, False)
        counts["peak MB"] = max(counts["peak MB"], peak)
        if family == "configs" and outcome == "accepted" and compiled < GRAPHS:
            compiled += 1
            outcome, detail, _ = worker.run(family, case, True)
        counts[outcome] += 1
        if outcome not in ("accepted", "refused"):
            print(f"{family}/{number}: {outcome}: {detail}", file=sys.stderr, flush=True)
        if not worker.process.is_alive():
            worker = Worker()
    worker.stop()
    counts["compiled"] = compiled
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="example: python tools/attack_inputs.py --configs 500 --files 200 --manifests 500 --seed 7",
    )
    for family, count in zip(FAMILIES, (5000, 2000, 5000), strict=True):
        parser.add_argument(f"--{family}", type=int, default=count, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--case", metavar="FAMILY/NUMBER", help="run this one alone, here, and show what comes of it")
    arguments = parser.parse_args()
    if arguments.case:
        with tempfile.TemporaryDirectory() as name:
            prepare(Path(name))
            family = arguments.case.split("/")[0]
            print(CASES[family](Path(name), f"{arguments.seed}/{arguments.case}", False))
        return 0
    found = 0
    print(f"{'':<10}{'cases':>7}" + "".join(f"{outcome:>11}" for outcome in OUTCOMES) + f"{'peak MB':>9}{'s':>7}")
    for family in FAMILIES:
        start, count = time.monotonic(), getattr(arguments, family)
        counts = run_family(family, count, arguments.seed) if count else Counter()
        found += sum(counts[outcome] for outcome in OUTCOMES[2:])
        cells = "".join(f"{counts[outcome]:>11}" for outcome in OUTCOMES)
        print(f"{family:<10}{count:>7}{cells}{counts['peak MB']:>9}{time.monotonic() - start:>7.0f}", flush=True)
        if counts["compiled"]:
            print(f"{'':<10}graphs of {counts['compiled']} accepted configs compiled")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
