from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from glm4export import cli
from glm4export.commands.serve import _gpus
from glm4runtime.contract import MANIFEST
from tests.helpers.edits import edit
from tests.helpers.small_bundles import fill


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "which bundle?"),
        (["--name", "a"], "--name a: expected NAME=BUNDLE"),
        (["{bundle}", "--name", "bundle={bundle}"], "two bundles have the same name"),
        (["{bundle}", "--host", "0.0.0.0"], "--host 0.0.0.0: others would reach it"),
        (["{bundle}", "--keys", "{missing}"], "API keys can't be read"),
        (["{bundle}", "--keys", "{missing}", "--no-key"], "--keys and --no-key exclude each other"),
        (["{bundle}", "--drain", "-1"], "--drain -1.0: expected seconds from 0 to 86400"),
        (["{bundle}", "--timeout", "nan"], "--timeout nan: expected seconds"),
        (["{bundle}", "--certificate-key", "{missing}"], "--certificate-key goes with --certificate"),
        (["{bundle}", "--certificate", "{missing}"], "no certificate and key that TLS can use"),
        (["{bundle}", "--port", "70000"], "port 70000: can't be listened on"),
        (["{missing}"], "missing"),
        (["{bundle}", "--adapter", "x"], "--adapter x: expected NAME=FILE, or MODEL:NAME=FILE"),
        (["{bundle}", "--adapter", "a={missing}"], "has no side paths; build it with --lora-slots N"),
        (["{bundle}", "--adapter", "other:a={missing}"], "there is no bundle other; served: bundle"),
        (["{bundle}", "--adapter", "bundle={missing}"], "another model is called bundle"),
        (["{bundle}", "--name", "b={bundle}", "--adapter", "a=x"], "a=x: of which bundle? MODEL:NAME=FILE"),
        (["{bundle}", "--name", "b={bundle}", "--draft", "{bundle}"], "goes with one bundle, and 2 are served"),
        (["{bundle}", "--draft", "{missing}"], "missing"),
        (["{bundle}", "--port", "0", "--device-id", "1"], "device_id=1 is for cuda and tensorrt"),
        (["{bundle}", "--port", "0", "--gpu-mem-limit", "4"], "gpu_mem_limit is for cuda"),
        (["{bundle}", "--port", "0", "--cuda-graphs"], "cuda_graphs is for bundles for cuda"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are told before a bundle is opened."""
    bundle = tmp_path / "bundle"
    fill(bundle)
    argv = [word.format(bundle=bundle, missing=tmp_path / "missing") for word in options]
    assert cli.main(["serve", *argv]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--cuda-graphs", "--no-invariant", "--chat-template", "--draft"])
def test_options_of_engines_are_not_passed_over_where_there_is_none(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "bundle")
    encoder = Namespace(kv_cache=None, encoder=Namespace(pooling="mean"))
    for place in ("serve", "slot_options"):
        monkeypatch.setattr(f"glm4export.commands.{place}.read_manifest", lambda folder: encoder)
    value = [str(tmp_path)] if option in ("--chat-template", "--draft") else []
    assert cli.main(["serve", str(tmp_path / "bundle"), option, *value]) == 2
    assert f"{option}: for bundles that write text, which bundle doesn't" in capsys.readouterr().err


def test_the_gpus_that_a_replica_of_ray_reserves(tmp_path: Path) -> None:
    """Also where the bundle says by itself that it runs on one: without, Ray would hide them all."""
    bundles = {name: tmp_path / name for name in ("cpu", "cuda")}
    for name, folder in bundles.items():
        fill(folder)
        edit(folder / MANIFEST, target=name)

    def gpus(*names: str, provider: str | None = None, device_id: int | tuple[int, ...] = 0) -> float:
        return _gpus(Namespace(provider=provider, device_id=device_id), {name: bundles[name] for name in names})

    assert (gpus("cpu"), gpus("cuda"), gpus("cpu", "cuda"), gpus("cpu", provider="cuda")) == (0, 1, 1, 1)
    assert (gpus("cuda", provider="cpu"), gpus("cuda", device_id=(0, 1, 1))) == (0, 2)
