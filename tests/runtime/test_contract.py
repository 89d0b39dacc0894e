"""The bundle contract: what is written is read back, and what is no whole bundle of this format is refused."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4runtime.contract import (
    DTYPES,
    FORMAT_VERSION,
    GEOMETRY,
    BundleError,
    CacheSpec,
    FileSpec,
    GraphSpec,
    Manifest,
    TensorSpec,
    TokenIds,
    nbytes,
    past_name,
    present_name,
    read_manifest,
)

FILES = {"prefill.onnx": b"prefill", "decode.onnx": b"decode", "weights.bin": b"\0" * 5000, "engines/a.engine": b"e"}


def graph(name: str) -> GraphSpec:
    return GraphSpec(
        f"{name}.onnx",
        inputs=(TensorSpec("input_ids", "int64", ("batch", "seq")),),
        outputs=(TensorSpec("logits", "float32", ("batch", 1, 96)), TensorSpec("present.0.key", "float16", ())),
    )


MANIFEST = Manifest(
    producer="glm4export",
    producer_version="0.1.0",
    family="glm4",
    task="causal-lm",
    target="cpu",
    precision="fp16",
    vocab_size=96,
    config={**dict.fromkeys(GEOMETRY, 64), "rope": {"theta": 1e4, "yarn": None}},
    source={"repo_id": "org/模型", "commit": "0" * 40},
    tokens=TokenIds(eos=(1, 2, 3), pad=0, bos=None),
    kv_cache=CacheSpec(layers=2, kv_heads=2, head_dim=32, dtype="float16", max_seq_len=64),
    graphs={name: graph(name) for name in ("prefill", "decode")},
    files={name: FileSpec(len(data), hashlib.sha256(data).hexdigest()) for name, data in FILES.items()},
)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "engines").mkdir(parents=True)
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    (folder / "manifest.json").write_text(MANIFEST.to_json(), encoding="utf-8")
    return folder


def changed(path: str, value: Any) -> str:
    """The manifest's text with the key at ``path`` (dotted by /) set, or dropped where value is ``...``."""
    data = json.loads(MANIFEST.to_json())
    *parents, key = path.split("/")
    inner = data
    for name in parents:
        inner = inner[int(name) if isinstance(inner, list) else name]
    if value is ...:
        del inner[key]
    else:
        inner[key] = value
    return json.dumps(data)


def test_round_trip(bundle: Path) -> None:
    assert Manifest.from_json(MANIFEST.to_json(), "m") == MANIFEST
    assert read_manifest(bundle, check_hashes=True) == MANIFEST
    assert MANIFEST.to_json() == Manifest.from_json(MANIFEST.to_json(), "m").to_json()
    assert "模型" in MANIFEST.to_json() and MANIFEST.to_json().endswith("}\n")


