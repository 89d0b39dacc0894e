"""``manifest.json``: what a bundle holds, and what its graphs take and give."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from glm4runtime.contract.dtypes import DTYPE_BYTES
from glm4runtime.contract.encoder_spec import EncoderSpec, wrong_task
from glm4runtime.contract.errors import BundleError
from glm4runtime.contract.files import SHA256, SHA256_WORDS, FileSpec, check_file
from glm4runtime.contract.json_reader import FieldReader, read_json, shown
from glm4runtime.contract.lora_spec import LoraSpec
from glm4runtime.contract.names import (
    CAUSAL_LM,
    FORMAT_VERSION,
    GEOMETRY,
    MANIFEST,
    MODEL,
    STEP,
    TARGETS,
    TASKS,
    TEXT_FILES,
    WEIGHTS,
    GraphName,
    Target,
    TaskName,
    graph_names,
    stage_name,
)


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output. A dim is a number, or the name of a dynamic dim such as ``batch``."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph of the bundle, its inputs and outputs in graph order."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def output(self, name: str) -> TensorSpec:
        """The output called ``name``. Raises BundleError where there is none."""
        for spec in self.outputs:
            if spec.name == name:
                return spec
        raise BundleError(f"{self.file}: no output {name!r}; it has {', '.join(s.name for s in self.outputs)}")


@dataclass(frozen=True)
class CacheSpec:
    """The KV cache: for every layer a key and a value buffer of [batch, kv_heads, max_seq_len, head_dim]."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    max_seq_len: int

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token of one sequence takes in the cache, over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class TokenIds:
    """Token ids that generation needs; ``eos`` is generation_config's whole list, ``pad`` fills up a batch's texts."""

    eos: tuple[int, ...]
    pad: int | None
    bos: int | None


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: everything a runtime needs to know before it opens a graph."""

    producer: str
    producer_version: str
    family: str
    task: TaskName
    target: Target
    precision: str
    vocab_size: int
    config: Mapping[str, Any]  # the model's geometry, as the compiler read it
    source: Mapping[str, Any]  # where the checkpoint came from: its fingerprint, and hub id and commit if it had one
    tokens: TokenIds
    kv_cache: CacheSpec | None  # ``cache`` in the file; None for a bundle without one, which has an encoder
    graphs: Mapping[str, GraphSpec]
    files: Mapping[str, FileSpec]
    encoder: EncoderSpec | None = None
    lora: LoraSpec | None = None  # of a bundle built with --lora-slots
    stages: tuple[int, ...] | None = None  # layers of each, of a bundle built with --stages
    format_version: int = FORMAT_VERSION

    @property
    def cache(self) -> CacheSpec:
        """The KV cache of a causal language model. Raises UserError for a bundle without one."""
        if self.kv_cache is None:
            raise wrong_task(MANIFEST, self.task)
        return self.kv_cache

    @property
    def max_seq_len(self) -> int:
        """Tokens that one sequence may have."""
        return self.cache.max_seq_len if self.encoder is None else self.encoder.max_seq_len

    @property
    def engine_graph(self) -> GraphSpec:
        """The one graph of a TensorRT bundle, which engines are made of."""
        return self.graphs[STEP if self.encoder is None else MODEL]

    @property
    def engine_graph_sha256(self) -> str:
        """Its sha256."""
        return self.files[self.engine_graph.file].sha256

    def parts(self, graph: GraphName) -> dict[str, range]:
        """The graphs that compute ``graph``, one after another, and the layers of each: itself alone, or its stages."""
        layers = 0 if self.kv_cache is None else self.kv_cache.layers
        if self.stages is None:
            return {graph: range(layers)}
        ends = list(accumulate(self.stages, initial=0))
        return {stage_name(graph, index): range(*ends[index : index + 2]) for index in range(len(self.stages))}

    def first(self, graph: GraphName) -> GraphSpec:
        """The one that takes the tokens."""
        return self.graphs[next(iter(self.parts(graph)))]

    def to_json(self) -> str:
        """The file's text; the same manifest always gives the same bytes."""
        data = dataclasses.asdict(self)
        data["cache"] = data.pop("kv_cache")
        kept = {name: value for name, value in data.items() if value is not None}
        return json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Parse and check the text of a manifest; ``where`` names it in errors. Raises BundleError."""
        read = read_json(text, where)
        version = read("format_version", int)
        if version != FORMAT_VERSION:
            remedy = "upgrade glm4export" if version > FORMAT_VERSION else "build the bundle again"
            raise BundleError(
                f"{where}: bundle format {shown(version)}, this version reads format {FORMAT_VERSION}; {remedy}"
            )
        tokens, task = read.child("tokens"), read.one_of("task", TASKS)
        causal = task == CAUSAL_LM
        graphs, files = read.child("graphs"), read.child("files")
        config, source = read.child("config"), read.child("source")
        for name in GEOMETRY:
            config.positive(name)
        texts: dict[str, Any] = {name: read.text(name) for name in _TEXT_FIELDS}
        manifest = cls(
            **texts,
            target=read.one_of("target", TARGETS),
            vocab_size=read.positive("vocab_size"),
            config=config.data,
            source={name: source.text(name) for name in source.data},
            tokens=TokenIds(
                eos=tokens.items("eos", int), pad=tokens.optional("pad", int), bos=tokens.optional("bos", int)
            ),
            task=task,
            kv_cache=_cache(read.child("cache")) if causal else None,
            lora=LoraSpec.read(read.child("lora")) if "lora" in read.data else None,
            encoder=None if causal else EncoderSpec.read(read.child("encoder"), task),
            stages=read.items("stages", int) if "stages" in read.data else None,
            graphs={name: _graph(graphs.child(name)) for name in graphs.data},
            files={name: _file(name, files.child(name)) for name in files.data},
        )
        pad = manifest.tokens.pad
        if manifest.encoder is not None and pad is not None and not 0 <= pad < manifest.vocab_size:
            raise tokens.error(f"pad is {shown(pad)}, expected a token id in 0..{manifest.vocab_size - 1}")
        if manifest.stages is not None:
            _require_stages(read, manifest)
        for name in (part for graph in graph_names(manifest.target, task) for part in manifest.parts(graph)):
            if name not in manifest.graphs:
                raise BundleError(f"{where}: no {name} graph; build the bundle again")
        for what, file in (
            *((f"{name} graph", spec.file) for name, spec in manifest.graphs.items()),
            ("weights", WEIGHTS),
        ):
            if file not in manifest.files:
                raise BundleError(f"{where}: {what} file {shown(file)} is not among its files; build the bundle again")
        return manifest


def _require_stages(read: FieldReader, manifest: Manifest) -> None:
    stages, layers = manifest.stages or (), 0 if manifest.kv_cache is None else manifest.kv_cache.layers
    if not stages or min(stages) < 1 or sum(stages) != layers:
        raise read.error(f"stages is {shown(list(stages))}, expected the layers of each, {layers} in all")


_LONGEST_NAME = 255  # bytes that Linux's file systems take
_TEXT_FIELDS = ("producer", "producer_version", "family", "precision")


def read_manifest(folder: Path, *, check_hashes: bool = False) -> Manifest:
    """Read a bundle's manifest and check its files.

    Every file must be there with the size the manifest states; with ``check_hashes`` its sha256 too, which reads the
    whole bundle. Raises BundleError naming the file, what was expected and what was found.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        problem = f"not a bundle (no {MANIFEST})" if folder.is_dir() else "no such folder"
        raise BundleError(f"{folder}: {problem}; `glm4export build` makes one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{path}: cannot be read ({error})") from None
    manifest = Manifest.from_json(text, str(path))
    for name, spec in manifest.files.items():
        check_file(folder, name, spec, check_hashes=check_hashes)
    if check_hashes:
        for name in (WEIGHTS, *TEXT_FILES):
            if name not in manifest.files and (folder / name).exists():
                raise BundleError(
                    f"{folder / name}: the manifest doesn't list it; remove it, or build the bundle again"
                )
    return manifest


