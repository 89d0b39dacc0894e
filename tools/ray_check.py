"""The service under Ray Serve on a cluster of this machine: streams, prefixes, a killed replica, scaling, the end.

python tools/ray_check.py [BUNDLE]    (default: the embedded model, built in fp16; two CPUs, about two minutes)

Prints a table, and exits with 1 on a finding.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import openai
from ray_served.served import FINDINGS, SLOTS, Served, row

WORDS = ["river", "stone", "cloud", "lamp", "garden", "window", "copper", "forest", "paper", "harbour"]


def body(text: str, tokens: int, **more: Any) -> dict[str, Any]:
    """A greedy answer of so many tokens."""
    return {"prompt": text, "max_tokens": tokens, "min_tokens": tokens, "temperature": 0, **more}


def streams(served: Served) -> None:
    """OpenAI's client."""
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    messages: Any = [{"role": "user", "content": "What is the capital of France?"}]
    began, times, text = time.monotonic(), [], ""
    for chunk in client.chat.completions.create(model="demo", messages=messages, stream=True, temperature=0):
        times.append(time.monotonic() - began)
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
    well = text == "The capital of France is Paris." and len(times) > 5 and times[-1] > times[0]
    row("openai client, a stream", f"{text!r}, {len(times)} events, first {times[0] * 1000:.0f} ms", well)
    with contextlib.suppress(openai.BadRequestError):
        client.chat.completions.create(model="demo", messages=messages, extra_body={"nonsense": 1})
        row("an unknown field", "was taken", False)
    codes = {path: httpx.get(f"{served.url}{path}").status_code for path in ("/health", "/ready", "/metrics")}
    row("health, ready; metrics", str(codes), list(codes.values()) == [200, 200, 404])


def prefixes(served: Served) -> None:
    """Requests that begin alike."""
    places: dict[str, set[str]] = collections.defaultdict(set)
    cached = again = 0
    for turn in range(5):
        for word in WORDS[:8]:
            answer = httpx.post(
                f"{served.url}/v1/completions", json=body(f"{word} " * 150 + f"question {turn}", 2), timeout=60
            )
            places[word].add(answer.headers["x-replica"])
            if turn:
                again += 1
                cached += answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    one = sum(len(found) == 1 for found in places.values())
    used = len(set.union(*places.values()))
    found = (
        f"{one} of {len(places)} on one replica each, {used} replicas used; {cached} of {again} repeats hit the cache"
    )
    row("8 beginnings, 5 questions each", found, one == len(places) and used == 2 and cached == again)


async def gone(served: Served) -> None:
    """Clients that leave in the middle."""
    mark = '"finish_reasons": ["cancelled"]'
    before = served.logged(mark)

    async def leave(stream: bool) -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            asked = body("leave " * 20, 1900, stream=stream)  # 1500 may take less than two seconds
            with contextlib.suppress(httpx.TimeoutException):
                async with client.stream("POST", f"{served.url}/v1/completions", json=asked, timeout=1.5) as answer:
                    async for _ in answer.aiter_lines():
                        return

    await asyncio.gather(*(leave(number % 2 == 0) for number in range(6)))
    until = time.monotonic() + 20
    while (told := served.logged(mark) - before) < 6 and time.monotonic() < until:
        await asyncio.sleep(0.2)
    row("6 clients gone, 3 of them streaming", f"{told} seen by the engines", told == 6)


async def one(client: httpx.AsyncClient, url: str, asked: dict[str, Any]) -> tuple[str, str]:
    """A request: what became of it, and its text. An answer that isn't as long as asked for isn't whole."""
    text, written = "", 0
    try:
        if not asked.get("stream"):
            answer = await client.post(f"{url}/v1/completions", json=asked)
            if answer.status_code == 200:
                found = answer.json()
                whole = found["usage"]["completion_tokens"] == asked["max_tokens"]
                return "whole" if whole else "SHORT", found["choices"][0]["text"]
            return f"refused {answer.status_code}", ""
        counted = {**asked, "stream_options": {"include_usage": True}}
        async with client.stream("POST", f"{url}/v1/completions", json=counted) as answer:
            if answer.status_code != 200:
                return f"refused {answer.status_code}", ""
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return "whole" if written == asked["max_tokens"] else "SHORT", text
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return "broken, and told", text
                    written = (event.get("usage") or {}).get("completion_tokens", written)
                    text += event["choices"][0]["text"] if event["choices"] else ""
        return "CUT", text
    except httpx.HTTPError as error:
        return f"LOST {type(error).__name__}", text


