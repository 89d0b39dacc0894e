"""``glm4export generate``, and bundles that a command can't open."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from glm4export import cli
from glm4runtime import SamplingParams
from glm4runtime.contract import MANIFEST
from tests.commands.conftest import Fails
from tests.helpers.edits import drop, edit
from tests.helpers.processes import GLM4EXPORT, PREFIX
from tests.helpers.tokenizers import make_raw


def test_generate(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(built), "--prompt", "hello", "--max-new-tokens", "5"]
    assert cli.main(arguments) == 0
    plain = capsys.readouterr()
    assert cli.main([*arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts.keys() == {
        *("text", "finish_reason", "stop_text", "tool_calls", "prompt_tokens", "reused_tokens", "completion_tokens"),
        *("prefill_seconds", "decode_seconds", "lookup"),
    }
    assert plain.out == facts["text"] + "\n" and plain.err == ""
    assert (facts["finish_reason"] == "length") is (facts["completion_tokens"] == 5)
    assert facts["prompt_tokens"] == len(make_raw().encode("[gMASK]<sop><|user|>\nhello").ids)


def test_generate_with_sampling_options(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "max_new_tokens": 5,
        "min_new_tokens": 2,
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "typical_p": 0.8,
        "xtc_probability": 0.3,
        "xtc_threshold": 0.2,
        "repetition_penalty": 1.2,
        "presence_penalty": -0.5,
        "frequency_penalty": 0.4,
        "no_repeat_ngram_size": 4,
        "seed": 9,
    }
    found = []
    monkeypatch.setattr(
        "glm4export.commands.generate.answer", lambda session, prompt, params, **named: found.append(params)
    )
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    assert cli.main(["generate", str(built), "--prompt", "hello", *options]) == 0
    assert found == [SamplingParams(**given)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "hello " * 100], r"the prompt needs \d+ tokens, the cache holds 64; shorten it, or open"),
        (["--prompt", "hello", "--max-seq-len", "3"], r"the prompt needs \d tokens, the cache holds 3; shorten it"),
        (["--prompt", "x", "--max-seq-len", "65"], r"max_seq_len=65 is not in 1\.\.64, the positions .* was built for"),
        (["--prompt", "x", "--max-seq-len", "0"], r"max_seq_len=0 is not in 1\.\.64"),
        (["--prompt", "x", "--threads=-1"], r"threads=-1 must be at least 0"),
        (["--prompt", "x", "--temperature=-1"], r"temperature: expected a finite number >= 0, found -1\.0"),
        (["--prompt", "x", "--temperature", "nan"], r"temperature: expected a finite number >= 0, found nan"),
        (["--prompt", "x", "--top-p", "1.5"], r"top_p: expected a number from 0 to 1 \(1 turns it off\), found 1\.5"),
        (["--prompt", "x", "--top-k=-3"], r"top_k: expected an integer >= 0 \(0 turns it off\), found -3"),
        (["--prompt", "x", "--min-p", "2"], r"min_p: expected a number from 0 to 1 \(0 turns it off\), found 2\.0"),
        (["--prompt", "x", "--repetition-penalty", "0"], r"repetition_penalty: expected a finite number above 0"),
        (["--prompt", "x", "--presence-penalty", "3"], r"presence_penalty: expected a number from -2 to 2 .* 3\.0"),
        (["--prompt", "x", "--min-new-tokens", "300"], r"min_new_tokens: expected .* 0 to max_new_tokens=256"),
        (["--prompt", "x", "--seed=-3"], r"seed: expected an integer >= 0"),
        (["--prompt", "x", "--max-new-tokens", "0"], r"max_new_tokens: expected an integer >= 1, found 0"),
        (["--prompt", "x", "--provider", "cuda"], r"CUDAExecutionProvider is not in the installed onnx.*\[gpu\]"),
        (["--prompt", "", "--raw"], r"the prompt is empty; at least one token is needed"),
        (["--prompt", "x", "--raw", "--system", "s"], r"--system needs the chat template; leave out --raw"),
        (["--prompt", "x", "--raw", "--chat-template", "t"], r"--chat-template needs the chat template; leave out"),
        (["--prompt", "x", "--chat-template", "nowhere"], r"nowhere: can't be read: "),
        (["--prompt", "x", "--stop", ""], r"stop: expected token ids in 0\.\.419 or strings .*, found ''"),
    ],
)  # fmt: skip
def test_generate_with_arguments_that_do_not_fit(arguments: list[str], message: str, fails: Fails, built: Path) -> None:
    assert re.search(message, fails("generate", built, *arguments))


def test_generate_stops_before_a_string(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(built), "--prompt", "hello", "--max-new-tokens", "12"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out.removesuffix("\n")
    stop = text[2:4]
    assert cli.main([*arguments, "--stop", "nowhere", "--stop", stop]) == 0
    assert capsys.readouterr().out == text[: text.index(stop)] + "\n"
    assert cli.main([*arguments, "--stop", stop, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["text"], facts["finish_reason"], facts["stop_text"]) == (text[: text.index(stop)], "stop", stop)


def test_generate_with_another_template(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    arguments = ["generate", str(built), "--prompt", "hello", "--max-new-tokens", "2", "--json"]
    assert cli.main([*arguments, "--chat-template", str(tmp_path / "mine.jinja")]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == len(make_raw().encode("hello").ids)


def test_generate_without_tokenizer_or_template(fails: Fails, bundle: Path) -> None:
    drop(bundle, "chat_template.jinja")
    assert "no chat_template.jinja, and no" in fails("generate", bundle, "--prompt", "x")
    drop(bundle, "tokenizer.json")
    message = fails("generate", bundle, "--prompt", "x", "--raw")
    assert message.endswith(
        "tokenizer.json: missing; this bundle takes token ids only, build it from a checkpoint with one"
    )


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["verify"], ["inspect"]])
def test_bundles_that_are_none(command: list[str], fails: Fails, bundle: Path, tmp_path: Path) -> None:
    def message(folder: Path) -> str:
        return fails(command[0], folder, *command[1:])

    assert message(tmp_path / "nowhere").startswith(f"{tmp_path}/nowhere: no such folder")
    assert message(tmp_path) == f"{tmp_path}: not a bundle (no manifest.json); `glm4export build` makes one"
    with (bundle / "weights.bin").open("ab") as file:
        file.write(b"x")
    assert re.search(r"weights\.bin: \d+ bytes, the manifest says \d+; copy or build the bundle again", message(bundle))
    (bundle / "weights.bin").unlink()
    assert "weights.bin: missing; the manifest lists it." in message(bundle)
    edit(bundle / MANIFEST, format_version=3)
    assert "bundle format 3, this version reads format 2; upgrade glm4export" in message(bundle)
    (bundle / MANIFEST).write_text("{")
    assert "manifest.json: not valid JSON" in message(bundle)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ["generate", "--prompt", "x"],
            r"(prefill|decode)\.onnx: not a readable ONNX graph \(.+\); build the bundle again",
        ),
        (["verify"], r"prefill\.onnx: sha256 .*, the manifest says .*; the file was changed"),
        (["inspect"], r"prefill\.onnx: not a readable ONNX graph \(.*\); build the bundle again"),
        (["inspect", "--check-hashes"], r"prefill\.onnx: sha256 .*; the file was changed"),
    ],
)
def test_a_graph_of_the_right_size_and_wrong_bytes(
    command: list[str], message: str, fails: Fails, bundle: Path
) -> None:
    size = (bundle / "prefill.onnx").stat().st_size
    (bundle / "prefill.onnx").write_bytes(b"\xff" * size)
    assert re.search(message, fails(command[0], bundle, *command[1:]))


def test_a_prompt_from_standard_input(built: Path) -> None:
    command = [*GLM4EXPORT, "generate", str(built), "--prompt", "-", "--max-new-tokens", "2"]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, env=strict, input="你好".encode(), capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    done = subprocess.run(command, env=strict, input=b"ab\xff\xfe", capture_output=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.decode() == f"{PREFIX}standard input: not valid utf-8 at byte 2 of what was read\n"
