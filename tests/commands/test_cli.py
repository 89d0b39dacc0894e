"""The command line: each mistake is one clear line and exit status 2, never a traceback."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm4export import cli
from glm4export.sources.turns import TURN_TOKENS
from glm4runtime.contract import MANIFEST
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.processes import PREFIX, WITHOUT, python
from tests.helpers.sidefiles import PANIC, POINTER
from tests.helpers.tokenizers import make_raw

TEMPLATE = "[gMASK]<sop>{% for m in messages %}<|user|>\n{{ m.content }}{% endfor %}"
EOS = [make_raw().token_to_id(text) for text in TURN_TOKENS]
Fails = Callable[..., str]
GLM4EXPORT = [sys.executable, "-m", "glm4export"]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must fail; returns its message, without the prefix."""

    def run(*argv: object, lines: int = 1) -> str:
        assert cli.main([str(argument) for argument in argv]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(PREFIX) and captured.err.count("\n") == lines, captured.err
        return captured.err.removeprefix(PREFIX).rstrip("\n")

    return run


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with a tokenizer and a template."""
    folder = tmp_path_factory.mktemp("cli") / "checkpoint"
    checkpoints.save(checkpoints.random_model(vocab_size=420, eos_token_id=EOS), folder)
    make_raw().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def built(build_bundle: Build, source: Path) -> Path:
    return build_bundle(source, precision="fp32", target="cpu")


@pytest.fixture
def mine(source: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint that the test may damage."""
    return Path(shutil.copytree(source, tmp_path / "mine"))


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that the test may damage."""
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None drops one."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


# build


def test_build_without_a_checkpoint(fails: Fails, tmp_path: Path) -> None:
    message = fails("build", tmp_path / "nowhere", "-o", tmp_path / "out")
    assert message == f"{tmp_path}/nowhere: no such folder, and not a hub id such as zai-org/GLM-4-9B-0414"
    (tmp_path / "empty").mkdir()
    message = fails("build", tmp_path / "empty", "-o", tmp_path / "out")
    assert message.startswith(f"{tmp_path}/empty/config.json: no such file; a checkpoint folder in Hugging Face layout")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, r"architectures=\['LlamaForCausalLM'\] is not supported; supported:"),
        ({"hidden_act": "xielu"}, r"hidden_act='xielu' is not supported; supported: gelu, .*silu"),
        ({"rope_parameters": None}, r"partial_rotary_factor is given neither at the top level nor in rope_parameters"),
        ({"vocab_size": "x"}, r"vocab_size='x' must be a int"),
        ({"eos_token_id": [], "pad_token_id": 420}, r"pad_token_id=420 is not a token id below vocab_size=420"),
    ],
)  # fmt: skip
def test_build_of_a_config_that_is_refused(
    changes: dict[str, Any], message: str, fails: Fails, mine: Path, tmp_path: Path
) -> None:
    edit(mine / "config.json", **changes)
    (mine / "generation_config.json").write_text('{"eos_token_id": [0, 3]}')
    assert re.search(message, fails("build", mine, "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_build_of_damaged_weights(fails: Fails, mine: Path, tmp_path: Path) -> None:
    file = mine / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "extra": torch.zeros(1), "model.norm.weight": torch.zeros(3)}, file)
    message = fails("build", mine, "-o", tmp_path / "out", lines=3).splitlines()
    assert message[0] == f"{mine}: 2 tensors do not match config.json; is it this model's config?"
    assert message[1:] == ["  unexpected extra [1]", "  mis-shaped model.norm.weight: [3], expected [64]"]
    os.truncate(file, 1000)
    assert "model.safetensors: damaged or truncated" in fails("build", mine, "-o", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_names_and_values_with_escape_codes_are_shown_without(fails: Fails, mine: Path, tmp_path: Path) -> None:
    file = mine / "model.safetensors"
    save_file({**load_file(file), "\x1b]0;owned\x07": torch.zeros(1)}, file)
    message = fails("build", mine, "-o", tmp_path / "out", lines=2)
    assert message.splitlines()[1] == r"  unexpected \x1b]0;owned\x07 [1]"
    edit(mine / "config.json", hidden_act="\x1b[2J")
    assert r"config.json: hidden_act='\x1b[2J' is not supported" in fails("build", mine, "-o", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize("command", [["build"], ["inspect"]])
def test_a_lora_folder_is_no_model(command: list[str], fails: Fails, mine: Path) -> None:
    (mine / "config.json").rename(mine / "adapter_config.json")
    message = fails(*command, mine)
    why = "not a model; build the model that it was made for, with `--lora"
    assert message.startswith(f"{mine}: a LoRA adapter (adapter_config.json), {why} {mine}`")


def test_build_of_a_tokenizer_that_panics(fails: Fails, mine: Path, tmp_path: Path) -> None:
    edit(mine / "tokenizer.json", normalizer=PANIC)
    assert fails("build", mine, "-o", tmp_path / "out").startswith(f"{mine}/tokenizer.json: ")
    (mine / "tokenizer.json").write_text(POINTER)
    assert "tokenizer.json: a git-lfs pointer, not the file" in fails("build", mine, "-o", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def test_a_checkpoint_without_a_tokenizer_is_told(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mine / "tokenizer.json").unlink()
    out = tmp_path / "out"
    assert cli.main(["build", str(mine), "-o", str(out), "--target", "cpu", "--precision", "fp32"]) == 0
    told = f"glm4export: note: {mine}: no tokenizer.json; the bundle takes and gives token ids, not text\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(
    ("changes", "lines", "message"),
    [
        ({"num_hidden_layers": 2**31}, 1, "num_hidden_layers=2147483648 must be at most 2147483647"),
        ({"num_hidden_layers": 2**30}, 23, "13958643686 tensors do not match config.json"),
        ({"hidden_size": 2**60}, 1, "hidden_size=1152921504606846976 must be at most 2147483647"),
        ({"hidden_size": 2**30}, 22, "mis-shaped lm_head.weight: [420, 64], expected [420, 1073741824]"),
        ({"max_position_embeddings": 10**8}, 1, "max_position_embeddings=100000000 must be at most 16777216"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_made(
    changes: dict[str, Any],
    lines: int,
    message: str,
    fails: Fails,
    mine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_: pytest.fail("a module is made"))
    edit(mine / "config.json", **changes)
    assert message in fails("build", mine, "-o", tmp_path / "out", lines=lines)


def test_inspect_of_absurd_sizes_is_arithmetic(mine: Path, fails: Fails, capsys: pytest.CaptureFixture[str]) -> None:
    most = 2**31 - 1
    edit(mine / "config.json", num_hidden_layers=most, intermediate_size=2**30, max_position_embeddings=2**24)
    assert cli.main(["inspect", str(mine), "--target", "tensorrt", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == most * (64 * 3 * 2**30 + 2 * 64 * 128 + 2 * 64 * 64 + 256 + 4 * 64) + 420 * 128 + 64
    assert cli.main(["inspect", str(mine), "--target", "cpu"]) == 0
    assert "no" in capsys.readouterr().out
    edit(mine / "config.json", hidden_size=2**60)
    assert "hidden_size=1152921504606846976 must be at most" in fails("inspect", mine)


def test_build_of_weights_that_are_not_finite(fails: Fails, mine: Path, tmp_path: Path) -> None:
    tensors = load_file(mine / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"] * 1e6}, mine / "model.safetensors")
    message = fails("build", mine, "-o", tmp_path / "out", "--target", "cpu")
    assert message.startswith("lm_head.weight: a value is not finite in float16;")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("{tmp}/theirs/file", "exists and is not a folder; choose another name with -o"),
        ("{tmp}/theirs", "exists and is not a bundle (no manifest.json); refusing to replace it"),
        ("{tmp}/theirs/file/out", "cannot be written"),
        ("{tmp}/mine", "is the input {tmp}/mine itself; the output must lie apart from it, choose another folder"),
        ("/proc/out", "cannot be written"),
    ],
)
def test_build_into_a_place_that_cannot_be_written(
    out: str, message: str, fails: Fails, mine: Path, tmp_path: Path
) -> None:
    path = out.format(tmp=tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    found = fails("build", mine, "-o", path, "--precision", "fp32", "--target", "cpu")
    assert found.startswith(f"{path}: {message.format(tmp=tmp_path)}")
    assert sorted(tmp_path.rglob("*")) == before


def test_build_on_a_full_disk(fails: Fails, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    message = fails("build", source, "-o", tmp_path / "out", "--precision", "fp32", "--target", "cpu")
    assert re.search(r"the bundle needs 0\.00 GB, the disk has 0\.00 GB free; free some space", message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [0, -1, 65])
def test_build_beyond_the_models_positions(length: int, fails: Fails, source: Path, tmp_path: Path) -> None:
    message = fails("build", source, "-o", tmp_path / "out", f"--max-seq-len={length}")
    assert message.startswith(
        f"--max-seq-len {length} is not in 1..64, the model's positions; for longer texts GLM-4's"
    )


def test_build_with_the_attention_plugin_for_another_target(fails: Fails, source: Path, tmp_path: Path) -> None:
    message = fails("build", source, "-o", tmp_path / "out", "--target", "cpu", "--attention", "plugin")
    assert message.startswith(
        "--attention plugin goes with --target tensorrt and --precision fp16, bf16, int8, int4, not"
    )


def test_build_prints_what_it_made(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build", str(source), "--precision", "fp32", "--target", "cpu", "--max-seq-len", "40"]
    assert cli.main([*arguments, "-o", str(tmp_path / "a"), "--json"]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    size = sum(path.stat().st_size for path in (tmp_path / "a").iterdir() if path.name != MANIFEST)
    out = str(tmp_path / "a")
    assert facts == {
        "bundle": out,
        "target": "cpu",
        "precision": "fp32",
        "bytes": size,
        "max_seq_len": 40,
        "cache_dtype": "float32",
    }
    assert captured.err == ""


# generate


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


def test_chat(built: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nand you?\n"))
    assert cli.main(["generate", str(built), "--chat", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.count("\n") >= 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals_are_exceptions_in_a_chat_alone(
    number: int, code: int, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C ends an answer there, and readline puts the terminal right. Elsewhere this process would end."""
    monkeypatch.setattr("glm4export.commands.generate.converse", lambda *given, **named: os.kill(os.getpid(), number))
    try:
        found = cli.main(["generate", str(built), "--chat"])
    except SystemExit as error:
        found = error.code
    assert found == code


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
        (["--prompt", "x", "--seed=-3"], r"seed: expected an integer >= 0"),
        (["--prompt", "x", "--max-new-tokens", "0"], r"max_new_tokens: expected an integer >= 1, found 0"),
        (["--prompt", "x", "--provider", "cuda"], r"CUDAExecutionProvider is not in the installed onnx.*\[gpu\]"),
        (["--prompt", "", "--raw"], r"the prompt is empty; at least one token is needed"),
        (["--prompt", "x", "--raw", "--system", "s"], r"--system needs the chat template; leave out --raw"),
        (["--prompt", "x", "--raw", "--chat-template", "t"], r"--chat-template needs the chat template; leave out"),
        (["--prompt", "x", "--chat-template", "nowhere"], r"nowhere: can't be read: "),
        (["--prompt", "x", "--stop", ""], r"stop: expected token ids in 0\.\.419 or strings .*, found ''"),
        (["--chat", "--json"], r"--json and --raw go with --prompt, not with --chat"),
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


def drop(bundle: Path, name: str) -> None:
    """Take a file out of a bundle and its manifest, as if the checkpoint hadn't had it."""
    (bundle / name).unlink()
    files = json.loads((bundle / MANIFEST).read_text())["files"]
    edit(bundle / MANIFEST, files={key: value for key, value in files.items() if key != name})


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


# verify and inspect


def test_verify(built: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", str(built), "--checkpoint", str(source), "--steps", "3", "--prompt", "hello world"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.endswith("\npassed\n")
    assert cli.main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["precision"] == "fp32" and report["target"] == "cpu" and report["failures"] == []
    assert [phase["name"] for phase in report["phases"]] == ["prefill", "decode", "continuation", "chat", "chunks"]
    assert [phase["positions"] for phase in report["phases"]] == [1, 3, 1, 4, 2 + 16]
    for phase in report["phases"]:
        assert 0 <= phase["mean_abs"] <= phase["max_abs"] < 1e-4 and phase["mean_kl"] < 1e-6 and phase["top1"] == 1
    assert report["greedy"] == [{"prompt": "hello world", "tokens": 3, "parts_at": None}]
    assert report["left_out"] == ["long: the last rows of the cache are compared with --long"]
    assert report["cache_clipped"] is None
    assert cli.main([*arguments, "--long", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["phases"][-1]["name"], report["phases"][-1]["positions"], report["left_out"]) == ("long", 4 + 16, [])


@pytest.mark.parametrize(
    ("threshold", "found", "count"),
    [
        (["--max-kl=-1"], "prefill: mean KL .* exceeds", 5),
        (["--max-kl", "nan"], "prefill: mean KL .* exceeds", 5),
        (["--min-top1", "1.01"], r"top-1 agreement 100\.00% over \d+ positions is below 101\.0%", 1),
    ],
)
def test_verify_past_its_thresholds(
    threshold: list[str], found: str, count: int, built: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "verify",
        str(built),
        "--checkpoint",
        str(source),
        "--steps",
        "1",
        "--prompt",
        "hello world",
        *threshold,
    ]
    assert cli.main(arguments) == 1
    ending = "1 check" if count == 1 else f"{count} checks"
    assert re.search(rf"FAILED: {found}.*\n(.*\n)*{ending} failed\n$", capsys.readouterr().out)
    assert cli.main([*arguments, "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["failures"]) == count


@pytest.mark.parametrize(
    ("arguments", "phases"),
    [
        (["--steps", "0", "--prompt", "hello world"], ["prefill", "continuation", "chat", "chunks"]),
        (["--steps", "2", "--prompt", "h"], ["prefill", "decode", "chat", "chunks"]),  # one token can't be cut in two
        (["--prompt", "hello " * 100], ["prefill", "continuation", "chat", "chunks"]),  # fills the cache
    ],
)
def test_verify_leaves_out_phases_without_a_position(
    arguments: list[str], phases: list[str], built: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(built), "--checkpoint", str(source), "--json", *arguments]) == 0
    assert [phase["name"] for phase in json.loads(capsys.readouterr().out)["phases"]] == phases


@pytest.mark.parametrize("length", ["1", "5"])
def test_verify_without_a_tokenizer(
    length: str, bundle: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drop(bundle, "tokenizer.json")
    assert cli.main(["verify", str(bundle), "--checkpoint", str(source), "--max-seq-len", length, "--json"]) == 0
    prompts = [greedy["prompt"] for greedy in json.loads(capsys.readouterr().out)["greedy"]]
    assert prompts == [f"{count} random tokens" for count in (1, 5) if count <= int(length)]


def test_verify_needs_the_right_checkpoint(fails: Fails, built: Path, source: Path, mine: Path) -> None:
    assert fails("verify", built) == "the bundle was built from a local folder; name it with --checkpoint FOLDER"
    assert "nowhere: no such folder" in fails("verify", built, "--checkpoint", "/nowhere")
    edit(mine / "config.json", rms_norm_eps=1e-6)
    message = fails("verify", built, "--checkpoint", mine)
    assert message == f"{mine}: not the checkpoint that this bundle was built from (config or tensors differ)"
    assert fails("verify", built, "--checkpoint", source, "--steps=-1") == "steps=-1 must be at least 0"
    assert fails("verify", built, "--checkpoint", source, "--prompt", "").startswith("the prompt is empty")


def test_inspect(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(built), "--check-hashes", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    manifest = json.loads((built / MANIFEST).read_text())
    assert facts["files"] == manifest["files"] and facts["config"] == manifest["config"]
    assert (facts["target"], facts["precision"], facts["eos_token_ids"]) == ("cpu", "fp32", EOS)
    per_token = 2 * 2 * 2 * 32 * 4
    assert facts["cache"] == {
        "dtype": "float32",
        "max_seq_len": 64,
        "bytes_per_token": per_token,
        "bytes_at_full_length": 64 * per_token,
    }
    for graph in facts["graphs"].values():
        assert graph["nodes"]["GroupQueryAttention"] == 2
        assert 0 < graph["weight_bytes"] <= facts["files"]["weights.bin"]["size"]
    assert cli.main(["inspect", str(built)]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{built}: glm4 causal-lm, fp32, for cpu\n")
    assert "2 layers, hidden 64, 4 heads, 2 kv heads of 32, vocabulary 420" in text
    assert (
        "float32, 1.0 KB a token, 65.5 KB at 64 tokens" in text and f"stops on   {', '.join(map(str, EOS))}\n" in text
    )
    for name in facts["files"]:
        assert f"  {name}" in text


# argparse, and what only a process of its own can show


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], r"the following arguments are required: COMMAND"),
        (["compile"], r"argument COMMAND: invalid choice: 'compile'"),
        (["build", "--precision", "int3"], r"argument --precision: invalid choice: 'int3'"),
        (["build", "--target", "tpu"], r"argument --target: invalid choice: 'tpu'"),
        (["build", "--max-seq-len", "many"], r"argument --max-seq-len: invalid int value: 'many'"),
        (["generate", "b"], r"one of the arguments --prompt --chat is required"),
        (["generate", "b", "--chat", "--prompt", "x"], r"argument --prompt: not allowed with argument --chat"),
        (["verify"], r"the following arguments are required: BUNDLE"),
        (["inspect", "a", "b"], r"unrecognized arguments: b"),
    ],
)
def test_argparse_errors(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert re.search(rf"glm4export.*: error: {message}", capsys.readouterr().err)


HELP = """
import io, sys, time
start = time.process_time()
from contextlib import redirect_stdout
from glm4export.cli import main
texts = {}
for command in ([], ["build"], ["generate"], ["verify"], ["inspect"], ["prepare"], ["bench"]):
    with redirect_stdout(io.StringIO()) as text:
        try:
            main([*command, "--help"])
        except SystemExit as error:
            assert error.code == 0
    texts[" ".join(command)] = text.getvalue()
heavy = {"torch", "onnx", "onnxruntime", "numpy", "tokenizers", "jinja2", "transformers", "huggingface_hub"}
import json
print(json.dumps({"texts": texts, "heavy": sorted(heavy & set(sys.modules)), "seconds": time.process_time() - start}))
"""


def test_help_is_instant_and_shows_an_example() -> None:
    done = python(HELP)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["heavy"] == [] and found["seconds"] < 0.5
    for command, text in found["texts"].items():
        assert re.search(rf"example: +glm4export +{command}", text), text


@pytest.mark.parametrize("argv", [["--help"], ["inspect", "{built}"]])
def test_a_reader_that_goes_away(argv: list[str], built: Path) -> None:
    """As ``| head`` does: no traceback, and no complaint at exit."""
    read, write = os.pipe()
    os.close(read)
    command = [*GLM4EXPORT, *(argument.format(built=built) for argument in argv)]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, env=buffered, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert done.stderr == "" and done.returncode == 1


def test_no_standard_output_at_all(built: Path) -> None:
    command = ["sh", "-c", '"$@" >&-', "sh", *GLM4EXPORT, "inspect", str(built)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("blocked", "command", "extra"),
    [
        ("torch", ["build", "{source}"], "compile"),
        ("onnxscript", ["build", "{source}"], "compile"),
        ("onnxruntime", ["generate", "{built}", "--prompt", "x"], "cpu"),
        ("torch", ["verify", "{built}"], "compile"),
        ("onnx", ["inspect", "{built}"], "compile"),
    ],
)
def test_a_missing_extra_is_named(blocked: str, command: list[str], extra: str, built: Path, source: Path) -> None:
    argv = [argument.format(built=built, source=source) for argument in command]
    done = python(WITHOUT, blocked, *argv)
    assert done.returncode == 2, done.stderr
    install = f"pip install '.[{extra}]' in a clone of glm4export's repository"
    assert done.stderr == f"{PREFIX}{blocked} is not installed; {install}\n"


def test_building_needs_no_onnxruntime(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = python(WITHOUT, "onnxruntime", "build", source, "-o", out, "--precision", "fp32")
    assert (done.returncode, done.stderr) == (0, "")
    assert (out / MANIFEST).is_file()


def test_a_prompt_from_standard_input(built: Path) -> None:
    command = [*GLM4EXPORT, "generate", str(built), "--prompt", "-", "--max-new-tokens", "2"]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, env=strict, input="你好".encode(), capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
    done = subprocess.run(command, env=strict, input=b"ab\xff\xfe", capture_output=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.decode() == f"{PREFIX}standard input: not valid utf-8 at byte 2 of what was read\n"


def test_a_full_disk_behind_standard_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "glm4export", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("glm4export: error: ") and "No space left on device" in done.stderr


def test_inspect_tells_what_a_model_will_take(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(source), "--target", "cpu", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
    assert facts["precisions"].keys() == {"fp32", "fp16", "int8", "int4"}  # no bf16 on a CPU
    assert facts["precisions"]["fp32"]["longest_sequence_here"] == facts["max_positions"] == 64


@pytest.mark.parametrize("target", ["cpu", "cuda", "tensorrt"])
def test_inspect_shows_a_model_for_every_target(target: str, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(source), "--target", target]) == 0
    shown = capsys.readouterr().out
    assert f"for {target}, on this machine" in shown and "fits here" in shown
    assert ("with --kv-cache int8" in shown) is (target != "tensorrt")
