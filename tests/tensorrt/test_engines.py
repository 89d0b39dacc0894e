"""Real TensorRT-RTX engines, built without a GPU, and what is told of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from glm4export import cli
from glm4export.build import targets
from glm4export.inspection import facts as inspect
from glm4export.tensorrt import engines, flavour, memory, worker
from glm4export.tensorrt.engines import EngineOptions, add_engines, plan
from glm4export.tensorrt.flavour import TENSORRT, TENSORRT_RTX
from glm4export.tensorrt.network import Log
from glm4export.tensorrt.plugin.graph import write_plugin_graph
from glm4export.tensorrt.worker import Job
from glm4runtime import load_encoder
from glm4runtime.contract import UserError, read_manifest
from glm4runtime.contract.engine_spec import Profile, read_engine_specs
from glm4runtime.contract.onnxfile import read_graph
from glm4runtime.speculation import MAX_DRAFT
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.encoders import random_encoder
from tests.helpers.engine_builds import LAYERS, builder, contents

trt = pytest.importorskip("tensorrt_rtx")
CAPABILITIES = dict.fromkeys(("fp16", "bf16", "int8", "int4"), ("8.0", "8.9", "12.0"))
CAPABILITIES["fp8"] = ("8.9", "12.0")  # the first with fp8 tensor cores


@pytest.mark.parametrize("precision", CAPABILITIES)
def test_engines_of_the_embedded_model(precision: str, tensorrt_bundles: Callable[[str], Path], tmp_path: Path) -> None:
    capabilities = CAPABILITIES[precision]
    before = contents(tensorrt_bundles(precision))
    bundle = Path(shutil.copytree(tensorrt_bundles(precision), tmp_path / "bundle"))
    made = builder(compute_capabilities=capabilities, prefill_chunk=32)
    manifest = add_engines(bundle, made)
    assert read_manifest(bundle, check_hashes=True) == manifest
    specs = read_engine_specs(bundle)
    assert [spec.compute_capability for spec in specs] == sorted(capabilities)  # by file name
    assert {spec.file for spec in specs} == {
        f"engines/tensorrt-rtx-sm{c.replace('.', '')}.engine" for c in capabilities
    }
    for spec in specs:
        assert spec.layers["ATTENTION_OUTPUT"] == spec.attentions == LAYERS
        assert spec.layers["ROTARY_EMBEDDING"] == spec.layers["KV_CACHE_UPDATE"] == 2 * LAYERS
        assert spec.precision == precision and spec.version == trt.__version__
        assert spec.profiles == (Profile("step", (1, 1, 1), (1, 1, 128), (1, 1, 16)),)
        spec.require(
            manifest, flavour="tensorrt-rtx", version=trt.__version__, compute_capability=spec.compute_capability
        )
        weights = manifest.files["weights.bin"].size
        assert spec.weight_bytes is not None and 0.95 * weights < spec.weight_bytes < 1.05 * weights
        assert spec.scratch_bytes is not None and spec.scratch_bytes > 0
        assert (bundle / spec.file).stat().st_size == spec.size > spec.weight_bytes
    sizes = {spec.compute_capability: spec.sha256 for spec in specs}
    assert len(set(sizes.values())) == len(capabilities), "an engine for every capability, each its own"
    after = contents(bundle)
    assert {name for name in after if name not in before} == {
        *(spec.file for spec in specs),
        *(spec.file.replace(".engine", ".json") for spec in specs),
    }
    assert all(after[name] == data for name, data in before.items() if name != "manifest.json")
    assert all(built.own_memory <= built.estimated_memory for built in made.built)


def test_an_engine_of_a_graph_without_a_cache(build_bundle: Build, tmp_path: Path) -> None:
    model = random_encoder("sequence-classification", num_hidden_layers=1, hidden_size=128, head_dim=64)
    bundle = build_bundle(checkpoints.save(model, tmp_path), precision="fp16", target="tensorrt")
    engines = builder()
    add_engines(bundle, engines)
    (spec,) = read_engine_specs(bundle)
    assert spec.attention == "full" and spec.attentions == 1 and spec.layers["ROTARY_EMBEDDING"] == 2
    assert spec.profiles == (Profile("texts", (1, 1, 16), (1, 128, 128), (1, 1, 1)),)
    manifest = read_manifest(bundle, check_hashes=True)
    assert spec.file in manifest.files and spec.graph_sha256 == manifest.engine_graph_sha256
    with pytest.raises(UserError, match="--max-batch is for graphs with a cache; engines of others take several texts"):
        add_engines(bundle, builder(max_batch=2))
    with pytest.raises(UserError, match="provider 'engine' doesn't run a bundle for tensorrt and sequence-class"):
        load_encoder(bundle)
    with load_encoder(bundle, provider="cpu") as encoder:
        assert encoder.logits([[5, 6]])[0].shape == (3,)


def test_plugins_need_full_tensorrt(build_bundle: Build) -> None:
    options: dict[str, Any] = {"precision": "fp16", "target": "tensorrt", "max_seq_len": 64, "attention": "plugin"}
    bundle = build_bundle(checkpoints.random_model(), **options)
    told = "--attention plugin: tensorrt-rtx takes no plugins; build its engines with --attention standard, or with"
    with pytest.raises(UserError, match=told):
        add_engines(bundle, builder())
    graph = bundle / "rewritten.onnx"
    write_plugin_graph(bundle / "step.onnx", graph, programs=2)
    nodes = [node.op for node in read_graph(graph).nodes if node.domain == "glm4"]
    assert nodes == ["AppendToCache", "FlashAttention", "CombineSplits"] * 2
    assert read_graph(graph).stored.keys() - {"attention/unscaled"} == read_graph(bundle / "step.onnx").stored.keys()


def test_memory_is_as_estimated(build_bundle: Build) -> None:
    """A layer of GLM-4-9B's width: were rearranged weights not counted, the peak would pass the estimate."""
    model = checkpoints.random_model(
        hidden_size=4096, intermediate_size=8192, num_attention_heads=32, head_dim=128, num_hidden_layers=1
    )
    made = builder()
    add_engines(build_bundle(model, precision="fp16", target="tensorrt", max_seq_len=64), made)
    (built,) = made.built
    # own memory is sampled, and on a fast machine the samples miss the peak's last tenth now and then
    assert built.estimated_memory / 1.5 < built.own_memory <= built.estimated_memory
    assert built.resident_memory > built.own_memory, "with the mapped weights file"