def test_names_and_sizes() -> None:
    assert past_name(3, "key") == "past_key_values.3.key" and present_name(0, "value") == "present.0.value"
    assert MANIFEST.cache.bytes_per_token == 2 * 2 * 2 * 32 * 2
    assert graph("decode").output("logits").dims == ("batch", 1, 96)
    with pytest.raises(BundleError, match=r"decode\.onnx: no output 'hidden'; it has logits, present\.0\.key"):
        graph("decode").output("hidden")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format_version", FORMAT_VERSION + 1, r"bundle format 3, this version reads format 2; upgrade glm4export"),
        ("format_version", 1, r"bundle format 1, this version reads format 2; build the bundle again"),
        ("format_version", ..., r"key 'format_version' is missing; build the bundle again"),
        ("format_version", "1", r"format_version is '1', expected int"),
        ("format_version", True, r"format_version is True, expected int"),
        *((key, ..., rf"key '{key}' is missing") for key in json.loads(MANIFEST.to_json())),
        ("target", 3, r"target is 3, expected str; build the bundle again"),
        ("vocab_size", 96.0, r"vocab_size is 96\.0, expected int"),
        ("vocab_size", 0, r"vocab_size is 0, expected at least 1"),
        ("config", [], r"config is \[\], expected dict"),
        ("tokens/eos", 1, r"tokens: eos is 1, expected list"),
        ("tokens/eos", [1, "2"], r"tokens: eos holds '2', expected int"),
        ("tokens/eos", [True], r"tokens: eos holds True, expected int"),
        ("tokens/pad", "0", r"tokens: pad is '0', expected int"),
        ("cache/layers", ..., r"cache: key 'layers' is missing"),
        ("cache/max_seq_len", -1, r"cache: max_seq_len is -1, expected at least 1"),
        ("cache/dtype", "fp16", r"cache: dtype 'fp16' is not one of float32, "),
        ("graphs/decode", ..., r"no decode graph; build the bundle again"),
        ("graphs/prefill", ..., r"no prefill graph; build the bundle again"),
        ("graphs/decode/file", "d.onnx", r"graph file 'd\.onnx' is not among its files"),
        ("graphs/decode/inputs", {}, r"graphs: decode: inputs is \{\}, expected list"),
        ("graphs/decode/inputs", [1], r"graphs: decode: inputs: expected an object, found int"),
        ("graphs/decode/outputs/0/dims", [1.5], r"graphs: decode: outputs: dims holds 1\.5, expected int or str"),
        ("files/weights.bin", {"size": 5000}, r"files: weights\.bin: key 'sha256' is missing"),
        ("files/weights.bin", 5000, r"files: weights\.bin is 5000, expected dict"),
        ("files/weights.bin", ..., r"weights file 'weights\.bin' is not among its files; build the bundle again"),
        ("files/weights.bin/size", -1, r"files: weights\.bin: size is -1, expected at least 0"),
        ("files/weights.bin/size", 2**63, r"size is 9223372036854775808, expected less than 2\*\*63"),
        ("cache/layers", 1 << 13287, r"layers is an integer of 13288 bits, expected less than 2\*\*63"),
        ("files/weights.bin/sha256", "0" * 63, r"sha256 is '0{63}', expected 64 hexadecimal digits"),
        ("files/weights.bin/sha256", "G" * 64, r"expected 64 hexadecimal digits"),
        ("graphs/decode/inputs/0/dims", ["batch", 0], r"dims holds 0, expected a name or a number above 0"),
        ("graphs/decode/inputs/0/dims", ["batch", 2**64], r"dims holds 18446744073709551616, expected a name or"),
        ("graphs/decode/inputs/0/dims", [""], r"dims holds '', expected a name or a number above 0"),
        ("graphs/decode/inputs/0/dtype", "float13", r"inputs: dtype 'float13' is not one of float32, "),
        ("graphs/decode/inputs/0/name", "\x1b[2J", r"inputs: name is '\\x1b\[2J', expected characters that can be"),
        ("precision", "\x1b[31m", r"precision is '\\x1b\[31m', expected characters that can be printed"),
        ("source/repo_id", 3, r"source: repo_id is 3, expected str"),
        ("config/head_dim", "64", r"config: head_dim is '64', expected int"),
        ("config/hidden_size", ..., r"config: key 'hidden_size' is missing"),
    ],
)  # fmt: skip
def test_manifests_that_are_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(BundleError, match=f"^m: .*{message}"):
        Manifest.from_json(changed(path, value), "m")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "..", "a\\..\\x", "C:\\x"])
def test_file_names_that_leave_the_folder(name: str) -> None:
    data = json.loads(MANIFEST.to_json())
    data["files"][name] = {"size": 1, "sha256": ""}
    with pytest.raises(BundleError, match=r"^m: files: .*: the path leaves the bundle's folder; refusing it$"):
        Manifest.from_json(json.dumps(data), "m")


@pytest.mark.parametrize(
    "name", ["", ".", "a//b", "./a", "a/", "a\0b", "\x1b[31m", "\ud800", "a\nb", "manifest.json", "n" * 256]
)
def test_file_names_that_name_no_file_of_a_bundle(name: str) -> None:
    data = json.loads(MANIFEST.to_json())
    data["files"][name] = {"size": 1, "sha256": "0" * 64}
    with pytest.raises(BundleError, match=r"^m: files: .*: not the path of a file in a bundle; refusing it$") as caught:
        Manifest.from_json(json.dumps(data), "m")
    assert str(caught.value).isprintable()


def test_a_key_that_comes_twice() -> None:
    text = MANIFEST.to_json().replace('"precision"', '"vocab_size": 3, "precision"', 1)
    with pytest.raises(BundleError, match=r"^m: not valid JSON \(two keys 'vocab_size' in one object\); build the"):
        Manifest.from_json(text, "m")


def test_two_tensors_of_one_name() -> None:
    data = json.loads(MANIFEST.to_json())
    data["graphs"]["decode"]["inputs"] *= 2
    with pytest.raises(BundleError, match=r"^m: graphs: decode: inputs: two of one name; build the bundle again"):
        Manifest.from_json(json.dumps(data), "m")


@pytest.mark.parametrize(
    "text", ["", "{", "\0", "[" * 100_000, "1" * 5000], ids=["empty", "cut", "nul", "deep", "digits"]
)
def test_text_that_is_not_json(text: str) -> None:
    with pytest.raises(BundleError, match=r"^m: not valid JSON \(.+\); build the bundle again$"):
        Manifest.from_json(text, "m")


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("3", "int"), ("null", "NoneType")])
def test_json_that_is_no_object(text: str, kind: str) -> None:
    with pytest.raises(BundleError, match=rf"^m: expected an object, found {kind}; build the bundle again$"):
        Manifest.from_json(text, "m")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=3,
)


