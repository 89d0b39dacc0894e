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
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai

SLOTS = 4
WORDS = ["river", "stone", "cloud", "lamp", "garden", "window", "copper", "forest", "paper", "harbour"]
FINDINGS: list[str] = []


def row(what: str, found: str, well: bool) -> None:
    """A line of the table."""
    print(f"{what:<34} {found:<76} {'ok' if well else 'FINDING'}", flush=True)
    if not well:
        FINDINGS.append(what)


class Served:
    """``glm4export serve --ray`` in a process."""

    def __init__(self, bundle: Path, *options: str) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        argv = [sys.executable, "-m", "glm4export", "serve", "--name", f"demo={bundle}", "--ray", "--json"]
        argv += ["--threads", "1", "--slots", str(SLOTS), "--max-queue", "64", "--port", str(port), *options]
        self.log = Path(tempfile.mkdtemp(prefix="ray-check-")) / "log"
        began = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self.url = json.loads(line)["url"]
                break
        else:
            raise SystemExit(f"it didn't start; its log is {self.log}")
        self.seconds = time.monotonic() - began

    def replicas(self) -> list[int]:
        """Process ids."""
        return [pid for pid, title in self._below() if title.startswith("ray::ServeReplica:glm4:replica")]

    def _below(self) -> Iterator[tuple[int, str]]:
        parents, titles = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
                titles[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        for pid in parents:
            above = pid
            while above in parents and above != self.process.pid:
                above = parents[above]
            if above == self.process.pid and pid != above:
                yield pid, titles.get(pid, "")

    def logged(self, text: str) -> int:
        """How often it is in the log."""
        return self.log.read_text(errors="replace").count(text)

    def end(self) -> None:
        """SIGTERM, and what is left after it."""
        left = [pid for pid, _ in self._below()]
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        seconds = time.monotonic() - began
        time.sleep(1)
        alive = [pid for pid in left if Path(f"/proc/{pid}").exists() and _running(pid)]
        row(
            "SIGTERM", f"exit status {status} after {seconds:.1f} s; {len(alive)} processes left", not (status or alive)
        )


def _running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


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
            asked = body("leave " * 20, 1500, stream=stream)
            with contextlib.suppress(httpx.TimeoutException):
                async with client.stream("POST", f"{served.url}/v1/completions", json=asked, timeout=2) as answer:
                    async for _ in answer.aiter_lines():
                        return

    await asyncio.gather(*(leave(number % 2 == 0) for number in range(6)))
    until = time.monotonic() + 20
    while (told := served.logged(mark) - before) < 6 and time.monotonic() < until:
        await asyncio.sleep(0.2)
    row("6 clients gone, 3 of them streaming", f"{told} seen by the engines", told == 6)


async def one(client: httpx.AsyncClient, url: str, asked: dict[str, Any]) -> tuple[str, str]:
    """A request: what became of it, and its text."""
    text = ""
    try:
        if not asked.get("stream"):
            answer = await client.post(f"{url}/v1/completions", json=asked)
            if answer.status_code == 200:
                return "whole", answer.json()["choices"][0]["text"]
            return f"refused {answer.status_code}", ""
        async with client.stream("POST", f"{url}/v1/completions", json=asked) as answer:
            if answer.status_code != 200:
                return f"refused {answer.status_code}", ""
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return "whole", text
                if line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return "broken, and told", text
                    text += event["choices"][0]["text"]
        return "CUT", text
    except httpx.HTTPError as error:
        return f"LOST {type(error).__name__}", text


async def killed(served: Served) -> None:
    """kill -9 of a replica under load: of answers so long that it isn't done with them while clients still read."""
    prompts = [f"{first} and {second}" for first in WORDS[:2] for second in WORDS[4:6]]
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        expected = {text: (await one(client, served.url, body(text, 1500)))[1] for text in prompts}
        outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
        wrong, until, number = 0, time.monotonic() + 12, 0

        async def ask() -> None:
            nonlocal wrong, number
            while time.monotonic() < until:
                number += 1
                text, stream, tokens = prompts[number % len(prompts)], number % 3 > 0, 1000 + number * 97 % 500
                what, answer = await one(client, served.url, body(text, tokens, stream=stream))
                outcomes["stream" if stream else "whole answer", what] += 1
                wrong += not expected[text].startswith(answer.rstrip("\ufffd")) or (what == "whole" and not answer)
                if what.startswith("refused"):
                    await asyncio.sleep(0.2)

        victim = served.replicas()[0]  # found now: looking for it takes so long that clients would pause

        async def kill() -> None:
            await asyncio.sleep(3)
            os.kill(victim, signal.SIGKILL)

        await asyncio.gather(kill(), *(ask() for _ in range(8)))
    for kind in ("whole answer", "stream"):
        found = {what: count for (of, what), count in sorted(outcomes.items()) if of == kind}
        allowed = {"whole", "refused 429", "refused 503"} | ({"broken, and told"} if kind == "stream" else set())
        row(
            f"kill -9 under load: {kind}s",
            ", ".join(f"{n} {what}" for what, n in found.items()),
            found.keys() <= allowed,
        )
    row("their texts", f"{wrong} differ from those before", not wrong)
    retried, told = served.logged('"begun": false'), served.logged('"begun": true')
    row("asked again by the front", f"{retried}, nothing of which had been answered; {told} told", retried + told > 0)
    began = time.monotonic()
    while len(served.replicas()) < 2 and time.monotonic() < began + 60:
        time.sleep(0.5)
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
    row("offline batch on Ray Data", last, last.startswith("40 40 39 ['prompt") and "of France is Paris." in last)


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
