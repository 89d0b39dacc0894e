"""Bundles of stages: the bits of one graph, on one device and on several, and what is refused of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime.capi import onnxruntime_inference_collection as ort_collection

from glm4export.inspection import facts
from glm4runtime import BundleError, Session, UserError, load
from glm4runtime.backends import cuda, ort_batch, stages
from glm4runtime.backends import ort as ort_runner
from glm4runtime.backends.gpu_options import GpuOptions
from glm4runtime.backends.ort import OrtRunner
from glm4runtime.backends.ort_batch import OrtBatchRunner
from glm4runtime.backends.prepare import prepare
from glm4runtime.contract import WEIGHTS, read_manifest, sha256_of
from glm4runtime.sampling import SamplingParams
from glm4serve.deploy import ray_stages
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.heldout import HELDOUT

LAYERS = 4
KINDS: dict[str, tuple[dict[str, Any], int]] = {  # options, and stages
    "fp32": ({"precision": "fp32"}, 3),
    "int8": ({"precision": "int8"}, 2),
    "int4, prefill in int8": ({"precision": "int4", "prefill_precision": "int8"}, 2),
    "int4 with an int8 cache": ({"precision": "int4", "kv_cache": "int8", "calibrate": HELDOUT}, 4),
}
FP16 = {"fp16": ({"precision": "fp16"}, 2), "cuda": ({"precision": "fp16", "target": "cuda"}, 3)}
Bundles = Callable[..., Path]


@pytest.fixture(scope="module")
def bundles(build_bundle: Build, tmp_path_factory: pytest.TempPathFactory) -> Bundles:
    """A kind by its name, whole or in stages."""
    model = checkpoints.random_model(num_hidden_layers=LAYERS, vocab_size=2000)
    folder = checkpoints.save_with_tokenizer(model, tmp_path_factory.mktemp("stages") / "checkpoint")

    def build(kind: str, stages: int | None = None) -> Path:
        return build_bundle(folder, **{"target": "cpu", **{**KINDS, **FP16}[kind][0]}, stages=stages)

    return cache(build)


def answers(session: Session) -> list[bytes]:
    """Prompts in chunks, steps and drafts, their cache, and tokens with guesses."""
    runner, tokens = session.runner, np.random.default_rng(0).integers(4, 256, 40).tolist()
    found = [runner.prefill(tokens[:23]).copy(), runner.decode(5).copy(), runner.verify([6, 7, 8]).copy()]
    runner.accept()
    found += [runner.decode(9).copy(), runner.prefill(tokens[23:]).copy()]
    kept = [row.tobytes() for row in found] + runner.cache_bits(runner.length)
    for lookup in (0, 5):
        generated = session.generate(tokens[:8] * 3, SamplingParams(max_new_tokens=24), lookup=lookup)
        kept.append(",".join(map(str, generated)).encode())
    return kept


@pytest.mark.parametrize("kind", KINDS)
def test_stages_have_the_bits_of_one_graph(kind: str, bundles: Bundles) -> None:
    count = KINDS[kind][1]
    with (
        load(bundles(kind), threads=1, prefill_chunk=16) as whole,
        load(bundles(kind, count), threads=1, prefill_chunk=16) as cut,
    ):
        assert isinstance(cut.runner, OrtRunner) and isinstance(whole.runner, OrtRunner)
        assert list(cut.runner.graphs) == list(whole.runner.graphs)
        assert {len(graph.stages) for graph in cut.runner.graphs.values()} == {count}
        assert answers(cut) == answers(whole)
    assert not (bundles(kind, count) / "genai_config.json").exists()
    sizes = [(bundles(kind, stages) / WEIGHTS).stat().st_size for stages in (None, count)]
    assert sizes[0] == sizes[1]


def test_many_sequences_over_stages(bundles: Bundles) -> None:
    one, three = (
        steps(OrtBatchRunner(bundle, read_manifest(bundle), provider="cpu", **SIZES))
        for bundle in (bundles("fp32"), bundles("fp32", 3))
    )
    assert one == three


SIZES: dict[str, Any] = {"slots": 3, "threads": 1, "prefill_chunk": 16, "max_seq_len": 32}


def steps(runner: OrtBatchRunner) -> list[bytes]:
    """Prompts, steps that move slots, drafts, rows moved about and what the cache holds then."""
    found = [runner.prefill(slot, [5 + slot, 6, 7], 0).tobytes() for slot in range(3)]
    found += [runner.step([2, 0], [8, 9], [3, 3]).tobytes(), runner.step([0, 1, 2], [9] * 3, [4, 3, 4]).tobytes()]
    found.append(runner.verify(1, [4, 5, 6], 4).tobytes())
    runner.copy_rows(0, 1, 4)
    runner.write_rows(2, 3, runner.read_rows(0, 3, 4))
    found += [
        runner.step([1, 2], [6, 7], [4, 4]).tobytes(),
        *(runner.read_rows(slot, 0, 5).tobytes() for slot in range(3)),
    ]
    runner.close()
    return found


def test_prepared_stages(bundles: Bundles, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bundles("fp32", 2), tmp_path / "bundle"))
    with load(bundle, threads=1) as session:
        wanted = session.runner.prefill([5, 6, 7]).copy()
    prepared = prepare(bundle, read_manifest(bundle))
    for stage in range(2):
        first, second = ((prepared / f"{name}.{stage}" / WEIGHTS).stat() for name in ("prefill", "decode"))
        assert first.st_ino == second.st_ino
    with load(bundle, threads=1, check_hashes=True) as session:
        assert np.array_equal(session.runner.prefill([5, 6, 7]), wanted)


def test_stages_for_cuda(bundles: Bundles) -> None:
    """Residual and norm are one node but at the cut; near to the graph without one."""
    whole, cut = bundles("cuda"), bundles("cuda", 3)
    nodes = [node.op_type for part in range(3) for node in onnx.load(cut / f"prefill.{part}.onnx").graph.node]
    assert nodes.count("SkipSimplifiedLayerNormalization") == 2 * LAYERS - 1 - 2
    assert nodes.count("RMSNormalization") == 2 * LAYERS + 1 + 1 + 2
    require_near(cut, whole)


def test_stages_in_fp16_round_the_stream_once_more(bundles: Bundles) -> None:
    """On a CPU, where the whole graph keeps it in float32."""
    require_near(bundles("fp16", 2), bundles("fp16"))


def require_near(bundle: Path, other: Path) -> None:
    with load(bundle, provider="cpu", threads=1) as ours, load(other, provider="cpu", threads=1) as theirs:
        wanted = theirs.runner.prefill([5, 6, 7, 8])
        assert np.abs(ours.runner.prefill([5, 6, 7, 8]) - wanted).max() < 2e-3 * np.abs(wanted).max()
        params = SamplingParams(max_new_tokens=16)
        assert list(ours.generate([5, 6, 7], params)) == list(theirs.generate([5, 6, 7], params))


def test_tables_count_where_they_are_read(bundles: Bundles) -> None:
    """The embedding's table weighs as much as layers do, and in fp16 twice what the head takes in int8."""
    assert read_manifest(bundles("fp32", 2)).stages == (2, 2)
    found = facts.inspect_bundle(bundles("int8", 2))
    assert found["stages"] == [1, 3]
    assert "  stages     2, of 1, 3 layers\n" in facts.text(found)


