"""A bundle stops where another's turn begins, whatever the checkpoint's eos says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glm4export.sources.turns import TURN_TOKENS, with_turn_tokens
from glm4runtime import SamplingParams, load
from glm4runtime.contract import TokenIds, UserError, read_manifest
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.tokenizers import make_raw

IDS = {text: make_raw().token_to_id(text) for text in TURN_TOKENS}


def test_the_tokens_that_eos_lacks_are_added(tmp_path: Path) -> None:
    make_raw().save(str(tmp_path / "tokenizer.json"))
    end, user, observation = IDS.values()
    tokens, added = with_turn_tokens(TokenIds((end,), 0, None), tmp_path, 420)
    assert tokens == TokenIds((end, user, observation), 0, None)
    assert added == {"<|user|>": user, "<|observation|>": observation}
    assert with_turn_tokens(tokens, tmp_path, 420) == (tokens, {})
    assert with_turn_tokens(TokenIds((0,), None, None), tmp_path, user)[0].eos == (0, end)  # not beyond the logits


def test_without_a_tokenizer_eos_stays(tmp_path: Path) -> None:
    tokens = TokenIds((1,), None, None)
    assert with_turn_tokens(tokens, tmp_path, 420) == (tokens, {})
    for content, message in (
        ("{", "not a readable"),
        ("[]", "not a readable"),
        ("version https://git-lfs.github.com/spec/v1", "a git-lfs"),
    ):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UserError, match=rf"tokenizer\.json: {message}"):
            with_turn_tokens(tokens, tmp_path, 420)


def test_a_fine_tune_that_names_one_eos(
    build_bundle: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    end, user, observation = IDS.values()
    model = checkpoints.random_model(vocab_size=420, eos_token_id=end)
    checkpoints.save(model, tmp_path / "tuned")
    (tmp_path / "tuned" / "generation_config.json").unlink(missing_ok=True)
    make_raw().save(str(tmp_path / "tuned" / "tokenizer.json"))
    capsys.readouterr()
    bundle = build_bundle(tmp_path / "tuned", precision="fp32", target="cpu")
    assert capsys.readouterr().err == (
        f"glm4export: note: {tmp_path}/tuned: eos_token_id lacks <|user|> ({user}), <|observation|> ({observation}): "
        "others' turns, so the bundle stops on them too\n"
    )
    assert read_manifest(bundle).tokens.eos == (end, user, observation)
    assert json.loads((bundle / "genai_config.json").read_text())["model"]["eos_token_id"] == [end, user, observation]
    session = load(bundle)
    assert session.generate([5, 6, 7], SamplingParams(max_new_tokens=1))._stop == {end, user, observation}