def test_the_estimate_of_a_9b_model() -> None:
    """The formula on GLM-4-9B's weights in fp16: each matrix that is rearranged, twice."""
    hidden, kv, wide, vocab = 4096, 256, 13696, 151552
    weights = {
        "model.embed_tokens.weight": ("float16", 2 * hidden * vocab),
        "lm_head.weight": ("float16", 2 * hidden * vocab),
    }
    for layer in range(40):
        name = f"model.layers.{layer}"
        weights |= {
            f"{name}.self_attn.qkv_proj.weight": ("float16", 2 * hidden * (hidden + 2 * kv)),
            f"{name}.self_attn.o_proj.weight": ("float16", 2 * hidden * hidden),
            f"{name}.mlp.gate_up_proj.weight": ("float16", 2 * hidden * 2 * wide),
            f"{name}.mlp.down_proj.weight": ("float16", 2 * hidden * wide),
        }
    rearranged = 2 * hidden * (vocab + 40 * (hidden + 2 * kv + 2 * wide))
    assert sum(size for _, size in weights.values()) == 18_798_870_528 and rearranged == 11_727_273_984
    both = 18_798_870_528 + rearranged
    assert memory.peak_bytes(weights) == both + both // 50 + 250_000_000 == 31_386_667_402


def test_int4_is_rearranged_and_int8_is_not() -> None:
    assert memory.peak_bytes({"a.o_proj.weight.int4": ("int4", 7)}) == 250_000_014
    assert memory.peak_bytes({"a.qkv_proj.weight.int8": ("int8", 7)}) == 250_000_007
    assert memory.peak_bytes({"a.qkv_proj.bias": ("float16", 7), "a.o_proj.weight": ("float16", 7)}) == 250_000_014


