"""Engine sidecars: read back as written, and refused with the reason where they don't fit."""

from __future__ import annotations

import dataclasses
import json

import pytest

from glm4runtime.contract import BundleError, CacheSpec, FileSpec, GraphSpec, Manifest, TokenIds
from glm4runtime.contract.engine_spec import EngineSpec, Profile, read_engine_specs

SPEC = EngineSpec(
    flavour="tensorrt-rtx",
    version="1.7.1",
    compute_capability="8.9",
    precision="fp16",
    attention="standard",
    version_compatible=False,
    profiles=(Profile("step", (1, 1, 4), (1, 1, 512), (1, 1, 16)),),
    graph_sha256="a" * 64,
    weights_sha256="b" * 64,
    size=7,
    sha256="c" * 64,
    layers={"ATTENTION_OUTPUT": 4, "CAST": 2},
    weight_bytes=5,
    scratch_bytes=None,
)
MANIFEST = Manifest(
    producer="glm4export",
    producer_version="0",
    family="glm4",
    task="causal-lm",
    target="tensorrt",
    precision="fp16",
    vocab_size=8,
    config={},
    source={},
    tokens=TokenIds((1,), None, None),
    kv_cache=CacheSpec(1, 1, 16, "float16", 64),
    graphs={"step": GraphSpec("step.onnx", (), ())},
    files={"step.onnx": FileSpec(1, "a" * 64), "weights.bin": FileSpec(1, "b" * 64)},
)
HERE = {"flavour": "tensorrt-rtx", "version": "1.7.1", "compute_capability": "8.9"}


def test_a_sidecar_reads_back_as_written(tmp_path):
    assert EngineSpec.from_json(SPEC.to_json(), "x") == SPEC
    path = tmp_path / f"{SPEC.file.removesuffix('.engine')}.json"
    assert path.name == "tensorrt-rtx-sm89.json"
    path.parent.mkdir()
    path.write_text(SPEC.to_json())
    assert read_engine_specs(tmp_path) == [SPEC]
    assert read_engine_specs(tmp_path / "engines") == []


def test_a_sidecar_without_counts_and_sizes_reads():
    data = json.loads(SPEC.to_json())
    del data["layers"], data["weight_bytes"], data["scratch_bytes"], data["weight_streaming"]
    read = EngineSpec.from_json(json.dumps(data), "x")
    assert read == dataclasses.replace(SPEC, layers={}, weight_bytes=None)
    assert (SPEC.attentions, read.attentions) == (4, 0)


def test_an_engine_that_fits_is_taken():
    SPEC.require(MANIFEST, **HERE)
    for version in ("1.6.9", "1.7.9", "0.10.1"):  # the same minor version, or one before
        dataclasses.replace(SPEC, version=version, version_compatible=True).require(MANIFEST, **HERE)


@pytest.mark.parametrize("version", ["1.8.0", "1.10", "2.0"])
def test_an_older_runtime_takes_no_newer_engine(version):
    spec = dataclasses.replace(SPEC, version=version, version_compatible=True)
    with pytest.raises(
        BundleError, match=f"the version of TensorRT does not fit: the engine was built for {version}, "
    ):
        spec.require(MANIFEST, **HERE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"flavour": "tensorrt"}, "the flavour of TensorRT does not fit: .* built for tensorrt, here is tensorrt-rtx"),
        ({"compute_capability": "12.0"}, r"the compute capability does not fit: .* built for 12\.0, here is 8\.9"),
        ({"version": "1.6"}, r"the version of TensorRT does not fit: the engine was built for 1\.6, here is 1\.7\.1"),
        ({"graph_sha256": "d" * 64}, "the bundle's graph by its sha256 does not fit: .* built for dddd"),
        ({"weights_sha256": "d" * 64}, r"the bundle's weights\.bin by its sha256 does not fit"),
    ],
)  # fmt: skip
def test_a_mismatch_is_told_with_its_reason(change, message):
    with pytest.raises(BundleError, match=message):
        dataclasses.replace(SPEC, **change).require(MANIFEST, **HERE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "sidecar format 2, this version reads 1"),
        ({"size": 0}, "size is 0, expected at least 1"),
        ({"version": 3}, "version is 3, expected str"),
        ({"version": "new"}, r"version is 'new', expected a version such as 10\.15\.1"),
        ({"compute_capability": "../../x"}, r"compute_capability is '\.\./\.\./x', expected numbers such as 8\.9"),
        ({"flavour": "lite"}, "flavour 'lite' is not one of tensorrt, tensorrt-rtx"),
        ({"attention": "flash"}, "attention 'flash' is not one of standard, plugin"),
        ({"sha256": "c" * 63}, "sha256 is 'c{63}', expected 64 hexadecimal digits"),
        ({"precision": "\x1b[2J"}, r"precision is '\\x1b\[2J', expected characters that can be printed"),
        ({"weight_streaming": 1}, "weight_streaming is 1, expected bool"),
        ({"size": 2**63}, r"size is 9223372036854775808, expected less than 2\*\*63"),
        ({"layers": {"CAST": "many"}}, "layers: CAST is 'many', expected int"),
        ({"profiles": [{"name": "step", "batch": [2, 1, 4], "seq": [1, 1, 1], "rows": [1, 1, 1]}]},
         r"batch is \[2, 1, 4\], expected three rising numbers above 0"),
    ],
)  # fmt: skip
def test_a_damaged_sidecar_is_refused(change, message):
    with pytest.raises(BundleError, match=message):
        EngineSpec.from_json(json.dumps({**json.loads(SPEC.to_json()), **change}), "engines/x.json")