def changed(manifest: dict[str, Any], *names: str) -> None:
    """The graphs of two stages put into each other's place."""
    graphs = manifest["graphs"]
    graphs[names[0]], graphs[names[1]] = graphs[names[1]], graphs[names[0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(stages=[2, 1]), r"json: stages is \[2, 1\], expected the layers of each, 4 in all"),
        (lambda m: m.update(stages=[4, 0]), r"stages is \[4, 0\], expected the layers of each, 4 in all"),
        (lambda m: m.update(stages=[]), r"stages is \[\], expected the layers of each, 4 in all"),
        (lambda m: m.update(stages=[2.0, 2]), "stages holds 2.0, expected int"),
        (lambda m: m.update(stages=[2, 1, 1]), "manifest.json: no prefill.2 graph; build the bundle again"),
        (lambda m: m.update(stages=[3, 1]), r"\.0\.onnx: it has keys and values of 2 layers, .* cache of 3"),
        (lambda m: m.pop("stages"), "manifest.json: no prefill graph; build the bundle again"),
        (lambda m: m["graphs"].pop("decode.1"), "manifest.json: no decode.1 graph; build the bundle again"),
        (lambda m: changed(m, "decode.0", "decode.1"), r"decode\.\d\.onnx: (it has no past_key|its logits are)"),
    ],
)  # fmt: skip
def test_manifests_that_are_not_their_stages(
    change: Callable[[Any], Any], message: str, bundles: Bundles, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(bundles("fp32", 2), tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=message):
        load(bundle)


def test_files_that_are_not_their_stages(bundles: Bundles, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(bundles("fp32", 2), tmp_path / "bundle"))
    kept = (bundle / "prefill.1.onnx").read_bytes()
    (bundle / "prefill.1.onnx").unlink()
    with pytest.raises(BundleError, match=r"prefill\.1\.onnx: missing; the manifest lists it"):
        load(bundle)
    model = onnx.load_from_string(kept)
    for values in (model.graph.input, *(node.input for node in model.graph.node)):
        for index, value in enumerate(values):  # of another build, that was cut elsewhere
            if isinstance(value, str) and value == "stream.2":
                values[index] = "stream.3"
            elif getattr(value, "name", "") == "stream.2":
                value.name = "stream.3"
    onnx.save(model, bundle / "prefill.1.onnx")
    manifest = json.loads((bundle / "manifest.json").read_text())
    told = manifest["files"]["prefill.1.onnx"]
    told["size"], told["sha256"] = (bundle / "prefill.1.onnx").stat().st_size, sha256_of(bundle / "prefill.1.onnx")
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"prefill\.1\.onnx: its input is 'stream.3' .*the manifest says 'stream.2'"):
        load(bundle)
    next(spec for spec in manifest["graphs"]["prefill.1"]["inputs"] if spec["name"] == "stream.2")["name"] = "stream.3"
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"takes 'stream.3' .*, expected stream.2; it gets 'stream.2' float32"):
        load(bundle)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """A stand-in: GPUs in the host's memory, and sessions that compute there. What was asked of them."""
    on_cpu = ort_collection.OrtDevice.make("cpu", 0)
    asked: dict[str, list[Any]] = {"memory": [], "limits": []}
    opened, api = stages.open_session, FakeCuda()

    def make(name: str, device_id: int, *_: Any) -> Any:
        asked["memory"].append((name, device_id))
        return on_cpu

    def opened_on_cpu(path: Path, provider: str, threads: int, *, optimized: bool, options: Any) -> Any:
        asked["limits"].append((options["device_id"], options.get("gpu_mem_limit")))
        return opened(path, "cpu", threads)

    monkeypatch.setattr(ort_collection.OrtDevice, "make", make)
    for module in (ort_runner, stages):
        monkeypatch.setattr(module, "device_of", lambda provider: "cuda")
    monkeypatch.setattr(stages, "open_session", opened_on_cpu)
    monkeypatch.setattr(ort_batch, "open_cuda", lambda extra: cuda.Cuda(api))
    return asked