def test_too_little_memory_is_told_before(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(bundle)
    monkeypatch.setattr(memory, "memory_bytes", lambda: (4_000_000_000, 100_000_000))
    told = r"takes about 0\.3 GB of memory; 0\.1 GB of 4\.0 GB are free\. Free some memory, or build on a machine"
    with pytest.raises(UserError, match=told):
        add_engines(bundle, builder())
    monkeypatch.setattr(memory, "memory_bytes", lambda: (100_000_000, 100_000_000))
    with pytest.raises(UserError, match=r"Build on a machine with more .*or choose --precision int8 or int4"):
        add_engines(bundle, builder())
    assert contents(bundle) == before


def test_too_little_memory_is_told_before_weights_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "memory_bytes", lambda: (100_000_000, 100_000_000))
    monkeypatch.setattr("glm4export.build.build.write_weights", lambda *a: pytest.fail("weights were written"))
    out = tmp_path / "out"
    assert cli.main(["build", "-o", str(out), "--target", "tensorrt", "--compute-capability", "8.9"]) == 2
    assert "building this engine takes about 0.3 GB" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_build_and_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    argv = ["build", "-o", str(out), "--target", "tensorrt", "--max-seq-len", "64", "--compute-capability", "8.9"]
    assert cli.main([*argv, "--max-batch", "4", "--json"]) == 0
    (engine,) = json.loads(capsys.readouterr().out)["engines"]
    assert engine["file"] == "engines/tensorrt-rtx-sm89.engine" and engine["attentions"] == LAYERS
    read_manifest(out, check_hashes=True)
    (facts,) = inspect.inspect_bundle(out)["engines"]
    assert facts["fused"] == {"attention_output": [4, 4], "rotary_embedding": [8, 8], "kv_cache_update": [8, 8]}
    assert cli.main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"tensorrt-rtx {trt.__version__} for compute capability 8.9, standard attention, 13.0 MB" in shown
    assert "attention output 4 of 4, rotary embedding 8 of 8, kv cache update 8 of 8" in shown
    assert "17 MATRIX_MULTIPLY" in shown
    assert "profile    step: batch 1 to 4 (best 1), seq 1 to 128 (best 1), rows 1 to 16 (best 1)" in shown


def test_a_bundle_without_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, None)
    argv = ["build", "-o", str(tmp_path / "out"), "--target", "tensorrt", "--engine", "none", "--max-seq-len", "8"]
    assert cli.main(argv) == 0
    assert read_engine_specs(tmp_path / "out") == [] and not (tmp_path / "out" / "engines").exists()


def test_the_installed_flavour_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flavour.choose_flavour("tensorrt-rtx") is TENSORRT_RTX
    for found, here, chosen in (
        ([TENSORRT_RTX], "8.9", TENSORRT_RTX),
        ([TENSORRT], None, TENSORRT),
        ([TENSORRT, TENSORRT_RTX], "8.9", TENSORRT),
        ([TENSORRT, TENSORRT_RTX], None, TENSORRT_RTX),
    ):
        monkeypatch.setattr(flavour, "installed_flavours", lambda found=found: found)
        monkeypatch.setattr(flavour, "gpu_capability", lambda here=here: here)
        assert flavour.choose_flavour(None) is chosen


def test_the_target_where_tensorrt_and_a_gpu_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "gpu_capability", lambda: "8.9")
    assert targets.detect_target() == "tensorrt"
    monkeypatch.setattr(targets, "installed_flavours", list)
    assert targets.detect_target() in ("cpu", "cuda")


def test_full_tensorrt_builds_for_the_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(engines, "gpu_capability", lambda: None)
    with pytest.raises(UserError, match=r"tensorrt builds for the GPU at hand, and there is none; see --engine"):
        plan(EngineOptions("tensorrt"))
    monkeypatch.setattr(engines, "gpu_capability", lambda: "9.0")
    assert plan(EngineOptions("tensorrt", version_compatible=True)).compute_capabilities == ("9.0",)
    assert plan(EngineOptions("tensorrt", ("9.0",))).compute_capabilities == ("9.0",)
    with pytest.raises(
        UserError, match=r"--compute-capability 8\.9: tensorrt builds for the GPU at hand, which is 9\.0"
    ):
        plan(EngineOptions("tensorrt", ("8.9",)))


def test_tensorrt_rtx_builds_for_the_gpu_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "gpu_capability", lambda: "8.6")
    assert plan(EngineOptions("tensorrt-rtx")).compute_capabilities == ("8.6",)
    assert plan(EngineOptions("tensorrt-rtx", ("8.9", "8.0", "8.9"))).compute_capabilities == ("8.9", "8.0")


