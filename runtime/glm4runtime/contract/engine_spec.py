"""The sidecar of a TensorRT engine: its builder, its device, and the files it was built from. Standard library only.

An engine runs on the TensorRT flavour and version that built it, on the compute capability it was built for, with the
bundle whose weights it holds. All of that is told before it is loaded, in words.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from glm4runtime.contract import (
    SHA256,
    SHA256_WORDS,
    WEIGHTS,
    BundleError,
    FieldReader,
    Manifest,
    read_json,
    shown,
)

FOLDER = "engines"
FORMAT_VERSION = 1
FLAVOURS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}  # by the Python module that is the flavour's API

STANDARD, PLUGIN = "standard", "plugin"  # attention in standard operators, or as the compiler's own plugins
FULL = "full"  # in standard operators over whole texts, without a cache
_REMEDY = "build the engine again"
PLUGINS_OF_LAYER = 3  # append to the cache, attend, combine

Range = tuple[int, int, int]  # least, best and most, as TensorRT's optimization profiles have it


@dataclass(frozen=True)
class Profile:
    """One optimization profile: the sizes of the step graph's dynamic dims that it serves."""

    name: str
    batch: Range
    seq: Range
    rows: Range  # of logits


@dataclass(frozen=True)
class EngineSpec:
    """``engines/{flavour}-sm{capability}.json``, beside the ``.engine`` of the same name."""

    flavour: str
    version: str  # of the TensorRT flavour
    compute_capability: str  # such as "8.9"
    precision: str
    attention: str  # STANDARD or PLUGIN
    version_compatible: bool
    profiles: tuple[Profile, ...]
    graph_sha256: str  # of the graph that the engine was parsed from
    weights_sha256: str  # of weights.bin
    size: int
    sha256: str
    layers: Mapping[str, int] = field(default_factory=dict)  # of the parsed network, by TensorRT's LayerType
    weight_bytes: int | None = None  # on the device, as TensorRT states it; None where it doesn't
    scratch_bytes: int | None = None  # activations of one execution context, likewise
    weight_streaming: bool = False  # built so that weights may stay in host memory

    @property
    def attentions(self) -> int:
        """Attentions that TensorRT recognised as such; the decoder layers of the model, where all were."""
        if self.attention == PLUGIN:
            return self.layers.get("PLUGIN_V3", 0) // PLUGINS_OF_LAYER
        return self.layers.get("ATTENTION_OUTPUT", 0)

    @property
    def file(self) -> str:
        """The engine's path in the bundle."""
        return f"{engine_stem(self.flavour, self.compute_capability)}.engine"

    def to_json(self) -> str:
        """The sidecar's text."""
        data = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        return json.dumps(data, indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str) -> EngineSpec:
        """Parse and check the text of a sidecar; ``where`` names it in errors. Raises BundleError."""
        read = read_json(text, where, _REMEDY)
        if (version := read("format_version", int)) != FORMAT_VERSION:
            raise BundleError(
                f"{where}: sidecar format {shown(version)}, this version reads {FORMAT_VERSION}; {_REMEDY}"
            )
        profiles = [FieldReader(profile, f"{where}: profiles", _REMEDY) for profile in read("profiles", list)]
        layers = read.child("layers") if "layers" in read.data else FieldReader({}, where, _REMEDY)
        return cls(
            flavour=read.one_of("flavour", FLAVOURS),
            version=read.matching("version", r"\d+\.\d+[\w.+-]*", "a version such as 10.15.1"),
            compute_capability=read.matching("compute_capability", r"\d+\.\d", "numbers such as 8.9"),
            precision=read.text("precision"),
            attention=read.one_of("attention", (STANDARD, PLUGIN, FULL)),
            **{name: read.matching(name, SHA256, SHA256_WORDS) for name in _HASHES},
            version_compatible=read("version_compatible", bool),
            weight_streaming=read.optional("weight_streaming", bool) or False,
            size=read.positive("size"),
            layers={kind: layers.positive(kind, 0) for kind in layers.data},
            weight_bytes=read.optional("weight_bytes", int),
            scratch_bytes=read.optional("scratch_bytes", int),
            profiles=tuple(
                Profile(profile.text("name"), *(_range(profile, dim) for dim in ("batch", "seq", "rows")))
                for profile in profiles
            ),
        )

    def require(self, manifest: Manifest, *, flavour: str, version: str, compute_capability: str) -> None:
        """Raise BundleError, with the reason, unless the engine fits this bundle, this TensorRT and this device."""
        found: dict[str, tuple[str, str]] = {
            "the flavour of TensorRT": (self.flavour, flavour),
            "the compute capability": (self.compute_capability, compute_capability),
            "the bundle's graph by its sha256": (self.graph_sha256, manifest.engine_graph_sha256),
            f"the bundle's {WEIGHTS} by its sha256": (self.weights_sha256, manifest.files[WEIGHTS].sha256),
        }
        if not (self.version_compatible and _release(self.version) <= _release(version)):
            found["the version of TensorRT"] = (self.version, version)  # newer ones load a compatible engine
        for what, (built, here) in found.items():
            if built != here:
                raise BundleError(
                    f"{self.file}: {what} does not fit: the engine was built for {built}, here is {here}; "
                    "build the engine again with `glm4export build --target tensorrt`"
                )


def engine_stem(flavour: str, compute_capability: str) -> str:
    """``engines/tensorrt-rtx-sm89`` for flavour ``tensorrt-rtx`` and capability ``8.9``."""
    return f"{FOLDER}/{flavour}-sm{compute_capability.replace('.', '')}"


def read_engine_specs(bundle: Path) -> list[EngineSpec]:
    """The sidecars of every engine in a bundle, by file name. Raises BundleError where one is damaged."""
    specs = []
    for path in sorted((bundle / FOLDER).glob("*.json")):
        try:
            specs.append(EngineSpec.from_json(path.read_text(encoding="utf-8"), str(path)))
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(f"{path}: cannot be read ({error})") from None
    return specs


_HASHES = ("graph_sha256", "weights_sha256", "sha256")


def _release(version: str) -> tuple[int, int]:
    """Major and minor version, by which version-compatible engines are loaded or not."""
    major, minor = re.match(r"(\d+)\.(\d+)", version).groups()  # type: ignore[union-attr]
    return int(major), int(minor)


def _range(read: FieldReader, dim: str) -> Range:
    values = read.items(dim, int)
    if len(values) != 3 or not 1 <= values[0] <= values[1] <= values[2]:
        raise read.error(f"{dim} is {list(values)}, expected three rising numbers above 0")
    return values
