"""Our model in the real Triton Inference Server: is it answered there as by the engine, whatever clients do?

    python tools/triton_check.py --folder triton-check

Takes the server out of the package nvidia-pytriton (55 MB; no GPU needed, glibc 2.35), gives it a virtual environment
in the folder, builds the embedded model, and asks it by tritonclient's gRPC streams and by HTTP: one by one, many at
once, cancelled, left, malformed, while it is unloaded and while the server ends. Prints a table; exit status 1 where
something is not as it should be. Needs the extras compile, cpu, structured and triton.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from triton_server.client import Answer, Stream, generate
from triton_server.server import Installed, Server, install, running
from tritonclient.utils import InferenceServerException

from glm4export import cli
from glm4runtime import Engine, Request, SamplingParams
from glm4runtime.text.grammar import Structure, tool_structure

MODEL = "glm4"
SIZES = {"slots": 8, "max_seq_len": 512}
Row = tuple[str, str, bool]
Case = tuple[dict[str, Any], Request]

CAPITALS = ("France", "Italy", "Spain", "Japan", "China", "Germany", "Greece", "Egypt")
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "found": {"type": "boolean"}},
    "required": ["city", "found"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": SCHEMA}}]


def cases(rng: random.Random) -> list[Case]:
    """Inputs and the request that they mean: greedy and seeded, chats, prompts, ids, every kind of input."""
    made: list[Case] = []
    for i, country in enumerate(CAPITALS):
        messages = [{"role": "user", "content": f"What is the capital of {country}?"}]
        sampled = {"temperature": 0.8, "top_p": 0.9, "seed": rng.randrange(1 << 40)} if i % 2 else {}
        params = {"max_new_tokens": rng.randrange(5, 60), **sampled}
        made.append(
            (
                {"messages": json.dumps(messages), "logprobs": 2, **params},
                Request(messages=messages, params=SamplingParams(**params), logprobs=2),
            )
        )
    ids = [rng.randrange(300, 2000) for _ in range(rng.randrange(2, 90))]
    bias = {rng.randrange(300, 2000): 5.0}
    messages = [{"role": "user", "content": "你好，巴黎在哪里 🙂"}]
    twenty = SamplingParams(max_new_tokens=20)
    biased = SamplingParams(max_new_tokens=20, logit_bias=bias, banned_tokens=[400, 401], repetition_penalty=1.1)
    made += [
        ({"input_ids": ids, "max_new_tokens": 20}, Request(ids, params=twenty)),
        ({"text_input": "The capital", "n": 2, "temperature": 1.0, "seed": 3, "max_new_tokens": 9},
         Request("The capital", n=2, params=SamplingParams(temperature=1.0, seed=3, max_new_tokens=9))),
        ({"text_input": "One, two, three", "stop": [" the", "."], "stop_token_ids": [500], "max_new_tokens": 40},
         Request("One, two, three", stop=[" the", ".", 500], params=SamplingParams(max_new_tokens=40))),
        ({"messages": json.dumps(messages, ensure_ascii=False), "max_new_tokens": 20},
         Request(messages=messages, params=twenty)),
        ({"messages": json.dumps(messages), "structure": json.dumps({"json_schema": SCHEMA}), "max_new_tokens": 40},
         Request(messages=messages, structure=Structure(json_schema=SCHEMA), params=SamplingParams(max_new_tokens=40))),
        ({"messages": json.dumps(messages), "tools": json.dumps(TOOLS), "tool_choice": "required",
          "max_new_tokens": 60},
         Request(messages=messages, tools=TOOLS, structure=tool_structure(TOOLS, "required"),
                 params=SamplingParams(max_new_tokens=60))),
        ({"text_input": "The", "logit_bias": json.dumps(bias), "banned_tokens": [400, 401], "repetition_penalty": 1.1,
          "max_new_tokens": 20}, Request("The", params=biased)),
        ({"text_input": "One two three one two three one", "lookup": 7, "max_new_tokens": 30},
         Request("One two three one two three one", lookup=7, params=SamplingParams(max_new_tokens=30))),
    ]  # fmt: skip
    return made


BAD: list[dict[str, Any]] = [
    {},
    {"text_input": "a", "input_ids": [1]},
    {"text_input": "a", "messages": "[]"},
    {"messages": "{"},
    {"messages": "[1]"},
    {"messages": "[" * 100_000},
    {"messages": '[{"role": 1}]'},
    {"input_ids": [-1]},
    {"input_ids": [1 << 40]},
    {"input_ids": []},
    {"text_input": "a" * 5000},
    {"text_input": "a", "temperature": -1.0},
    {"text_input": "a", "temperature": float("nan")},
    {"text_input": "a", "max_new_tokens": 0},
    {"text_input": "a", "n": 65},
    {"text_input": "a", "logit_bias": '{"x": 1}'},
    {"text_input": "a", "logit_bias": '{"1": NaN}'},
    {"text_input": "a", "stop": [""]},
    {"text_input": b"\xff\xfe"},
    {"text_input": "a", "tools": "[{}]"},
    {"messages": '[{"role": "user", "content": "a"}]', "tool_choice": "required"},
    {"text_input": "a", "structure": '{"regex": "("}'},
    {"text_input": "a", "structure": '{"function": "f"}'},
]


def same(answer: Answer, result: Any) -> bool:
    """To the bit: ids, texts, reasons, calls, log-probabilities of every choice."""
    if answer.error is not None or len(answer.tokens) != len(result.choices):
        return False
    scores = [[s.token, s.logprob, [list(t) for t in s.top]] for choice in result.choices for s in choice.logprobs]
    calls = [{"name": c.name, "arguments": c.arguments} for choice in result.choices for c in choice.tool_calls]
    return (
        all(
            answer.tokens[i] == list(choice.tokens)
            and answer.texts[i] == choice.content
            and answer.reasons[i] == choice.finish_reason
            for i, choice in enumerate(result.choices)
        )
        and answer.calls == calls
        and [[s["token"], s["logprob"], s["top"]] for s in answer.logprobs] == scores
    )


def check_answers(server: Server, made: list[Case], alone: list[Any]) -> Iterator[Row]:
    """One by one, and eight at once, by every way in."""
    address = f"127.0.0.1:{server.grpc}"
    ways: dict[str, tuple[Callable[[dict[str, Any]], Answer], int]] = {
        "gRPC stream, one by one": (lambda given: Stream(address, MODEL, given | {"stream": True}).read(), 1),
        "gRPC stream, whole answers": (lambda given: Stream(address, MODEL, given).read(), 1),
        "8 gRPC streams at once": (lambda given: Stream(address, MODEL, given | {"stream": True}).read(), 8),
        "HTTP generate_stream, 8 at once": (lambda given: generate(server.http, MODEL, given | {"stream": True})[1], 8),
    }
    for name, (way, at_once) in ways.items():
        rounds = 3 if at_once > 1 else 1
        with ThreadPoolExecutor(at_once) as pool:
            answers = list(pool.map(way, [given for given, _ in made * rounds]))
        equal = sum(map(same, answers, alone * rounds))
        yield name, f"{equal} of {len(answers)} equal to the engine's alone", equal == len(answers)
    ones = [(given, result) for (given, _), result in zip(made, alone, strict=True) if len(result.choices) == 1]
    equal = sum(same(generate(server.http, MODEL, given)[1], result) for given, result in ones)
    yield "HTTP generate", f"{equal} of {len(ones)} equal to the engine's alone", equal == len(ones)


def settled(server: Server, name: str, wanted: float) -> bool:
    """Whether a gauge gets there within some seconds."""
    end = time.monotonic() + 20
    while time.monotonic() < end:
        if server.number(name) == wanted:
            return True
        time.sleep(0.1)
    return False


def check_cancelled(server: Server) -> Iterator[Row]:
    """Answers of 400 tokens whose clients go after 2: those tokens must not be computed."""
    long = {"text_input": "The", "stream": True, "max_new_tokens": 400, "min_new_tokens": 400}
    for name in ("gRPC streams cancelled", "HTTP streams left", "cancelled while they wait"):
        before = server.number("glm4:generation_tokens_total")
        count = 24 if name.startswith("cancelled") else 8
        if name.startswith("HTTP"):
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(lambda _: generate(server.http, MODEL, long, leave_after=2), range(count)))
        else:
            streams = [Stream(f"127.0.0.1:{server.grpc}", MODEL, long) for _ in range(count)]
            for stream in streams[:8]:
                reader = iter(stream)
                next(reader), next(reader)
            for stream in reversed(streams):
                stream.close(cancel=True)
        free = settled(server, "glm4:num_requests_running", 0) and settled(server, "glm4:num_requests_waiting", 0)
        time.sleep(1)
        written = int(server.number("glm4:generation_tokens_total") - before)
        yield name, f"{written} of {count * 400} tokens computed, slots free: {free}", free and written < count * 200


def check_bad(server: Server, made: Case, alone: Any) -> Iterator[Row]:
    """An error each, by gRPC and HTTP, and the server goes on."""
    address = f"127.0.0.1:{server.grpc}"
    answers = [Stream(address, MODEL, given).read() for given in BAD]
    told = sum(answer.error is not None and "its log says" not in answer.error for answer in answers)
    yield "malformed requests, gRPC", f"{told} of {len(BAD)} told what is wrong", told == len(BAD)
    sendable = [given for given in BAD if not any(isinstance(v, bytes) or v != v or v == [] for v in given.values())]
    sendable += [{"text_input": "a", "max_tokens": 3}, {"text_input": ["a", "b"]}]
    found = [generate(server.http, MODEL, given) for given in sendable]
    told = sum(status == 400 and answer.error is not None for status, answer in found)
    yield "malformed requests, HTTP", f"{told} of {len(sendable)} answered 400", told == len(sendable)
    answer = Stream(address, MODEL, made[0]).read()
    yield "the next one", "answered" if same(answer, alone) else f"{answer}", same(answer, alone)


def check_full(server: Server) -> Iterator[Row]:
    """More than slots and queue hold are told so at once."""
    long = {"text_input": "The", "max_new_tokens": 60, "min_new_tokens": 60}
    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(lambda _: generate(server.http, MODEL, long), range(40)))
    answered = sum(status == 200 and answer.error is None for status, answer in found)
    refused = sum(status == 400 and "queue is full" in str(answer.error) for status, answer in found)
    good = answered + refused == 40 and refused > 0
    yield "40 at once, 8 slots, 16 may wait", f"{answered} answered, {refused} told that the queue is full", good


def check_end(server: Server, made: Case, alone: Any) -> Iterator[Row]:
    """Unloaded and loaded again, then SIGTERM, each with answers under way."""
    address = f"127.0.0.1:{server.grpc}"
    long = {"text_input": "The", "stream": True, "max_new_tokens": 300, "min_new_tokens": 300}

    def under_way(end: Callable[[], object]) -> int:
        streams = [Stream(address, MODEL, long) for _ in range(4)]
        readers = [iter(stream) for stream in streams]
        counts = [len(next(reader)["token_ids"]) for reader in readers]
        thread = threading.Thread(target=end)
        thread.start()
        for i, reader in enumerate(readers):
            with suppress(InferenceServerException):
                counts[i] += sum(len(found["token_ids"]) for found in reader)
        thread.join()
        for stream in streams:
            stream.close()
        return sum(count == 300 for count in counts)

    def post(path: str) -> None:
        urllib.request.urlopen(f"http://127.0.0.1:{server.http}/v2/repository/models/{MODEL}/{path}", b"{}", 120).read()

    whole = under_way(lambda: post("unload"))
    yield "unload", f"{whole} of 4 answers under way came whole", whole == 4
    gone = server.get(f"/v2/models/{MODEL}/ready")[0]
    post("load")
    answer = Stream(address, MODEL, made[0]).read()
    yield (
        "load again",
        f"ready in between: {gone}; answered: {same(answer, alone)}",
        gone != 200 and same(answer, alone),
    )
    whole = under_way(lambda: server.process.send_signal(signal.SIGTERM))
    status = server.process.wait(90)
    yield "SIGTERM", f"{whole} of 4 answers under way came whole, exit status {status}", whole == 4 and status == 0


def check(parts: Installed, folder: Path, seed: int) -> Iterator[Row]:
    bundle, repository = folder / "bundle", folder / "models"
    with redirect_stdout(sys.stderr):
        cli.main(["build", "-o", str(bundle), "--precision", "int4", "--target", "cpu"])
        sizes = ["--slots", str(SIZES["slots"]), "--max-seq-len", str(SIZES["max_seq_len"]), "--max-queue", "16"]
        cli.main(["triton", str(bundle), "-o", str(repository), "--name", MODEL, *sizes])
    shutil.rmtree(folder / "moved", ignore_errors=True)
    repository = repository.rename(folder / "moved")  # it must not need its first place
    made = cases(random.Random(seed))
    with Engine.load(bundle, **SIZES, prefix_cache="off") as engine:
        alone = [engine.submit(request).result() for _, request in made]
    with running(parts, repository, MODEL, folder / "server.log") as server:
        tokens = sum(len(choice.tokens) for result in alone for choice in result.choices)
        yield "loads", f"ready; to be asked: {len(made)} kinds of requests, {tokens} tokens", True
        yield from check_answers(server, made, alone)
        yield from check_bad(server, made[0], alone[0])
        yield from check_cancelled(server)
        yield from check_full(server)
        counted, tokens = server.number("nv_inference_request_success"), server.number("glm4:prompt_tokens_total")
        yield "metrics", f"{counted:.0f} requests, {tokens:.0f} tokens of prompts", counted > 0 and tokens > 0
        yield from check_end(server, made[0], alone[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="server and environment stay in it")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    names = ("onnxruntime", "tokenizers", "jinja2", "llguidance")
    parts = install(folder, [f"{name}=={version(name)}" for name in names])
    bad = 0
    for name, found, ok in check(parts, folder, arguments.seed):
        print(f"{name:36} {'ok ' if ok else 'BAD'} {found}", flush=True)
        bad += not ok
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
