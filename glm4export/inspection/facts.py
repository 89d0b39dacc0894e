"""What a bundle holds, without running it; what a model will take, before building it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx

from glm4export.inspection.estimate import estimate
from glm4export.machine import huge_pages
from glm4export.sources.checkpoint import CONFIG, CheckpointError, Location
from glm4export.sources.config_json import config_data, parse_config
from glm4export.sources.quantized.checkpoint import open_checkpoint, read_quantization
from glm4export.sources.task import read_task
from glm4export.sources.tied import as_stored
from glm4export.tensorrt.network import FUSED
from glm4runtime.backends.graph_check import require_graphs
from glm4runtime.backends.memory import memory_bytes
from glm4runtime.contract import CAUSAL_LM, TOKEN_CLASSIFICATION, BundleError, CacheSpec, Target, read_manifest
from glm4runtime.contract.engine_spec import EngineSpec, read_engine_specs

_NAMED = 5  # labels that are named


def inspect_bundle(folder: Path, *, check_hashes: bool = False) -> dict[str, Any]:
    """A bundle's facts as JSON-ready values. Raises BundleError where the bundle isn't whole."""
    manifest = read_manifest(folder, check_hashes=check_hashes)
    require_graphs(folder, manifest)
    cache, encoder, lora = manifest.kv_cache, manifest.encoder, manifest.lora
    return {
        "bundle": str(folder),
        "format_version": manifest.format_version,
        "producer": f"{manifest.producer} {manifest.producer_version}",
        "family": manifest.family,
        "task": manifest.task,
        "target": manifest.target,
        "precision": manifest.precision,
        "source": dict(manifest.source),
        "config": dict(manifest.config),
        "eos_token_ids": list(manifest.tokens.eos),
        **({} if cache is None else {"cache": _cache(cache)}),
        **({} if encoder is None else {"encoder": dataclasses.asdict(encoder)}),
        **({} if lora is None else {"lora": {"slots": lora.slots, "rank": lora.rank}}),
        **({} if manifest.stages is None else {"stages": list(manifest.stages)}),
        "engines": [_engine(spec, manifest.config["num_hidden_layers"]) for spec in read_engine_specs(folder)],
        "graphs": {name: _graph(folder / spec.file) for name, spec in manifest.graphs.items()},
        "huge_pages": huge_pages(),
        "files": {name: {"size": spec.size, "sha256": spec.sha256} for name, spec in manifest.files.items()},
    }


def text(facts: dict[str, Any]) -> str:
    """The same for a terminal."""
    config = facts["config"]
    heads = f"{config['num_attention_heads']} heads, {config['num_key_value_heads']} kv heads of {config['head_dim']}"
    lines = [
        f"{facts['bundle']}: {facts['family']} {facts['task']}, {facts['precision']}, for {facts['target']}",
        f"  made by    {facts['producer']}, bundle format {facts['format_version']}",
        f"  model      {config['num_hidden_layers']} layers, hidden {config['hidden_size']}, {heads}, "
        f"vocabulary {config['vocab_size']}",
    ]
    if cache := facts.get("cache"):
        sizes = [_bytes(cache[key]) for key in ("bytes_per_token", "bytes_at_full_length")]
        lines += [
            f"  cache      {cache['dtype']}, {sizes[0]} a token, {sizes[1]} at {cache['max_seq_len']} tokens",
            f"  stops on   {', '.join(map(str, facts['eos_token_ids']))}",
        ]
    if lora := facts.get("lora"):
        lines.append(f"  adapters   up to {lora['slots']} at once, of rank {lora['rank']} at most")
    if stages := facts.get("stages"):
        lines.append(f"  stages     {len(stages)}, of {', '.join(map(str, stages))} layers")
    if encoder := facts.get("encoder"):
        lines.append(
            f"  gives      {_encoder_words(facts['task'], encoder)}; texts of up to {encoder['max_seq_len']} tokens"
        )
    for name, graph in facts["graphs"].items():
        nodes = ", ".join(f"{count} {kind}" for kind, count in graph["nodes"].items())
        lines.append(f"  {name:<10} {_bytes(graph['weight_bytes'])} of weights; {nodes}")
    lines.append(f"  memory     {_PAGES.get(facts['huge_pages'], 'no huge pages on this machine')}")
    for engine in facts["engines"]:
        lines += _engine_lines(engine)
    lines += [f"  {_bytes(spec['size']):>10}  {name}" for name, spec in facts["files"].items()]
    return "\n".join(lines)


_PAGES = {
    "always": "in huge pages on this machine",
    "madvise": "in huge pages on this machine where asked for: commands do, programs with load(huge_pages=True)",
}


def _cache(cache: CacheSpec) -> dict[str, Any]:
    return {
        "dtype": cache.dtype,
        "max_seq_len": cache.max_seq_len,
        "bytes_per_token": cache.bytes_per_token,
        "bytes_at_full_length": cache.bytes_per_token * cache.max_seq_len,
    }


def _encoder_words(task: str, encoder: dict[str, Any]) -> str:
    if labels := encoder["labels"]:
        named = ", ".join(labels[:_NAMED]) + (", …" if len(labels) > _NAMED else "")
        each = "every token" if task == TOKEN_CLASSIFICATION else "a text"
        problem = f", {encoder['problem_type']}" if encoder["problem_type"] else ""
        return f"{len(labels)} labels of {each} ({named}{problem})"
    if encoder["pooling"] is None:
        return "every token's hidden state"
    length = ", of length 1" if encoder["normalize"] else ""
    return f"a text's embedding by {encoder['pooling']} pooling{length}"


def inspect_model(location: Location, target: Target) -> dict[str, Any]:
    """A checkpoint's facts as JSON-ready values, from its config; see :mod:`glm4export.inspection.estimate`."""
    total, _ = memory_bytes()
    path = location.folder / CONFIG
    data = config_data(path)
    config = parse_config(data, str(path))
    encoding = read_task(data, str(path)).encoding
    read_quantization(location.folder)  # refuses what a build would
    if config.tie_word_embeddings and encoding is None:
        with suppress(CheckpointError):  # its weights aren't here: it is what its config says
            config = as_stored(config, open_checkpoint(location.folder))
    return estimate(config, target, total, encoding)


