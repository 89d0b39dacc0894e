"""``--rope-scaling yarn``: the model that config.json would ask for, or a refusal."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm4export import cli
from glm4runtime import load
from tests.helpers import checkpoints
from tests.helpers.configs import config_of
from tests.helpers.parity import check_parity

DEFAULT = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
YARN_4 = ["--rope-scaling", "yarn", "--rope-factor", "4"]


def test_yarn_by_option_is_the_model_that_config_json_would_ask_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = checkpoints.random_model()
    folder, out = checkpoints.save_with_tokenizer(model, tmp_path / "checkpoint"), tmp_path / "bundle"
    options = ["--precision", "fp32", "--target", "cpu", *YARN_4]
    assert cli.main(["build", str(folder), "-o", str(out), *options]) == 0
    assert "256 positions" in capsys.readouterr().out
    rope = {**DEFAULT, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    asked = checkpoints.random_model(rope_parameters=rope)
    asked.load_state_dict(model.state_dict())
    assert json.loads((out / "config.json").read_text())["rope_parameters"] == rope
    check_parity(load(out), asked, np.random.default_rng(0).integers(0, 96, 60).tolist())  # 92 positions
    assert cli.main(["verify", str(out), "--checkpoint", str(folder), "--steps", "4", "--long"]) == 0


@pytest.mark.parametrize(
    ("options", "rope", "message"),
    [
        (["--rope-scaling", "yarn"], {}, "--rope-scaling yarn and --rope-factor F go together; give both or neither"),
        (["--rope-factor", "4"], {}, "--rope-scaling yarn and --rope-factor F go together; give both or neither"),
        ([*YARN_4[:-1], "1"], {}, "--rope-factor 1.0 must be a number above 1: how far the positions are stretched"),
        ([*YARN_4[:-1], "nan"], {}, "--rope-factor nan must be a number above 1"),
        (
            YARN_4,
            LINEAR,
            "rope_type='linear' is its own scaling already; leave --rope-scaling out, or give a chec",
        ),
        (YARN_4, YARN, "rope_type='yarn' is its own scaling already"),
        ([*YARN_4[:-1], "1e6"], {}, "factor=1000000.0 times original_max_position_embeddings=64 is more than 16777216"),
        ([*YARN_4, "--max-seq-len", "257"], {}, "257 is not in 1..256, the model's positions as rope_type='yarn' stre"),
    ],
)
def test_yarn_by_option_refused(
    options: list[str], rope: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    data = config_of(rope_parameters={**DEFAULT, **rope})
    (folder / "config.json").write_text(json.dumps(data))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")  # without tensors
    argv = ["build", str(folder), "-o", str(tmp_path / "out"), "--target", "cpu", *options]
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