async def killed(served: Served) -> None:
    """kill -9 of a replica under load."""
    prompts = [f"{first} and {second}" for first in WORDS[:4] for second in WORDS[4:8]]
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        expected = {text: (await one(client, served.url, body(text, 180)))[1] for text in prompts}
        outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
        wrong, until, number = 0, time.monotonic() + 12, 0

        async def ask() -> None:
            nonlocal wrong, number
            while time.monotonic() < until:
                number += 1
                text, stream, tokens = prompts[number % len(prompts)], number % 2 > 0, 60 + number * 37 % 120
                what, answer = await one(client, served.url, body(text, tokens, stream=stream))
                outcomes["stream" if stream else "whole answer", what] += 1
                wrong += not expected[text].startswith(answer.rstrip("\ufffd")) or (what == "whole" and not answer)
                if what.startswith("refused"):
                    await asyncio.sleep(0.2)

        victim = served.replicas()[0]  # found now: looking for it takes so long that clients would pause

        async def kill() -> None:
            await asyncio.sleep(3)
            os.kill(victim, signal.SIGKILL)

        await asyncio.gather(kill(), *(ask() for _ in range(16)))
    for kind in ("whole answer", "stream"):
        found = {what: count for (of, what), count in sorted(outcomes.items()) if of == kind}
        allowed = {"whole", "refused 429", "refused 503"} | ({"broken, and told"} if kind == "stream" else set())
        row(
            f"kill -9 under load: {kind}s",
            ", ".join(f"{n} {what}" for what, n in found.items()),
            found.keys() <= allowed,
        )
    row("their texts", f"{wrong} differ from those before", not wrong)
    await whole_again(served)


async def broken(served: Served) -> None:
    """kill -9 of a replica once streams through it have begun, long before they and whole answers end.

    Under load it may be between two answers: two CPUs write them faster than they bring them to clients.
    """
    victim, again, begun = served.replicas()[0], served.logged('"begun": false'), 0

    async def stream(client: httpx.AsyncClient, asked: dict[str, Any]) -> str:
        nonlocal begun
        last = ""
        async with client.stream("POST", f"{served.url}/v1/completions", json=asked) as answer:
            async for line in answer.aiter_lines():
                begun += last == ""
                last = line or last
                if begun == 6:
                    begun += 1
                    os.kill(victim, signal.SIGKILL)
        return "stream whole" if last == "data: [DONE]" else "stream told" if '"error"' in last else "CUT"

    async def answer(client: httpx.AsyncClient, asked: dict[str, Any]) -> str:
        return f"answer {(await one(client, served.url, asked))[0]}"

    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        streams = [stream(client, body(f"{word} {word}", 1900, stream=True)) for word in WORDS[:6]]
        answers = [answer(client, body(f"{word}, {word}", 1900)) for word in WORDS[:6]]
        found = collections.Counter(await asyncio.gather(*streams, *answers))
    row(
        "kill -9 of 6 streams, 6 answers",
        str(dict(found)),
        set(found) == {"stream whole", "stream told", "answer whole"},
    )
    again = served.logged('"begun": false') - again
    row("asked again by the front", f"{again}, nothing of which had been answered", again > 0)
    await whole_again(served)


async def whole_again(served: Served) -> None:
    """Ray starts another one."""
    until = time.monotonic() + 60
    while len(served.replicas()) < 2 and time.monotonic() < until:
        await asyncio.sleep(0.5)
    row("replicas afterwards", str(len(served.replicas())), len(served.replicas()) == 2)