def test_profiles_of_full_tensorrt(job: Job, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its configuration, made with RTX's module, whose builder has the same methods."""
    assert flavour.MOST_ROWS == MAX_DRAFT + 1
    profiles = TENSORRT.profiles(chunk=32)
    assert profiles == (
        Profile("prefill", (1, 1, 1), (1, 32, 32), (1, 1, 1)),
        Profile("decode", (1, 1, 1), (1, 1, 16), (1, 1, 16)),
    )
    assert TENSORRT.profiles(32, sequences=8) == (*profiles, Profile("steps", (1, 8, 8), (1, 1, 1), (1, 1, 1)))
    job = replace(
        job,
        profiles=TENSORRT.profiles(32, sequences=8),
        optimization_level=1,
        workspace=1 << 20,
        version_compatible=True,
        weight_streaming=True,
        timing_cache=str(tmp_path / "timing"),
    )
    log = Log()
    logger = worker.logger(trt, log)
    made = trt.Builder(logger)
    network = worker.new_network(trt, made)
    parser = worker.parse(trt, network, logger, Path(job.graph), log)
    config = worker.configure(trt, made, network, job, TENSORRT)
    assert config.num_optimization_profiles == 3 and config.builder_optimization_level == 1
    assert config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE) and config.get_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 1 << 20
    worker._save_timing_cache(config, job)
    assert (tmp_path / "timing").stat().st_size > 0
    worker.configure(trt, made, network, job, TENSORRT)  # reads what was saved
    del parser


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("input_ids", (-1, -1), ((1, 1), (2, 5), (4, 9))),
        ("logit_rows", (-1, -1), ((1, 1), (2, 1), (4, 3))),
        ("write_indices", (-1,), ((1,), (2,), (4,))),
        ("attention_mask", (-1, 1, -1, 64), ((1, 1, 1, 64), (2, 1, 5, 64), (4, 1, 9, 64))),
        ("past_key_values.0.key", (-1, 2, 64, 16), ((1, 2, 64, 16), (2, 2, 64, 16), (4, 2, 64, 16))),
    ],
)
def test_shapes_of_a_profile(name: str, shape: tuple[int, ...], expected: Any) -> None:
    assert worker.shapes(name, shape, Profile("step", (1, 2, 4), (1, 5, 9), (1, 1, 3))) == expected


def test_an_engine_is_replaced_and_others_stay(bundle: Path) -> None:
    add_engines(bundle, builder(compute_capabilities=("8.9",)))
    opened = (bundle / "engines/tensorrt-rtx-sm89.engine").open("rb")  # as a running session has it
    first = {spec.compute_capability: spec for spec in read_engine_specs(bundle)}
    add_engines(bundle, builder(weight_streaming=True))
    add_engines(bundle, builder(compute_capabilities=("8.0",)))
    specs = {spec.compute_capability: spec for spec in read_engine_specs(bundle)}
    assert sorted(specs) == ["8.0", "8.9"] and specs["8.9"].weight_streaming
    read_manifest(bundle, check_hashes=True)
    assert specs["8.9"].sha256 != first["8.9"].sha256 and not first["8.9"].weight_streaming
    assert len(opened.read()) == first["8.9"].size
    opened.close()


def test_hard_links_are_made_where_possible(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inode = (bundle / "weights.bin").stat().st_ino
    add_engines(bundle, builder())
    assert (bundle / "weights.bin").stat().st_ino == inode, "gigabytes that weren't copied"

    def refuse(source: Any, target: Any, **named: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    add_engines(bundle, builder(compute_capabilities=("8.0",)))
    assert (bundle / "weights.bin").stat().st_ino != inode
    assert len(read_engine_specs(bundle)) == 2
    read_manifest(bundle, check_hashes=True)


WITHOUT = """
import sys
for name in ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "safetensors", "transformers"):
    sys.modules[name] = None
from glm4export import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def test_engines_are_built_without_the_compiler_s_packages(bundle: Path) -> None:
    argv = ["engine", str(bundle), "--compute-capability", "8.9"]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(
        f"{bundle}:\n  engines/tensorrt-rtx-sm89.engine: tensorrt-rtx {trt.__version__}, 12.0 MB"
    )
    assert [spec.compute_capability for spec in read_engine_specs(bundle)] == ["8.9"]


def test_a_missing_tensorrt_is_told_before_other_packages(tmp_path: Path) -> None:
    block = WITHOUT.replace('"torch"', '"tensorrt", "tensorrt_rtx", "tqdm", "torch"')
    for engine, told in (
        ([], "neither tensorrt nor tensorrt_rtx is installed; pip install '.[tensorrt-rtx]' in a clone of "),
        (["--engine", "tensorrt"], "tensorrt is not installed; pip install '.[tensorrt]' in a clone of glm4export's r"),
    ):
        argv = ["build", "-o", str(tmp_path / "out"), "--target", "tensorrt", *engine]
        done = subprocess.run([sys.executable, "-c", block, *argv], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"glm4export: error: {told}")
