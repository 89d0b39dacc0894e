"""The bundle contract: what a compiled GLM-4 folder holds and what its graphs take and give.

The compiler writes it, the runtime reads it, and both import it from here. Standard library only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.bin"
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)  # what a session reads beside its graphs
PREFILL = "prefill"
DECODE = "decode"
STEP = "step"  # TensorRT's graph: one for both phases, since an engine made of two would hold the weights twice

INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"  # int64 [batch, total_seq]; in a step graph bool [batch, 1, seq, max_seq]
POSITION_IDS = "position_ids"  # step graphs: int64 [batch, seq]
WRITE_INDICES = "write_indices"  # step graphs: int64 [batch], the cache row that a sequence's first new token takes
LOGIT_ROWS = "logit_rows"  # step graphs: int64 [batch, rows], which of the new tokens' logits are wanted
LOGITS = "logits"

TENSORRT = "tensorrt"
TARGETS = ("cpu", "cuda", TENSORRT)

#: The sizes in a manifest's ``config``, which has more.
GEOMETRY = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim",
)  # fmt: skip
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}

_WITH_TEMPLATE = ("chat_template.jinja", "tokenizer_config.json")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
SHA256, SHA256_WORDS = "[0-9a-f]{64}", "64 hexadecimal digits"
_HASH_BLOCK = 1 << 22  # bytes read at a time while hashing


class UserError(Exception):
    """A mistake the user can mend: shown as one message, without a traceback, with exit status 2."""


class BundleError(UserError):
    """A bundle that is missing, damaged, or not of a format that this version reads."""


def graph_names(target: str) -> tuple[str, ...]:
    """The graphs that a bundle for ``target`` holds."""
    return (STEP,) if target == TENSORRT else (PREFILL, DECODE)


def past_name(layer: int, part: str) -> str:
    """Graph input of one layer's cache; ``part`` is ``key`` or ``value``."""
    return f"past_key_values.{layer}.{part}"


def present_name(layer: int, part: str) -> str:
    """Graph output that is bound to the same buffer as :func:`past_name`."""
    return f"present.{layer}.{part}"


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
    """Token ids that generation needs; ``eos`` is generation_config's whole list."""

    eos: tuple[int, ...]
    pad: int | None
    bos: int | None


@dataclass(frozen=True)
class FileSpec:
    """Size in bytes and sha256 (hex) of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: everything a runtime needs to know before it opens a graph."""

    producer: str
    producer_version: str
    family: str
    task: str
    target: str
    precision: str
    vocab_size: int
    config: Mapping[str, Any]  # the model's geometry, as the compiler read it
    source: Mapping[str, Any]  # where the checkpoint came from: its fingerprint, and hub id and commit if it had one
    tokens: TokenIds
    cache: CacheSpec
    graphs: Mapping[str, GraphSpec]
    files: Mapping[str, FileSpec]
    format_version: int = FORMAT_VERSION

    @property
    def step_sha256(self) -> str:
        """The sha256 of a TensorRT bundle's graph."""
        return self.files[self.graphs[STEP].file].sha256

    def to_json(self) -> str:
        """The file's text; the same manifest always gives the same bytes."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> Manifest:
        """Parse and check the text of a manifest; ``where`` names it in errors. Raises BundleError."""
        read = read_json(text, where)
        version = read("format_version", int)
        if version != FORMAT_VERSION:
            remedy = "upgrade glm4export" if version > FORMAT_VERSION else "build the bundle again"
            raise BundleError(f"{where}: bundle format {version}, this version reads format {FORMAT_VERSION}; {remedy}")
        cache, tokens = read.child("cache"), read.child("tokens")
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
            cache=CacheSpec(
                dtype=cache.one_of("dtype", DTYPE_BYTES),
                **{name: cache.positive(name) for name in ("layers", "kv_heads", "head_dim", "max_seq_len")},
            ),
            graphs={name: _graph(graphs.child(name)) for name in graphs.data},
            files={name: _file(name, files.child(name)) for name in files.data},
        )
        for name in graph_names(manifest.target):
            if name not in manifest.graphs:
                raise BundleError(f"{where}: no {name} graph; build the bundle again")
        for what, file in (
            *((f"{name} graph", spec.file) for name, spec in manifest.graphs.items()),
            ("weights", WEIGHTS),
        ):
            if file not in manifest.files:
                raise BundleError(f"{where}: {what} file {shown(file)} is not among its files; build the bundle again")
        return manifest


_TEXT_FIELDS = ("producer", "producer_version", "family", "task", "precision")


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
        for name in (WEIGHTS, *SIDE_FILES):
            if name not in manifest.files and (folder / name).exists():
                raise BundleError(
                    f"{folder / name}: the manifest doesn't list it; remove it, or build the bundle again"
                )
    return manifest


def check_file(folder: Path, name: str, spec: FileSpec, *, check_hashes: bool, by: str = "the manifest") -> None:
    """Raise BundleError unless a bundle's file is there, inside the bundle, and as ``spec`` says.

    by: what says so. Its sha256 is only compared with ``check_hashes``, which reads the whole file.
    """
    file = folder / name
    try:
        # Hub caches have links for files, into one store: where manifest.json leads, the others may.
        homes = folder.resolve(), (folder / MANIFEST).resolve().parent
        if not file.is_file():
            raise BundleError(f"{file}: missing; {by} lists it. Build the bundle again or copy it whole")
        real, size = file.resolve(), file.stat().st_size
        if not any(real.is_relative_to(home) for home in homes):
            raise BundleError(f"{file}: a link to {real}, which is outside of the bundle; copy that file into it")
        if size != spec.size:
            with file.open("rb") as opened:
                refuse_pointer(opened.read(len(_LFS_POINTER)), str(file))
            raise BundleError(
                f"{file}: {size} bytes, {by} says {spec.size}; copy or build the bundle again{_hint(name)}"
            )
        if check_hashes and (found := sha256_of(file)) != spec.sha256:
            raise BundleError(f"{file}: sha256 {found}, {by} says {spec.sha256}; the file was changed{_hint(name)}")
    except OSError as error:
        raise BundleError(f"{file}: cannot be read ({error.strerror})") from None


def refuse_pointer(start: bytes, name: str) -> None:
    """Raise BundleError where ``start``, of a file called ``name``, is what git has in the place of a large file."""
    if start.startswith(_LFS_POINTER):
        raise BundleError(
            f"{name}: a git-lfs pointer, not the file; run `git lfs pull` in the folder that was cloned, and if that "
            "was the checkpoint's, build the bundle again"
        )


def _hint(name: str) -> str:
    """What else to do about a file that isn't as it was built: a template is often changed on purpose."""
    if name not in _WITH_TEMPLATE:
        return ""
    return (
        ". To chat with another template, leave it as it was: load(..., chat_template=...), or generate --chat-template"
    )


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_json(text: str, where: str) -> FieldReader:
    """The object that a JSON text holds; ``where`` names it in errors. Raises BundleError."""
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not valid JSON ({error}); build the bundle again") from None
    return FieldReader(data, where)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxlong = 24
