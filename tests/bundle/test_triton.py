"""A model's folder in a Triton repository: what is in it, what Triton's protobuf reads of it, what may be replaced."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelInstanceGroup

from glm4export import cli
from glm4export.bundle.triton import new_model
from glm4runtime import SamplingParams, load_encoder
from glm4runtime.contract import UserError
from glm4serve.deploy.triton.config import encoder_config, engine_config
from tests.conftest import Build
from tests.helpers.checkpoints import save
from tests.helpers.encoders import random_encoder
from tests.helpers.small_bundles import contents, fill, names


def parsed(text: str) -> Any:
    return text_format.Parse(text, ModelConfig())


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    fill(tmp_path / "my-bundle", "tokenizer.json")
    (tmp_path / "my-bundle" / "notes.txt").write_text("mine")
    return tmp_path / "my-bundle"


def test_a_language_model_s_config() -> None:
    config = parsed(engine_config("glm4", {"slots": 4, "prefix_cache": "off", "drain": 30}))
    assert (config.name, config.backend, config.max_batch_size) == ("glm4", "python", 0)
    assert config.model_transaction_policy.decoupled
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, ModelInstanceGroup.KIND_MODEL)
    assert {key: value.string_value for key, value in config.parameters.items()} == {
        "slots": "4",
        "prefix_cache": "off",
        "drain": "30",
    }
    inputs = {item.name: item for item in config.input}
    assert all(item.optional for item in config.input) and "parameters" not in inputs
    assert inputs.keys() >= {"text_input", "input_ids", "messages", "stream", *SamplingParams().__dict__}
    assert inputs["stop"].dims == [-1] and inputs["text_input"].dims == [1]
    assert inputs["temperature"].data_type == DataType.TYPE_FP64  # a float32 gives other answers for the same seed
    assert {item.name for item in config.output} >= {"text_output", "token_ids", "finish_reason"}


def test_a_classifier_s_folder_and_config(build_bundle: Build, tmp_path: Path) -> None:
    checkpoint = save(random_encoder("sequence-classification"), tmp_path / "checkpoint")
    built = build_bundle(checkpoint, target="cpu", precision="fp32")
    folder = new_model(built, tmp_path / "models", "judge", {}, slots=16)
    config = parsed((folder / "config.pbtxt").read_text())
    assert (config.backend, config.max_batch_size, config.default_model_filename) == ("onnxruntime", 16, "model.onnx")
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [
        ("input_ids", DataType.TYPE_INT64, [-1]),
        ("attention_mask", DataType.TYPE_INT64, [-1]),
    ]
    with load_encoder(folder / "1") as encoder:  # Triton finds graph and weights where we do
        labels = len(encoder.spec.labels)
    assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == [("logits", DataType.TYPE_FP32, [labels])]
    with pytest.raises(UserError, match=r"sequence-classification, which has no engine: leave out threads"):
        new_model(built, tmp_path / "models", "judge", {"threads": 2}, slots=16)
    with pytest.raises(UserError, match=r"sequence-classification, which has no engine: leave out adapters"):
        new_model(built, tmp_path / "models", "judge", {}, slots=16, adapters={"a": tmp_path / "a.safetensors"})
    assert encoder_config("judge", encoder.manifest, 16) == (folder / "config.pbtxt").read_text()


def test_the_folder_can_be_moved(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["triton", str(bundle), "-o", str(tmp_path / "models"), "--slots", "3", "--prefix-cache-mb", "5", "--json"]
    assert cli.main(argv) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "my-bundle"
    folder = tmp_path / "models" / "my-bundle"
    assert names(folder) == ["1", "config.pbtxt", "manifest.json"]
    assert names(folder / "1") == ["bundle", "model.py", "tensors.py"]
    bundle_files = contents(bundle)
    del bundle_files["notes.txt"]  # the user's own
    assert contents(folder / "1" / "bundle") == bundle_files
    settings = {
        key: value.string_value for key, value in parsed((folder / "config.pbtxt").read_text()).parameters.items()
    }
    assert settings == {"slots": "3", "prefix_cache_bytes": str(5 << 20), "drain": "30"}
    shutil.rmtree(bundle)
    assert contents(folder.rename(tmp_path / "moved") / "1" / "bundle") == bundle_files


def test_a_copy_where_there_are_no_hard_links(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    folder = new_model(bundle, tmp_path / "models", "glm4", {}, slots=8)
    assert (folder / "1" / "bundle" / "weights.bin").read_bytes() == (bundle / "weights.bin").read_bytes()


def test_a_link(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["triton", "my-bundle", "-o", "models", "--name", "glm4", "--link"]) == 0
    assert Path("models/glm4/1/bundle").readlink() == bundle
    assert cli.main(["triton", "my-bundle", "-o", "models", "--name", "glm4"]) == 0
    assert not Path("models/glm4/1/bundle").is_symlink() and (bundle / "notes.txt").exists()


def test_a_draft_and_adapters_go_with_the_folder(bundle: Path, tmp_path: Path) -> None:
    fill(tmp_path / "small", "tokenizer.json")
    files = {"polite": tmp_path / "polite.safetensors", "terse/er": tmp_path / "terse.safetensors"}
    for file in files.values():
        file.write_text(file.name)
    arguments = {"slots": 3, "adapters": files, "draft": tmp_path / "small"}
    folder = new_model(bundle, tmp_path / "models", "glm4", {}, **arguments)
    found = parsed((folder / "config.pbtxt").read_text()).parameters
    assert found["draft"].string_value == "draft"
    assert json.loads(found["adapters"].string_value) == {"polite": "adapters/0", "terse/er": "adapters/1"}
    assert contents(folder / "1" / "adapters") == {"0": b"polite.safetensors", "1": b"terse.safetensors"}
    assert contents(folder / "1" / "draft") == contents(tmp_path / "small")
    new_model(bundle, tmp_path / "models", "glm4", {}, **arguments, link=True)  # ours: it's replaced
    assert (folder / "1" / "draft").readlink() == tmp_path / "small"
    (folder / "1" / "adapters" / "0").write_text("mine")
    with pytest.raises(UserError, match=r"1/adapters/0 \(changed\)"):
        new_model(bundle, tmp_path / "models", "glm4", {}, slots=3)


def test_a_draft_of_another_family(bundle: Path, tmp_path: Path) -> None:
    fill(tmp_path / "small")
    manifest = tmp_path / "small" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"vocab_size": 8', '"vocab_size": 9'))
    with pytest.raises(UserError, match=r"small: a bundle for causal-lm with 9 tokens; expected causal-lm with 8"):
        new_model(bundle, tmp_path / "models", "glm4", {}, slots=3, draft=tmp_path / "small")
    assert not (tmp_path / "models").exists()


def test_what_is_ours_is_replaced_and_other_models_stay(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "models" / "other"
    other.mkdir(parents=True)
    (other / "config.pbtxt").write_text("somebody's")
    folder = new_model(bundle, tmp_path / "models", "glm4", {}, slots=8)
    (folder / "1" / "__pycache__").mkdir()
    (folder / "1" / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"")
    new_model(bundle, tmp_path / "models", "glm4", {}, slots=9)
    assert 'string_value: "9"' in (folder / "config.pbtxt").read_text()
    assert names(tmp_path / "models") == ["glm4", "other"] and contents(other) == {"config.pbtxt": b"somebody's"}


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.pbtxt", r"refusing to replace what is not as a build left it: config\.pbtxt \(changed\)"),
        ("1/model.py", r"1/model\.py \(changed\)"),
        ("2/model.onnx", r"2/model\.onnx"),
        ("1/bundle/notes.txt", r"1/bundle/notes\.txt"),
        ("1/bundle/manifest.json", r"1/bundle/"),
        ("manifest.json", r"no model that `glm4export triton` made"),
    ],
)
def test_what_is_not_ours_stays(
    bundle: Path, tmp_path: Path, file: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = new_model(bundle, tmp_path / "models", "glm4", {}, slots=8)
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).unlink(missing_ok=True)
    (folder / file).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        new_model(bundle, tmp_path / "models", "glm4", {}, slots=9)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--name", "../x"], "--name '../x': expected letters, digits"),
        (["--slots", "0"], "--slots 0: expected at least 1"),
        (["--drain", "-1"], "--drain -1: expected at least 0"),
        (["--name", ""], "--name '': expected letters"),
        (["--max-seq-len", "9"], "--max-seq-len 9: {bundle} was built for 8 positions"),
        (["--adapter", "polite=file"], "{bundle} has no side paths; build it with --lora-slots N"),
        (["--draft", "{bundle}/none"], "{bundle}/none: no such folder"),
        (["-o", "{bundle}"], "lies in the input"),
    ],
)
def test_refused(
    bundle: Path, tmp_path: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tmp_path)
    words = [word.format(bundle=bundle) for word in argv]
    assert cli.main(["triton", str(bundle), "-o", str(tmp_path / "models"), *words]) == 2
    assert message.format(bundle=bundle) in capsys.readouterr().err and contents(tmp_path) == before