_ODD: list[Any] = [
    -1, 0, 2**31, 2**63, 2**64, 10**400, float("nan"), float("inf"), "", "\0", "\x1b[2J", "\ud800", "../x", "x" * 5000,
    [], {}, [[]], None, True,
]  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(data=st.data(), value=VALUES | st.sampled_from(_ODD))
def test_any_value_of_any_key_is_read_or_refused(data: st.DataObject, value: Any) -> None:
    whole = copy.deepcopy(json.loads(MANIFEST.to_json()))
    inner = whole
    while True:
        key = data.draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else range(len(inner))))
        if not isinstance(inner[key], dict | list) or not inner[key] or data.draw(st.booleans()):
            break
        inner = inner[key]
    inner[key] = value
    try:
        manifest = Manifest.from_json(json.dumps(whole), "m")
    except BundleError as error:
        assert str(error).startswith("m") and str(error).isprintable() and len(str(error)) < 400
    else:
        assert isinstance(manifest, Manifest)


def test_folders_that_are_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"nowhere: no such folder; `glm4export build` makes one"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(BundleError, match=rf"{tmp_path}: not a bundle \(no manifest\.json\); `glm4export build` makes"):
        read_manifest(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match=r"file: no such folder; `glm4export build` makes one"):
        read_manifest(tmp_path / "file")
    with pytest.raises(BundleError, match=r"manifest\.json: cannot be read \(.*File name too long"):
        read_manifest(tmp_path / ("n" * 5000))
    (tmp_path / "manifest.json").mkdir()
    with pytest.raises(BundleError, match=r"manifest\.json: cannot be read \(.*Is a directory"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").rmdir()
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe")
    with pytest.raises(BundleError, match=r"manifest\.json: cannot be read \('utf-8' codec"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name: str, bundle: Path) -> None:
    file, data = bundle / name, FILES[name]
    file.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    read_manifest(bundle)  # sizes only: quick
    with pytest.raises(
        BundleError, match=rf"{file}: sha256 [0-9a-f]{{64}}, the manifest says [0-9a-f]{{64}}; the file"
    ):
        read_manifest(bundle, check_hashes=True)
    file.write_bytes(data + b"x")
    with pytest.raises(
        BundleError, match=rf"{file}: {len(data) + 1} bytes, the manifest says {len(data)}; copy or build"
    ):
        read_manifest(bundle)
    file.unlink()
    with pytest.raises(
        BundleError, match=rf"{file}: missing; the manifest lists it\. Build the bundle again or copy it"
    ):
        read_manifest(bundle)
    file.mkdir()
    with pytest.raises(BundleError, match=rf"{file}: missing"):
        read_manifest(bundle)


def test_links_may_not_leave_the_bundle(bundle: Path, tmp_path: Path) -> None:
    """As onnxruntime has it of a graph's own files; links into the store that manifest.json is a link into may."""
    outside = tmp_path / "outside.bin"
    (bundle / "weights.bin").rename(outside)
    (bundle / "weights.bin").symlink_to(outside)
    with pytest.raises(BundleError, match=rf"weights\.bin: a link to {outside}, which is outside of the bundle; copy"):
        read_manifest(bundle)
    outside.rename(bundle / "w")
    (bundle / "weights.bin").unlink()
    (bundle / "weights.bin").symlink_to("w")
    (tmp_path / "link").symlink_to(bundle)
    assert read_manifest(tmp_path / "link") == read_manifest(bundle) == MANIFEST


def test_a_hub_caches_snapshot(bundle: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "0", tmp_path / "blobs"
    blobs.mkdir()
    (snapshot / "engines").mkdir(parents=True)
    for index, name in enumerate((*FILES, "manifest.json")):
        (bundle / name).rename(blobs / str(index))
        (snapshot / name).symlink_to(blobs / str(index))
    assert read_manifest(snapshot, check_hashes=True) == MANIFEST


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_hashes_are_checked_of_all_that_is_read(name: str, bundle: Path) -> None:
    (bundle / name).write_text("{}")
    read_manifest(bundle)
    with pytest.raises(BundleError, match=rf"{name}: the manifest doesn't list it; remove it, or build the bundle"):
        read_manifest(bundle, check_hashes=True)


def test_a_file_that_cannot_be_looked_at(bundle: Path) -> None:
    (bundle / "weights.bin").unlink()
    (bundle / "weights.bin").symlink_to("weights.bin")
    with pytest.raises(BundleError, match=r"weights\.bin: (missing|cannot be read)"):
        read_manifest(bundle)


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_are_onnxs(name: str) -> None:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(DTYPES[name].number)
    assert dtype.name == name
    packed = onnx.helper.make_tensor("", DTYPES[name].number, [6], [1] * 6)
    assert nbytes(name, 6) == len(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(packed)).raw_data)