def test_a_device_for_each_stage(bundles: Bundles, devices: dict[str, list[Any]]) -> None:
    """Each cache on its own, and a limit for each; the bits of one."""
    bundle = bundles("fp32", 3)
    manifest, found = read_manifest(bundle), []
    for ids in ((), (0, 1, 1)):
        devices["limits"].clear()
        gpu = GpuOptions(0, 1, ids)
        runner = OrtRunner(bundle, manifest, provider="cuda", threads=1, prefill_chunk=16, gpu=gpu)
        found.append(answers(Session(bundle, manifest, runner, None)))  # type: ignore[arg-type]
        runner.close()
    assert found[0] == found[1]
    assert {where for where in devices["memory"] if where[0] == "cuda"} == {("cuda", 0), ("cuda", 1)}
    row = manifest.cache.bytes_per_token * manifest.cache.max_seq_len // LAYERS
    first, *others = manifest.stages or ()
    rest = str((10**9 - row * sum(others)) // 2)
    assert devices["limits"] == [("0", str(10**9 - row * first)), ("1", rest), ("1", rest)]


def test_many_sequences_over_devices(bundles: Bundles, devices: dict[str, list[Any]]) -> None:
    bundle, found = bundles("fp32", 3), []
    for ids in ((), (0, 1, 1)):
        gpu = GpuOptions(0, None, ids)
        found.append(steps(OrtBatchRunner(bundle, read_manifest(bundle), provider="cuda", gpu=gpu, **SIZES)))
    assert found[0] == found[1]


class Cluster:
    """As much of Ray as stages take: actors in this process, which answer at once and may be lost."""

    class exceptions:
        class RayError(Exception):
            """What others are kinds of: RayTaskError has ``cause``, what an actor raised."""

        class RayActorError(RayError):
            """An actor is no more."""

        class ObjectLostError(RayError):
            """What an actor gave went with its machine."""

    def __init__(self) -> None:
        self.actors: list[Any] = []
        self.cpus = 8
        self.lost: Exception | None = None

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": float(self.cpus)}

    def remote(self, actor: Any) -> Any:
        def made(*arguments: Any) -> Any:
            self.actors.append(actor(*arguments))
            return SimpleNamespace(
                **{name: SimpleNamespace(remote=partial(self.ask, self.actors[-1], name)) for name in ("ready", "run")}
            )

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=made))

    def ask(self, actor: Any, name: str, *arguments: Any) -> Any:
        return getattr(actor, name)(*arguments)

    def get(self, asked: Any) -> Any:
        if self.lost is not None:
            raise self.lost
        return asked