def _cache(read: FieldReader) -> CacheSpec:
    sizes = {name: read.positive(name) for name in ("layers", "kv_heads", "head_dim", "max_seq_len")}
    return CacheSpec(dtype=read.one_of("dtype", DTYPE_BYTES), **sizes)


def _tensors(values: list[Any], where: str) -> tuple[TensorSpec, ...]:
    readers = [FieldReader(value, where) for value in values]
    specs = tuple(TensorSpec(read.text("name"), read.one_of("dtype", DTYPE_BYTES), _dims(read)) for read in readers)
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise BundleError(f"{where}: two of one name; build the bundle again")
    return specs


def _dims(read: FieldReader) -> tuple[int | str, ...]:
    dims: tuple[int | str, ...] = read.items("dims", int, str)
    for dim in dims:
        if not (dim if isinstance(dim, str) else 0 < dim < 1 << 63):
            raise read.error(f"dims holds {shown(dim)}, expected a name or a number above 0")
    return dims


def _graph(read: FieldReader) -> GraphSpec:
    inputs, outputs = (_tensors(read(key, list), f"{read.where}: {key}") for key in ("inputs", "outputs"))
    return GraphSpec(read("file", str), inputs, outputs)


def _file(name: str, read: FieldReader) -> FileSpec:
    if PurePosixPath(name).is_absolute() or ".." in name.split("/") or "\\" in name:
        raise BundleError(f"{read.where}: the path leaves the bundle's folder; refusing it")
    too_long = any(len(part.encode(errors="replace")) > _LONGEST_NAME for part in PurePosixPath(name).parts)
    if too_long or not name.isprintable() or PurePosixPath(name).as_posix() != name or name in (MANIFEST, "."):
        raise BundleError(f"{read.where}: not the path of a file in a bundle; refusing it")
    return FileSpec(read.positive("size", 0), read.matching("sha256", SHA256, SHA256_WORDS))