def model_text(name: str, facts: dict[str, Any]) -> str:
    """The same for a terminal."""
    memory, positions = facts["memory_bytes"], facts["max_positions"]
    lines = [
        f"{name}: {facts['parameters'] / 1e9:.2f} billion parameters, up to {positions} positions",
        f"for {facts['target']} and {facts['task']}, on this machine with {_bytes(memory)} of memory:",
    ]
    if facts["task"] != CAUSAL_LM:
        lines.append(f"  {'precision':<10}{'weights':>10}{'fits here':>12}")
        for precision, row in facts["precisions"].items():
            lines.append(f"  {precision:<10}{_bytes(row['weight_bytes']):>10}{'yes' if row['fits_here'] else 'no':>12}")
        return "\n".join(lines)
    lines.append(f"  {'precision':<10}{'weights':>10}{'cache a token':>15}{'at full length':>16}{'fits here':>22}")
    for precision, row in facts["precisions"].items():
        fits = _fits(row, positions)
        sizes = [_bytes(row[key]) for key in ("weight_bytes", "cache_bytes_per_token", "cache_bytes_at_full_length")]
        lines.append(f"  {precision:<10}{sizes[0]:>10}{sizes[1]:>15}{sizes[2]:>16}{fits:>22}")
    small = {precision: row["int8_cache"] for precision, row in facts["precisions"].items() if row["int8_cache"]}
    if not small:
        return "\n".join(lines)
    size = next(iter(small.values()))
    fit = ", ".join(f"{precision} {_fits(row, positions)}" for precision, row in small.items())
    lines.append(
        f"with --kv-cache int8: {_bytes(size['cache_bytes_per_token'])} a token, "
        f"{_bytes(size['cache_bytes_at_full_length'])} at full length; fits here: {fit}"
    )
    return "\n".join(lines)


def _fits(row: dict[str, Any], positions: int) -> str:
    longest = row["longest_sequence_here"]
    return "no" if not longest else "yes" if longest == positions else f"up to {longest} tokens"


def _graph(path: Path) -> dict[str, Any]:
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's own classes
        raise BundleError(f"{path}: not a readable ONNX graph ({error}); build the bundle again") from None
    counts = Counter(node.op_type for node in graph.node)
    lengths = (
        int(entry.value) for tensor in graph.initializer for entry in tensor.external_data if entry.key == "length"
    )
    return {"nodes": dict(counts.most_common()), "weight_bytes": sum(lengths)}


def _engine(spec: EngineSpec, layers: int) -> dict[str, Any]:
    """An engine's facts from its sidecar; ``fused`` has how many of the model's layers TensorRT recognised, and all."""
    fused = {kind.lower(): [spec.layers.get(kind, 0), each * layers] for kind, each in FUSED[spec.attention].items()}
    return {"file": spec.file, **dataclasses.asdict(spec), "fused": fused}


def _engine_lines(engine: dict[str, Any]) -> list[str]:
    sizes = [
        f"{_bytes(engine[key])} {what}"
        for key, what in (("weight_bytes", "of weights"), ("scratch_bytes", "of scratch memory"))
        if engine[key] is not None
    ]
    device = f", on the device {' and '.join(sizes)}" if sizes else ""
    lines = [
        f"  {engine['file']}",
        f"    {engine['flavour']} {engine['version']} for compute capability {engine['compute_capability']}, "
        f"{engine['attention']} attention, {_bytes(engine['size'])}{device}",
        "    fused      "
        + ", ".join(f"{kind.replace('_', ' ')} {found} of {of}" for kind, (found, of) in engine["fused"].items()),
        "    layers     "
        + ", ".join(f"{count} {kind}" for kind, count in sorted(engine["layers"].items(), key=lambda item: -item[1])),
    ]
    for profile in engine["profiles"]:
        dims = ", ".join(f"{dim} {low} to {high} (best {best})" for dim, (low, best, high) in _ranges(profile))
        lines.append(f"    profile    {profile['name']}: {dims}")
    return lines


def _ranges(profile: dict[str, Any]) -> list[tuple[str, tuple[int, int, int]]]:
    return [(dim, profile[dim]) for dim in ("batch", "seq", "rows")]


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
