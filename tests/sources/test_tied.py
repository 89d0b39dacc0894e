"""A head that a tied config has beside its embedding: what is built is what transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Glm4ForCausalLM

from glm4export.build import build
from glm4export.calibration.streamed import Text, reference_logits
from glm4export.inspection.facts import inspect_model
from glm4export.sources import tied
from glm4export.sources.checkpoint import Checkpoint, Location
from glm4export.sources.config_json import read_config
from glm4export.verification.verify import Report, table, verify
from glm4export.weights.write import windows
from glm4runtime import load
from glm4runtime.contract import read_manifest
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.demo import DEMO
from tests.helpers.heldout import HELDOUT
from tests.helpers.parity import TOLERANCE, check_parity

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GEOMETRY: dict[str, Any] = {"tie_word_embeddings": True, "hidden_size": 128, "intermediate_size": 256}

Edit = Callable[[dict[str, Tensor]], None]


def save(folder: Path, edit: Edit) -> Path:
    """A tied checkpoint whose tensors ``edit`` has changed."""
    checkpoints.save_with_tokenizer(checkpoints.random_model(**GEOMETRY), folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def other_head(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = 0.15 * torch.randn(96, 128, generator=torch.Generator().manual_seed(1))


def last_value(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()
    tensors[HEAD][-1, -1] *= 1 + 1e-6


def rounded(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].bfloat16()


def the_same(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].clone()


def the_same_in_two_dtypes(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBEDDING].bfloat16()
    tensors[EMBEDDING] = tensors[HEAD].float()


def none(tensors: dict[str, Tensor]) -> None:
    assert HEAD not in tensors


def transformers_model(folder: Path) -> Glm4ForCausalLM:
    return Glm4ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def differing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied checkpoint with a head of its own."""
    return save(tmp_path_factory.mktemp("differing"), other_head)


@pytest.mark.parametrize("edit", [other_head, last_value, rounded, the_same, the_same_in_two_dtypes, none])
def test_tied_where_transformers_ties(edit: Edit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tied, "windows", partial(windows, elements=7 * 128))  # several, the last one short
    folder = save(tmp_path, edit)
    checkpoint, config = Checkpoint.open(folder), read_config(folder / "config.json")
    checkpoint.check(config)
    model = transformers_model(folder)
    assert config.tie_word_embeddings
    found = tied.as_stored(config, checkpoint)
    assert found.tie_word_embeddings is (model.lm_head.weight is model.model.embed_tokens.weight)
    tokens = [5, 6, 7, 8]
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0].numpy()
    (rows,) = reference_logits(config, checkpoint, [Text(tokens, first=0)])  # asks nobody
    assert np.abs(rows - wanted).max() <= TOLERANCE


def test_an_untied_head_is_never_compared(tmp_path: Path) -> None:
    folder = checkpoints.save(checkpoints.random_model(), tmp_path)
    config = read_config(folder / "config.json")
    assert tied.as_stored(config, Checkpoint(folder, {})) is config


def test_a_head_that_differs_is_the_head(
    differing: Path, build_bundle: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    capfd.readouterr()  # transformers' own
    bundle = build_bundle(differing, precision="fp32", target="cpu")
    assert capfd.readouterr().err == (
        f"glm4export: note: {differing / 'config.json'} says tie_word_embeddings, but the stored lm_head.weight "
        "differs from the embedding: the stored head is used, as transformers does\n"
    )
    check_parity(load(bundle), transformers_model(differing), [5, 6, 7, 8, 9, 10, 11])
    assert read_manifest(bundle).config["tie_word_embeddings"] is False
    assert (bundle / "config.json").read_bytes() == (differing / "config.json").read_bytes()
    report = verify(load(bundle), checkpoint=str(differing), steps=4)
    assert not report.failures, table(report)


def test_an_equal_head_changes_nothing(build_bundle: Build, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folders = [save(tmp_path / edit.__name__, edit) for edit in (the_same, none)]
    capfd.readouterr()  # transformers' own
    bundles = [build_bundle(folder, precision="fp32", target="cpu") for folder in folders]
    assert capfd.readouterr().err == ""
    manifests = [read_manifest(bundle) for bundle in bundles]
    assert [manifest.config["tie_word_embeddings"] for manifest in manifests] == [True, True]
    assert manifests[0].files == manifests[1].files


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint, whose head is its own, with a config that ties it."""
    folder = tmp_path_factory.mktemp("embedded") / "checkpoint"
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return folder


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp16"},
        {"precision": "int4"},
        {"precision": "int4", "block_size": 32, "head_bits": 4, "embedding_bits": 4, "calibrate": HELDOUT},
        {"precision": "fp32", "kv_cache": "int8", "calibrate": HELDOUT},
    ],
    ids=["fp16", "int4", "int4, calibrated, in a head of 4 bits", "int8 cache"],
)
def test_every_kind_of_build_uses_it_and_verify_tells_where_one_does_not(
    options: dict[str, Any], embedded: Path, build_bundle: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compared() -> Report:
        session = load(build_bundle(embedded, **options, target="cpu"))
        return verify(session, checkpoint=str(embedded), steps=4)

    right = compared()
    assert not right.failures, table(right)
    monkeypatch.setattr(build, "as_stored", lambda config, checkpoint: config)  # tied, as the config says
    wrong = compared()
    assert [phase.name for phase in wrong.phases if phase.mean_kl < 1] == []
    assert {failure.split(":")[0] for failure in wrong.failures} >= {phase.name for phase in right.phases}


def test_inspect_counts_it(differing: Path, tmp_path: Path) -> None:
    def parameters(folder: Path) -> int:
        found: int = inspect_model(Location(folder, {}), "cpu")["parameters"]
        return found

    both = transformers_model(differing).num_parameters()
    assert parameters(differing) == both
    assert parameters(save(tmp_path / "equal", the_same)) == both - 96 * 128
    (tmp_path / "equal" / "model.safetensors").unlink()
    assert parameters(tmp_path / "equal") == both - 96 * 128  # by its config alone
