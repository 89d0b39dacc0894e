"""``glm4export batch``: files of requests, answered whole, in part, and gone on with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion

from glm4export import cli
from glm4export.commands import batch
from glm4runtime.contract import UserError
from glm4runtime.engine import EngineClosed
from glm4runtime.engine.request import Request
from glm4serve.batch import AnswersFile, Progress, answer_all, compare
from glm4serve.models import Models
from tests.commands.conftest import Fails
from tests.helpers.fake_engine import FakeEngine, words
from tests.helpers.processes import GLM4EXPORT
from tests.helpers.small_bundles import fill

IDENTITY = "0123456789ab"


def ask(text: str, custom_id: str, **body: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path: Path, *requests: Any) -> Path:
    """Requests as lines; text as it is."""
    lines = [request if isinstance(request, str) else json.dumps(request, ensure_ascii=False) for request in requests]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def echo(request: Request) -> Any:
    """The question, as the answer."""
    return words(str((request.messages or [{"content": request.prompt}])[-1]["content"]))


def go(requests: Path, out: Path, engine: FakeEngine, **options: Any) -> Progress:
    with AnswersFile(out, IDENTITY) as answers:
        compare(requests, answers)
        return answer_all(requests, answers, Models({"m": engine}, queue=0), **{"at_once": 2, **options})  # type: ignore[dict-item]


def contents(out: Path) -> list[str]:
    return [answer["response"]["body"]["choices"][0]["message"]["content"] for answer in read(out)]


def test_answers_are_openai_s_and_in_order(tmp_path: Path) -> None:
    texts = [f"{number} 你好 😀 \u2028 \x85" for number in range(40)]
    requests = write(tmp_path / "r", *(ask(text, f"id {text}") for text in texts))
    progress = go(requests, tmp_path / "a", FakeEngine(echo))
    answers = read(tmp_path / "a")  # splitlines() would part lines at U+2028 too
    assert contents(tmp_path / "a") == texts and [answer["custom_id"] for answer in answers] == [
        f"id {t}" for t in texts
    ]
    for answer in answers:
        assert answer.keys() == {"id", "custom_id", "response", "error"} and answer["error"] is None
        assert answer["response"]["status_code"] == 200
        ChatCompletion.model_validate(answer["response"]["body"], strict=True)
    assert (progress.answered, progress.failed, progress.completion_tokens) == (40, 0, 40)


def test_a_slow_request_holds_up_the_order_alone(tmp_path: Path) -> None:
    """Unordered, it comes last; and no more than at_once are ever computed."""
    most = 0

    def script(request: Request) -> Any:
        nonlocal most
        most = max(most, engine.running)
        if request.messages and request.messages[0]["content"] == "0":
            while len(engine.requests) < 12:
                time.sleep(0.01)
        return echo(request)

    requests = write(tmp_path / "r", *(ask(str(number), str(number)) for number in range(12)))
    for ordered in (True, False):
        engine, out = FakeEngine(script), tmp_path / f"a{ordered}"
        go(requests, out, engine, ordered=ordered)
        found = contents(out)
        assert sorted(found) == sorted(map(str, range(12))) and (found == list(map(str, range(12)))) is ordered
    assert most == 2


def test_a_bad_line_is_its_own_failure(tmp_path: Path) -> None:
    requests = write(
        tmp_path / "r",
        ask("a", "1"),
        "",
        "{",
        ask("b", "1"),
        {"custom_id": "2", "method": "GET", "url": "/v1/completions", "body": {}},
        ask("c", "3", temperature="hot"),
        ask("d", "4", model="gpt-5"),
        ask("e", "5", stream=True),
        {**ask("f", "6"), "url": "/v1/audio"},
        {**ask("g", "7"), "url": "/v1/embeddings", "body": {"input": "x"}},
        ask("word " * 600, "8"),
        ask("h", "9"),
    )
    progress = go(requests, tmp_path / "a", FakeEngine(echo))
    answers = read(tmp_path / "a")
    found = [
        (answer["custom_id"], answer["error"]["code"])
        if answer["response"] is None
        else (
            answer["custom_id"],
            answer["response"]["status_code"],
            answer["response"]["body"].get("error", {}).get("code"),
        )
        for answer in answers
    ]
    assert found == [
        ("1", 200, None),
        (None, "invalid_json"),
        ("1", "duplicate_custom_id"),
        ("2", "invalid_value"),
        ("3", 400, "invalid_value"),
        ("4", 404, "model_not_found"),
        ("5", 400, "invalid_value"),
        ("6", 404, "not_found"),
        ("7", 400, "wrong_model"),
        ("8", 400, "context_length_exceeded"),
        ("9", 200, None),
    ]
    assert (progress.answered, progress.failed) == (11, 9)


def test_a_line_of_many_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = write(tmp_path / "r", ask("a", "1", metadata={"x": "y" * (5 << 20)}), ask("b", "2"))
    go(requests, tmp_path / "a", FakeEngine(echo))
    assert contents(tmp_path / "a") == ["a", "b"]
    monkeypatch.setattr("glm4serve.batch.requests.MOST_BYTES", 1 << 20)
    go(requests, tmp_path / "b", FakeEngine(echo))
    first, second = read(tmp_path / "b")
    assert (first["error"]["code"], second["custom_id"]) == ("line_too_long", "2")
    assert go(requests, tmp_path / "b", FakeEngine(echo)).answered == 0  # it is known by its digest


def test_going_on(tmp_path: Path) -> None:
    """An engine that ends takes no answer with it; half a line is dropped; what is answered isn't asked again."""
    requests, out = write(tmp_path / "r", *(ask(str(number), str(number)) for number in range(9))), tmp_path / "a"

    def die(request: Request) -> Any:
        if len(engine.requests) > 4:
            engine.healthy = False
        return echo(request)

    engine = FakeEngine(die)
    with pytest.raises(EngineClosed):
        go(requests, out, engine)
    before = out.read_bytes()
    assert 1 <= len(read(out)) < 9
    out.write_bytes(before + b'{"id": "batch_req_')
    engine = FakeEngine(echo)
    assert go(requests, out, engine).answered == len(engine.requests) == 9 - len(before.splitlines())
    assert out.read_bytes().startswith(before) and contents(out) == list(map(str, range(9)))


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    out, engine = tmp_path / "a", FakeEngine(echo)
    lines = [ask("a", "1"), ask("b", "2"), ask("c", "3")]
    requests = write(tmp_path / "r", *lines)
    go(requests, out, engine)
    kept = out.read_bytes()
    for other, message in (
        (
            [lines[0], ask("x", "2"), lines[2]],
            r"a answers another request than .*r has on line 2: the file was changed",
        ),
        (lines[:2], r"a has 3 answers, and .*r only 2 of their requests: lines were taken out"),
    ):
        with pytest.raises(UserError, match=message):
            go(write(requests, *other), out, engine)
    assert go(write(requests, *lines, ask("d", "4")), out, engine).answered == 1  # a longer file goes on
    assert out.read_bytes().startswith(kept)
    with pytest.raises(UserError, match="a was made with another bundle, or another --name"):
        AnswersFile(out, "ba9876543210")
    for text in ("{}\n", "x\n", "\0\n", '{"id": "chatcmpl-1"}\n'):
        (tmp_path / "b").write_text(text)
        with pytest.raises(
            UserError, match="b, line 1: not an answer of `glm4export batch`; name another file with -o"
        ):
            AnswersFile(tmp_path / "b", IDENTITY)
        assert (tmp_path / "b").read_text() == text


