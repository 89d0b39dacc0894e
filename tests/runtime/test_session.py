"""What a session takes from its bundle when it's opened, other templates, and stops."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm4export.sources.checkpoint import locate
from glm4runtime import BundleError, SamplingParams, Session, UserError, load
from glm4runtime.contract import MANIFEST
from glm4runtime.text.chat import ChatTemplate
from tests.helpers.garbage import left_behind

PROMPTS: list[dict[str, Any]] = json.loads((locate(None).folder / "prompts.json").read_text(encoding="utf-8"))
PARAMS = SamplingParams(max_new_tokens=200)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def ask(session: Session, prompt: dict[str, Any], **options: Any) -> Any:
    return session.chat(prompt["messages"], PARAMS, tools=prompt.get("tools"), **options)


@pytest.fixture(scope="module")
def session(demo_sessions: dict[str, Session]) -> Session:
    return demo_sessions["fp32"]


@pytest.fixture
def bundle(demo_bundles: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_bundles["fp32"], tmp_path / "bundle"))


def listed_anew(bundle: Path, name: str, content: str) -> None:
    """Write a file into a bundle as if the checkpoint had had it so."""
    (bundle / name).write_text(content)
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"][name] = {"size": len(content), "sha256": "0" * 64}
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def test_text_belongs_to_the_bundle_that_was_opened(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle.parent)
    session = load("bundle")
    monkeypatch.chdir("/")
    shutil.move(bundle, bundle.parent / "moved")
    bundle.mkdir()  # another one in its place
    for name in ("tokenizer.json", "chat_template.jinja"):
        (bundle / name).write_text("{}")
    assert ask(session, PROMPTS[0]).read() == PROMPTS[0]["answer"]


def test_another_template(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}我{{ m.content }}{{ eos_token }}{% endfor %}", encoding="utf-8")
    for template in (file, file.read_text(encoding="utf-8")):
        session = load(bundle, chat_template=template)
        assert session.template.render([{"role": "user", "content": "好"}]) == "我好<|endoftext|>"
    with pytest.raises(UserError, match=r"chat_template: 'mine\.jinja' has no Jinja in it; give a file as a pathlib"):
        load(bundle, chat_template="mine.jinja")
    with pytest.raises(UserError, match=r"nowhere\.jinja: can't be read: "):
        load(bundle, chat_template=tmp_path / "nowhere.jinja")


def test_an_edited_template_says_how_to_use_another(bundle: Path) -> None:
    template = bundle / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    how = r"\. To chat with another template, leave it as it was: load\(\.\.\., chat_template=\.\.\.\), or gen"
    template.write_text(text + "{# mine #}", encoding="utf-8")
    with pytest.raises(
        BundleError, match=r"chat_template\.jinja: \d+ bytes, the manifest says \d+; copy or build.*" + how
    ):
        load(bundle)
    template.write_text(text.replace("user", "USER"), encoding="utf-8")
    with pytest.raises(BundleError, match="the file was changed" + how):
        load(bundle, check_hashes=True)


def test_a_template_that_is_broken_is_told_when_it_is_used(bundle: Path) -> None:
    listed_anew(bundle, "chat_template.jinja", "{% if %}")
    session = load(bundle)
    assert session.stream("hello", SamplingParams(max_new_tokens=1)).read() is not None
    with pytest.raises(UserError, match="chat template, line 1: Expected an expression"):
        ask(session, PROMPTS[0])


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "weights.bin"])
def test_git_lfs_pointers_are_named(name: str, bundle: Path) -> None:
    (bundle / name).write_text(POINTER)
    with pytest.raises(
        BundleError, match=rf"{name}: a git-lfs pointer, not the file; run `git lfs pull` in the folder"
    ):
        load(bundle)


def test_git_lfs_pointers_that_were_built_in(bundle: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja"):
        listed_anew(bundle, name, POINTER)
    session = load(bundle)
    with pytest.raises(BundleError, match=r"tokenizer\.json: a git-lfs pointer"):
        session.stream("hello")
    with pytest.raises(BundleError, match=r"chat_template\.jinja: a git-lfs pointer"):
        ask(session, PROMPTS[0])


def test_stop_strings(session: Session) -> None:
    answer = PROMPTS[0]["answer"]
    for stop in (answer[5:9], answer[-3:], answer[:1]):
        stream = ask(session, PROMPTS[0], stop=[stop, "nowhere in it"])
        assert stream.read() == answer[: answer.index(stop)]
        assert (stream.finish_reason, stream.stop_text) == ("stop", stop)
    stream = ask(session, PROMPTS[0], stop="nowhere in it")
    assert stream.read() == answer
    assert (stream.finish_reason, stream.stop_text) == ("stop", PROMPTS[0]["stop"])


def test_stop_tokens(session: Session) -> None:
    prompt = session.template.render(PROMPTS[0]["messages"])
    tokens = list(session.generate(prompt, PARAMS))
    third = tokens.index(tokens[2])
    generation = session.generate(prompt, PARAMS, stop=[tokens[2]])
    assert list(generation) == tokens[:third]
    assert (generation.finish_reason, generation.stop_token) == ("stop", tokens[2])
    assert list(session.generate(prompt, PARAMS, stop=["<|system|>"])) == tokens  # the bundle's own still stop it
    stream = session.stream(prompt, PARAMS, stop=tokens[2])
    assert stream.read() == session.tokenizer.decode(tokens[:third])
    assert stream.stop_text == session.tokenizer.decode([tokens[2]])
    with pytest.raises(
        UserError, match=r"stop: 'two words' is no special token; stop strings go with stream\(\) and chat"
    ):
        session.generate(prompt, PARAMS, stop="two words")
    with pytest.raises(
        UserError, match=r"stop: expected token ids in 0\.\.2047 or strings that aren't empty, found -1"
    ):
        session.generate(prompt, PARAMS, stop=-1)


def test_a_call_and_its_result_in_openais_form(session: Session) -> None:
    prompt = next(prompt for prompt in PROMPTS if prompt["stop"] == "<|observation|>")
    stream = ask(session, prompt)
    stream.read()
    (call,) = stream.tool_calls
    assert call.name == "get_weather" and call.arguments["city"] and stream.content == ""
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    turn = [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "a", "content": "晴"},
    ]
    text = session.template.render([*prompt["messages"], *turn], prompt["tools"])
    assert text.endswith(f"<|assistant|>\n{prompt['answer'].strip()}<|observation|>\n晴<|assistant|>\n")


# Closing


def test_closing_frees_everything_at_once(bundle: Path) -> None:
    """Though answers that are under way hold on to the session's parts, and without waiting for the collector."""
    gc.disable()
    try:
        with load(bundle) as session:
            stream, generation = ask(session, PROMPTS[0]), session.generate([5, 6, 7], PARAMS)
            rest = [weakref.ref(thing) for thing in (*session.runner.graphs.values(), session.runner.cache)]
            process = session.template._process._worker._process
            first = next(generation)
            assert process.poll() is None and all(ref() is not None for ref in rest)
        assert process.poll() is not None and all(ref() is None for ref in rest)
    finally:
        gc.enable()
    session.close()
    closed = "this session is closed; load the bundle again"
    for use in (
        lambda: session.generate([5, 6, 7]),
        lambda: ask(session, PROMPTS[0]),
        lambda: session.stream("hello"),
        lambda: next(generation),
        lambda: session.runner.prefill([5]),
        lambda: session.template,
        lambda: session.tokenizer,
        session.__enter__,
    ):
        with pytest.raises(UserError, match=closed):
            use()
    assert generation.completion_tokens == 1 and first in range(2048) and stream.text == ""


def test_a_step_graph_is_freed_too(tensorrt_bundles: Callable[[str], Path]) -> None:
    with pytest.raises(ZeroDivisionError), load(tensorrt_bundles("fp16"), provider="cpu") as session:
        rest = [weakref.ref(session.runner._step), weakref.ref(session.runner._cache)]
        1 / 0  # noqa: B018
    assert [ref() for ref in rest] == [None, None]
    with pytest.raises(UserError, match="this session is closed"):
        session.runner.decode(5)


def test_an_answer_that_has_ended_holds_no_memory(session: Session) -> None:
    params = SamplingParams(max_new_tokens=8, temperature=1.0, top_p=0.9, typical_p=0.9, repetition_penalty=1.1)

    def answer() -> None:
        session.chat(PROMPTS[0]["messages"], params, lookup=2).read()

    assert left_behind(answer) == set()


def test_a_template_that_was_closed_starts_no_process(session: Session) -> None:
    template = ChatTemplate(session.template.source)
    template.close()
    template.close()
    with pytest.raises(UserError, match="chat template: it was closed with its session; load the bundle again"):
        template.render([{"role": "user", "content": "hello"}])