_BITS = 4096  # of a number that Python still writes out: its limit is 4300 digits, and the user may lower it


def shown(value: object) -> str:
    """A value of somebody's file as errors show it: its repr, cut where it's long or nested deep."""
    if isinstance(value, int) and value.bit_length() > _BITS:
        return f"an integer of {value.bit_length()} bits"
    return _REPR.repr(value)


class FieldReader:
    """Typed access to a JSON object that names the key in its errors."""

    def __init__(self, data: Any, where: str, remedy: str = "build the bundle again") -> None:
        self.where, self.remedy = where, remedy
        if not isinstance(data, dict):
            raise self.error(f"expected an object, found {type(data).__name__}")
        self.data: dict[str, Any] = data

    def error(self, message: str) -> BundleError:
        """An error about this object, with the remedy."""
        return BundleError(f"{self.where}: {message}; {self.remedy}")

    def __call__(self, key: str, kind: type) -> Any:
        if key not in self.data:
            raise self.error(f"key {key!r} is missing")
        value = self.data[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"{_name(key)} is {shown(value)}, expected {kind.__name__}")
        return value

    def positive(self, key: str, least: int = 1) -> int:
        """An integer from ``least`` to 2**63 - 1."""
        value: int = self(key, int)
        if value < least:
            raise self.error(f"{_name(key)} is {shown(value)}, expected at least {least}")
        if value >= 1 << 63:
            raise self.error(f"{_name(key)} is {shown(value)}, expected less than 2**63")
        return value

    def text(self, key: str) -> str:
        """A text that may be printed."""
        value: str = self(key, str)
        if not value.isprintable():
            raise self.error(f"{_name(key)} is {shown(value)}, expected characters that can be printed")
        return value

    def matching(self, key: str, pattern: str, expected: str) -> str:
        """A text that the whole of ``pattern`` matches, which is ``expected`` in words."""
        value: str = self(key, str)
        if not re.fullmatch(pattern, value):
            raise self.error(f"{_name(key)} is {shown(value)}, expected {expected}")
        return value

    def one_of(self, key: str, known: Collection[str]) -> str:
        """A text that is one of ``known``."""
        value: str = self(key, str)
        if value not in known:
            raise self.error(f"{_name(key)} {shown(value)} is not one of {', '.join(known)}")
        return value

    def items(self, key: str, *kinds: type) -> tuple[Any, ...]:
        values = self(key, list)
        for value in values:
            if type(value) not in kinds:
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise self.error(f"{_name(key)} holds {shown(value)}, expected {expected}")
        return tuple(values)

    def optional(self, key: str, kind: type) -> Any:
        return None if self.data.get(key) is None else self(key, kind)

    def child(self, key: str) -> FieldReader:
        return FieldReader(self(key, dict), f"{self.where}: {_name(key)}", self.remedy)


def _name(key: str) -> str:
    """A key as errors name it: what a damaged file calls its keys doesn't reach a terminal as it is."""
    return key if key.isprintable() and len(key) <= 80 else shown(key)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two keys {shown(next(name for name in names if names.count(name) > 1))} in one object")
    return found


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
    if not name.isprintable() or PurePosixPath(name).as_posix() != name or name == MANIFEST or name == ".":
        raise BundleError(f"{read.where}: not the path of a file in a bundle; refusing it")
    return FileSpec(read.positive("size", 0), read.matching("sha256", SHA256, SHA256_WORDS))