def test_two_at_once(tmp_path: Path) -> None:
    with AnswersFile(tmp_path / "a", IDENTITY), pytest.raises(UserError, match="another run is writing it"):
        AnswersFile(tmp_path / "a", IDENTITY)


def test_a_disk_that_runs_full(tmp_path: Path, small_disk: Callable[[int], Path]) -> None:
    requests = write(tmp_path / "r", *(ask("x" * 300, str(number)) for number in range(60)))
    out = small_disk(16 << 10) / "a"
    with pytest.raises(
        UserError, match=r"a: cannot be written \(No space left on device\); it holds \d+ answers: make"
    ):
        go(requests, out, FakeEngine(echo))
    assert 0 < len(read(out)) < 60 and out.read_bytes().endswith(b"\n")


def test_an_empty_file(demo_bundles: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is loaded, and nothing failed."""
    requests, out = write(tmp_path / "r"), tmp_path / "a"
    assert cli.main(["batch", str(demo_bundles["fp32"]), str(requests), "-o", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["requests"] == 0 and out.read_bytes() == b""


def test_arguments_that_do_not_fit(demo_bundles: dict[str, Path], fails: Fails, tmp_path: Path) -> None:
    requests, bundle = write(tmp_path / "r", ask("a", "1")), demo_bundles["fp32"]
    assert fails("batch", bundle, tmp_path / "no", "-o", tmp_path / "a") == f"{tmp_path}/no: no such file"
    assert "holds the requests; name another file" in fails("batch", bundle, requests, "-o", requests)
    assert "exists and is not a regular file" in fails("batch", bundle, requests, "-o", "/dev/null")
    assert "cannot be written (Is a directory)" in fails("batch", bundle, requests, "-o", tmp_path)


@pytest.fixture(scope="module")
def france(demo_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[list[str], Path]]:
    """A command but for its -o, and what it writes when nothing ends it."""
    folder = tmp_path_factory.mktemp("batch")
    capitals = ("France", "Japan", "Kenya", "Peru", "Brazil")
    prompts = [{"prompt": f"capital {number}", "max_tokens": 40, "temperature": 0} for number in range(12)]
    lines = [ask(f"What is the capital of {name}?", name, max_tokens=16) for name in capitals]
    more = [
        {"custom_id": f"p{n}", "method": "POST", "url": "/v1/completions", "body": b} for n, b in enumerate(prompts)
    ]
    requests = write(folder / "requests.jsonl", *lines, *more)
    command = [
        "batch",
        str(demo_bundles["fp32"]),
        str(requests),
        "--slots",
        "2",
        "--max-seq-len",
        "128",
        "--threads",
        "1",
    ]
    assert cli.main([*command, "-o", str(folder / "whole.jsonl")]) == 0
    yield command, folder / "whole.jsonl"


def plain(answer: Any) -> Any:
    """Without what is another at each run."""
    body = {key: value for key, value in answer["response"]["body"].items() if key not in ("id", "created")}
    return answer["id"], answer["custom_id"], {**body, "usage": {**body["usage"], "prompt_tokens_details": None}}


def test_the_embedded_model(france: tuple[list[str], Path]) -> None:
    answers = read(france[1])
    assert answers[0]["response"]["body"]["choices"][0]["message"]["content"] == "The capital of France is Paris."
    for answer in answers[5:]:
        Completion.model_validate(answer["response"]["body"], strict=True)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_run_that_is_ended(number: int, status: int, france: tuple[list[str], Path], tmp_path: Path) -> None:
    """The same command then goes on, and answers are those of a run that nothing ended."""
    command, out = [*france[0], "-o", str(tmp_path / "answers.jsonl")], tmp_path / "answers.jsonl"
    process = subprocess.Popen([*GLM4EXPORT, *command], stderr=subprocess.PIPE, text=True)
    while not (out.exists() and out.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    before = out.read_bytes()
    if number == signal.SIGINT:
        assert re.search(r"answers.jsonl: \d+ of 17 answers; the same command goes on from there", errors)
    assert 3 <= before.count(b"\n") < 17
    assert cli.main(command) == 0
    assert out.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert list(map(plain, read(out))) == list(map(plain, read(france[1])))


def test_what_answers_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes a logit's last bits: a run with other options doesn't go on with these answers."""
    fill(tmp_path / "bundle")
    fill(tmp_path / "draft", producer="another")
    requests, found = write(tmp_path / "r", ask("a", "1")), dict[str, str]()

    def answer(arguments: Any, name: str, adapters: Any, answers: AnswersFile, left: Any) -> Progress:
        found[" ".join(options)] = answers.identity
        return Progress()

    monkeypatch.setattr(batch, "_answer", answer)
    draft = str(tmp_path / "draft")
    same = [[], ["--threads", "1"], ["--slots", "2"], ["--prefix-cache-mb", "1"], ["--provider", "cpu"]]
    other = [["--provider", "cuda"], ["--no-invariant"], ["--prefix-cache", "all"], ["--draft", draft]]
    for options in [*same, *other]:
        assert cli.main(["batch", str(tmp_path / "bundle"), str(requests), "-o", str(tmp_path / "a"), *options]) == 0
    assert len({found[" ".join(options)] for options in same}) == 1
    assert len(set(found.values())) == 1 + len(other)