async def ended(served: Served, tokens: int, allowed: set[str]) -> None:
    """The end, with answers under way."""
    async with httpx.AsyncClient(timeout=60) as client:
        asked = [body(f"{word} " * 9, tokens, stream=number % 2 == 0) for number, word in enumerate(WORDS)]
        tasks = [asyncio.create_task(one(client, served.url, each)) for each in asked]
        await asyncio.sleep(1.0)
        under_way = sum(not task.done() for task in tasks)
        await asyncio.to_thread(served.end)
        found = collections.Counter([what for what, _ in await asyncio.gather(*tasks)])
    row("answers under way at SIGTERM", f"{under_way} of {len(tasks)}; {dict(found)}", set(found) <= allowed)


async def scaled(served: Served) -> None:
    """More requests than a replica has slots."""
    before, until = len(served.replicas()), time.monotonic() + 60
    began = time.monotonic()
    async with httpx.AsyncClient(timeout=120) as client:

        async def ask(number: int) -> None:
            while time.monotonic() < until and len(served.replicas()) < 2:
                await one(client, served.url, body(f"load {number}", 300))

        await asyncio.gather(*(ask(number) for number in range(4 * SLOTS)))
    now = len(served.replicas())
    row(
        "autoscaling under load",
        f"{before} replica, {now} after {time.monotonic() - began:.0f} s",
        (before, now) == (1, 2),
    )


def batch(bundle: Path) -> None:
    """Ray Data, as docs/production.md shows it."""
    example = (
        "import ray\n"
        "from glm4serve.deploy.ray_batch import answers\n"
        "ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)\n"
        "prompts = ray.data.from_items([{'prompt': f'Question {n} ' * (2000 if n == 7 else 1)} for n in range(40)])\n"
        f"settings = {{'bundle': {str(bundle)!r}, 'replicas': 2, 'threads': 1, 'max_new_tokens': 12}}\n"
        "rows = answers(prompts, **settings).take_all()\n"
        "chat = [{'role': 'user', 'content': 'What is the capital of France?'}]\n"
        "call = {'role': 'assistant', 'content': '', 'tool_calls': [{'type': 'function', 'function': {'name': 'f',"
        " 'arguments': '{}'}}]}\n"
        "chats = ray.data.from_items([{'messages': chat}, {'messages': [*chat, call, *chat]}])\n"
        "texts = [row['answer'] or row['error'] for row in answers(chats, **settings).take_all()]\n"
        "errors = [row['error'][:40] for row in rows if row['error']]\n"
        "print(len(rows), len({r['prompt'] for r in rows}), sum(r['answer'] > '' for r in rows), errors, texts)\n"
    )
    done = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=180)
    last = (done.stdout.splitlines() or [done.stderr[-300:]])[-1]
    row(
        "offline batch on Ray Data",
        last,
        last.startswith("40 40 39 ['the prompt has") and "of France is Paris." in last,
    )


def main() -> int:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "demo"
        if not bundle.exists():
            argv = [sys.executable, "-m", "glm4export", "build", "-o", str(bundle), "--target", "cpu"]
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        served = Served(bundle, "--replicas", "2")
        try:
            row("cluster and two replicas", f"{served.seconds:.1f} s to start", len(served.replicas()) == 2)
            streams(served)
            prefixes(served)
            asyncio.run(gone(served))
            asyncio.run(killed(served))
            asyncio.run(broken(served))
            asyncio.run(ended(served, 300, {"whole"}))
            served = Served(bundle, "--min-replicas", "1", "--max-replicas", "2", "--drain", "0.2")
            asyncio.run(scaled(served))
            asyncio.run(ended(served, 1900, {"whole", "broken, and told", "refused 503"}))
        finally:
            if served.process.poll() is None:
                os.killpg(served.process.pid, signal.SIGKILL)
        batch(bundle)
    print(f"{time.monotonic() - began:.0f} s; {len(FINDINGS)} findings", *FINDINGS, sep="\n  ")
    return 1 if FINDINGS else 0


if __name__ == "__main__":
    sys.exit(main())
