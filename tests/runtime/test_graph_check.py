"""A manifest whose sizes are not its graphs' is refused before anything is opened or allocated."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from glm4runtime import BundleError, UserError, load
from glm4runtime.backends.cache import Buffer, Cache
from glm4runtime.contract import CacheSpec, sha256_of
from glm4runtime.contract.onnxfile import read_graph

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def bundle(demo_bundles: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundles["fp32"], tmp_path / "bundle"))


@pytest.fixture(autouse=True)
def nothing_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Buffer, "__init__", None)


def change(bundle: Path, what: Change) -> None:
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    what(manifest)
    file.write_text(json.dumps(manifest), encoding="utf-8")


def put(path: str, value: Any) -> Change:
    def run(manifest: dict[str, Any]) -> None:
        *parents, key = path.split("/")
        for name in parents:
            manifest = manifest[int(name) if isinstance(manifest, list) else name]
        manifest[int(key) if isinstance(manifest, list) else key] = value

    return run


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (put("cache/layers", 2**31), "it has keys and values of 4 layers, the manifest's cache of 2147483648; copy or"),
        (put("cache/layers", 3), "it has keys and values of 4 layers, the manifest's cache of 3"),
        (put("cache/max_seq_len", 10**8), "it knows 2048 positions, the manifest's cache has 100000000"),
        (put("cache/kv_heads", 2**40), r"'past_key_values\.0\.key' float32 \['batch', 2, 'max_seq', 64\], the "
         r"manifest's cache is float32 \['batch', 1099511627776, 2048, 64\]"),
        (put("cache/head_dim", 32), r"the manifest's cache is float32 \['batch', 2, 2048, 32\]"),
        (put("cache/dtype", "int8"), r"the manifest's cache is int8 \['batch', 2, 2048, 64\]"),
        (put("vocab_size", 10**12), r"its logits are \[2048\] wide, the manifest's vocab_size is 1000000000000"),
        (put("graphs/prefill/inputs/3/dims/1", 4), r"its input is 'past_key_values\.0\.key' float32 \['batch', 2, "
         r".*, the manifest says 'past_key_values\.0\.key' float32 \['batch', 4, "),
        (put("graphs/prefill/outputs/0/name", "x"), "its output is 'logits' .*, the manifest says 'x' "),
        (lambda m: m["graphs"]["prefill"]["inputs"].pop(), "it has 11 inputs, the manifest lists 10"),
    ],
)  # fmt: skip
def test_sizes_that_are_not_the_graphs(what: Change, message: str, bundle: Path) -> None:
    change(bundle, what)
    with pytest.raises(BundleError, match=rf"/(prefill|decode)\.onnx: .*{message}"):
        load(bundle)


@pytest.mark.parametrize("provider", ["engine", "cpu"])
def test_sizes_of_a_step_graph(provider: str, tensorrt_bundles: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tensorrt_bundles("fp16"), tmp_path / "bundle"))
    change(folder, put("cache/max_seq_len", 10**8))
    with pytest.raises(BundleError, match=r"step\.onnx: it has .*\['batch', 2, 64, 64\], the manifest's cache is"):
        load(folder, provider=provider)


def test_weights_that_no_manifest_lists(bundle: Path) -> None:
    """Renamed and so not among the files that hashes are compared of; an external file deep in a node is no better."""
    (bundle / "weights.bin").rename(bundle / "other.bin")
    (bundle / "weights.bin").write_bytes(b"")
    empty = sha256_of(bundle / "weights.bin")
    change(bundle, put("files/weights.bin", {"size": 0, "sha256": empty}))
    for name in ("prefill.onnx", "decode.onnx"):
        model = onnx.load(bundle / name, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = "other.bin" if entry.key == "location" else entry.value
        onnx.save(model, bundle / name)
        facts = {"size": (bundle / name).stat().st_size, "sha256": sha256_of(bundle / name)}
        change(bundle, put(f"files/{name}", facts))
    with pytest.raises(BundleError, match=r"decode\.onnx: it reads a file 'other\.bin' that the manifest doesn't list"):
        load(bundle, check_hashes=True)


def test_files_that_tensors_anywhere_in_a_model_name(tmp_path: Path) -> None:
    """Wherever ONNX lets a tensor be: in attributes, graphs in attributes, functions, sparse tensors."""

    def external(location: str) -> onnx.TensorProto:
        tensor = onnx.TensorProto(name=location, data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=location)
        return tensor

    def constant(location: str) -> onnx.NodeProto:
        return onnx.helper.make_node("Constant", [], ["c"], value=external(location))

    inner = onnx.helper.make_graph([constant("inner")], "inner", [], [], [external("inner_weights")])
    branch = onnx.helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    end = onnx.helper.make_tensor_value_info("y", 16, ["a", 3, None])
    graph = onnx.helper.make_graph([constant("outer"), branch], "g", [end], [end], [external("weights")])
    graph.sparse_initializer.add(values=external("values"), indices=external("indices"))
    opset = onnx.helper.make_opsetid("", 23)
    function = onnx.helper.make_function("d", "f", [], ["c"], [constant("function")], [opset])
    path = tmp_path / "m.onnx"
    path.write_bytes(onnx.helper.make_model(graph, functions=[function]).SerializeToString())
    found = read_graph(path)
    assert found.files == {"inner", "inner_weights", "outer", "weights", "values", "indices", "function"}
    assert [(spec.name, spec.dtype, spec.dims) for spec in found.inputs] == [("y", "bfloat16", ("a", 3, ""))]


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threads": 100_000}, r"threads=100000: at most \d+ on this machine, which has \d+ processors; 0 lets ONNX"),
        ({"threads": 2**70}, r"threads=1180591620717411303424: at most \d+ on this machine"),
        ({"threads": -1}, "threads=-1 must be at least 0"),
        ({"threads": True}, "threads=True is not a whole number"),
        ({"threads": 2.0}, r"threads=2\.0 is not a whole number"),
        ({"threads": "2"}, "threads='2' is not a whole number"),
        ({"threads": None}, "threads=None is not a whole number"),
        ({"max_seq_len": True}, "max_seq_len=True is not a whole number"),
        ({"max_seq_len": 2.5}, r"max_seq_len=2\.5 is not a whole number"),
        ({"max_seq_len": "5"}, "max_seq_len='5' is not a whole number"),
        ({"max_seq_len": 0}, r"max_seq_len=0 is not in 1\.\.2048, the positions"),
        ({"max_seq_len": np.bool_(1)}, r"max_seq_len=np\.True_ is not a whole number"),
        ({"prefill_chunk": 0}, "prefill_chunk=0 must be at least 1"),
        ({"prefill_chunk": [3]}, r"prefill_chunk=\[3\] is not a whole number"),
        ({"check_hashes": "no"}, "check_hashes='no' is not True or False"),
        ({"invariant": 1}, "invariant=1 is not True or False"),
        ({"provider": 3}, "provider 3 is not known; known: cpu, cuda"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(settings: dict[str, Any], message: str, bundle: Path) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        load(bundle, **settings)


def test_a_bundle_that_is_no_path() -> None:
    with pytest.raises(UserError, match=r"^bundle=3 is not the path of a folder$"):
        load(3)  # type: ignore[arg-type]


def test_a_cache_that_no_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    spec = CacheSpec(layers=2, kv_heads=2**12, head_dim=2**12, dtype="float16", max_seq_len=2**30)
    message = (
        "the cache of 1073741824 tokens takes 144115188.08 GB (2 layers, 4096 heads of 4096 in float16): "
        "144115188.08 GB for a tensor [4, 1, 4096, 1073741824, 4096] of float16 on cpu cannot be had: Unable"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        Cache(spec, spec.max_seq_len, "cpu")