@pytest.mark.parametrize("kind", ["fp32", "int4 with an int8 cache"])
def test_an_actor_for_each_stage(kind: str, bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Ray: tools/ray_stages_check.py runs it on a cluster."""
    cluster, bundle = Cluster(), bundles(kind, KINDS[kind][1])
    monkeypatch.setattr(ray_stages, "_ray", lambda: cluster)
    with load(bundle, threads=1, prefill_chunk=16) as here:
        wanted = answers(here)
    with ray_stages.load_stages(bundle, prefill_chunk=16) as there:
        assert len(cluster.actors) == KINDS[kind][1]
        found = answers(there)  # the cache's bits are theirs
        assert found == wanted[:5] + wanted[-2:]
        lost = cluster.exceptions
        for cluster.lost, told in (
            (lost.RayActorError("a page of text\nThe actor is dead"), "RayActorError: 'The actor is dead'"),
            (lost.ObjectLostError(""), "ObjectLostError: 'no message'"),
        ):
            with pytest.raises(UserError, match=rf"a stage is lost, or failed \({told}\); load the bundle again"):
                there.runner.decode(5)
    stages, cluster.cpus = KINDS[kind][1], 1
    told = rf"{stages} stages reserve {stages} CPUs, 1 each, and the cluster has 1; "
    with pytest.raises(UserError, match=told):  # Ray would wait for ever
        ray_stages.load_stages(bundle)
    with pytest.raises(UserError, match="has no stages; build it with --stages N, one for each machine"):
        ray_stages.load_stages(bundles(kind))
