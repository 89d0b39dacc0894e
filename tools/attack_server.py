"""Attack ``glm4export serve`` over real connections, with other clients beside whose answers must not change.

    python tools/attack_server.py BUNDLE --clients 500 --bodies 5000

leaving   clients that go away at random points (while they send, wait, have their prompt read, or are answered), with
          and without a farewell, streaming or not, in every protocol: all slots are free afterwards, nothing runs
slow      a client that doesn't read is cut, and holds up nobody
ending    SIGTERM while many are answered and wait: each is answered or told, and the process ends with status 0
bodies    what schemathesis makes of our own OpenAPI schema, where it is installed: no 500

Exits with 1 where anything was found.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from over_http.client import PATHS, Exchange, ask, body_of, told_of
from over_http.server import NAME, Server, serving

SIZES = ("--slots", "4", "--max-seq-len", "512", "--max-queue", "64", "--stall-ms", "20")
AT_ONCE = 16  # clients that go away: four times as many as there are slots
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "from", "seven", "cats")
IDLE = 20.0  # seconds in which slots must be free


def text(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))


def asked_by_bystanders(rng: random.Random) -> list[dict[str, Any]]:
    """Greedy and seeded; with log-probabilities, so that a bit more or less is seen."""
    ways: tuple[dict[str, Any], ...] = ({"temperature": 0}, {"temperature": 0.9, "seed": 5}, {"seed": 7, "n": 2})
    return [body_of("chat", text(rng, 3, 60), 16, logprobs=True, top_logprobs=2, **way) for way in ways]


async def choices(server: Server, body: Any, id: str) -> Any:
    status, answer = await ask(server.host, server.port, PATHS["chat"], body, id)
    return json.loads(answer)["choices"] if status == 200 else f"{status} {answer!r:.200}"


@asynccontextmanager
async def bystanders(server: Server, rng: random.Random, findings: list[str]) -> AsyncIterator[Counter[str]]:
    """Ask the same again and again beside the block; before it, alone."""
    asked = asked_by_bystanders(rng)
    alone = [await choices(server, body, "alone") for body in asked]
    over, count = asyncio.Event(), Counter[str]()

    async def go(at: int) -> None:
        while not over.is_set():
            found = await choices(server, asked[at], f"bystander-{at}")
            count["same" if found == alone[at] else "different"] += 1
            if found != alone[at]:
                findings.append(f"bystander {at}: another answer than alone: {found!r:.300}")

    tasks = [asyncio.create_task(go(at)) for at in range(len(asked))]
    try:
        yield count
    finally:
        over.set()
        await asyncio.gather(*tasks)


async def leave_one(server: Server, rng: random.Random, id: str) -> None:
    """From connecting to going away."""
    kind, streams = rng.choice(list(PATHS)), rng.random() < 0.5
    body = body_of(kind, text(rng, 5, 180), 250, stream=streams)
    exchange = await Exchange.open(server.host, server.port)
    reset, half = rng.random() < 0.5, rng.random() < 0.05
    exchange.send(PATHS[kind], body, id, whole=not half)
    try:
        if streams and not half and rng.random() < 0.5:
            await exchange.head()
            left = rng.randint(1, 60)
            async for _ in exchange.chunks():
                left -= 1
                if left <= 0:
                    break
        else:
            await asyncio.sleep(rng.choice((0.0, rng.uniform(0, 0.05), rng.uniform(0, 1.5))))
    except (OSError, EOFError):
        pass
    exchange.leave(reset=reset)


def point_of(line: dict[str, Any]) -> str:
    """Where a client was that has gone, as the server's log has it."""
    if line["status"] != 499 and line.get("finish_reasons", ["cancelled"]) != ["cancelled"]:
        return "answered"
    if "model" not in line:
        return "sending"
    if line.get("queue_seconds") is None:
        return "queued"
    return "prefill" if line.get("first_token_seconds") is None else "decode"


async def leaving(bundle: Path, count: int, seed: int) -> list[str]:
    findings: list[str] = []
    rng = random.Random(seed)
    with serving(bundle, *SIZES) as server:
        async with bystanders(server, rng, findings) as same:
            free = asyncio.Semaphore(AT_ONCE)

            async def one(index: int) -> None:
                async with free:
                    await leave_one(server, random.Random(seed * 100_003 + index), f"leaver-{index}")

            await asyncio.gather(*(one(index) for index in range(count)))
        if not await asyncio.to_thread(server.idle, IDLE):
            findings.append(f"in the end {server.metric('num_requests_'):.0f} requests run or wait")
        if not server.healthy():
            findings.append("in the end the server isn't healthy")
        await asyncio.sleep(1.0)  # the log's last lines
        lines = [line for id, line in server.requests().items() if id.startswith("leaver-")]
        points = Counter(point_of(line) for line in lines)
        findings += [f"a client that left got {line}" for line in lines if line["status"] not in (200, 499)]
        findings += [f"failure: {line}" for line in server.log if line["event"] == "failure"]
    findings += [f"standard error: {line}" for line in server.other]
    print(f"leaving   {count} clients, {len(lines)} seen by the server: {dict(points)}; bystanders {dict(same)}")
    return findings


async def slow(bundle: Path, seed: int) -> list[str]:
    findings: list[str] = []
    rng = random.Random(seed)
    with serving(bundle, *SIZES) as server:
        async with bystanders(server, rng, findings) as same:
            exchange = await Exchange.open(server.host, server.port, receive_buffer=4096)
            # More than the kernel keeps for a reader that isn't there: several MB
            body = body_of("chat", "Hi", 400, stream=True, n=24, logprobs=True, top_logprobs=20, min_tokens=400)
            began = time.monotonic()
            exchange.send(PATHS["chat"], body, "slow")
            while "slow" not in server.requests() and time.monotonic() - began < 180:
                await asyncio.sleep(0.1)
        line = server.requests().get("slow", {})
        if line.get("cut") != "slow reader":
            findings.append(f"a slow reader isn't cut: {line}")
        if not await asyncio.to_thread(server.idle, IDLE):
            findings.append("a slow reader's slots aren't free")
        exchange.leave(reset=True)
    findings += [f"standard error: {line}" for line in server.other]
    print(f"slow      {line.get('cut', 'not')} cut after {line.get('seconds')} s; bystanders {dict(same)}")
    return findings


async def end_one(bundle: Path, seed: int, ends: Counter[str]) -> list[str]:
    """One round: a server that gets SIGTERM while 32 clients ask it again and again."""
    findings: list[str] = []
    over = asyncio.Event()

    async def client(server: Server, index: int) -> None:
        rng = random.Random(f"{seed} {index}")
        while not over.is_set():
            kind = rng.choice(list(PATHS))
            body = body_of(kind, text(rng, 5, 100), rng.choice((20, 400)), stream=rng.random() < 0.5)
            try:
                end = told_of(*await ask(server.host, server.port, PATHS[kind], body, f"client-{index}"))
            except (OSError, EOFError) as error:
                end = f"cut ({type(error).__name__})"
            if over.is_set():
                ends[end] += 1
            if end not in ("whole", "503", "told") or (end != "whole" and not over.is_set()):
                findings.append(f"client {index}: its request was accepted, and ended as {end}")

    with serving(bundle, *SIZES, "--drain", "0.5") as server:
        tasks = [asyncio.create_task(client(server, index)) for index in range(32)]
        await asyncio.sleep(random.Random(seed).uniform(0.5, 3))
        over.set()  # what is asked from now on isn't sent any more
        server.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*tasks)
        if (status := await asyncio.to_thread(server.wait, 30)) != 0:
            findings.append(f"the exit status is {status}")
    findings += [f"failure: {line}" for line in server.log if line["event"] == "failure"]
    findings += [f"standard error: {line}" for line in server.other]
    return [f"round {seed}: {finding}" for finding in findings]


async def ending(bundle: Path, seed: int, rounds: int) -> list[str]:
    ends: Counter[str] = Counter()
    findings = [finding for turn in range(rounds) for finding in await end_one(bundle, seed + turn, ends)]
    print(f"ending    {rounds} rounds, 32 requests under way in each: {dict(ends)}")
    return findings


def schema_of(server: Server) -> Any:
    """Our own, with a model's name being that of the one that is served: others are refused before all else."""

    def named(node: Any) -> Any:
        if isinstance(node, list):
            return [named(item) for item in node]
        if not isinstance(node, dict):
            return node
        return {key: {"const": NAME} if key == "model" else named(value) for key, value in node.items()}

    with urlopen(f"{server.url}/openapi.json") as answer:
        return named(json.load(answer))


def bodies(bundle: Path, count: int, seed: int, program: str) -> list[str]:
    """schemathesis as a process: of its own environment, perhaps."""
    with serving(bundle, "--slots", "8", "--max-seq-len", "96", "--max-queue", "64") as server:
        command = [program, "run", "openapi.json", "--url", server.url, "--checks", "not_a_server_error"]
        command += ["--phases", "coverage,fuzzing", "--mode", "all", "--seed", str(seed), "--workers", "4"]
        command += ["--max-examples", str(max(1, count // 30)), "--continue-on-failure", "--no-color"]
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "openapi.json").write_text(json.dumps(schema_of(server)))
            done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        lines = list(server.requests().values())
        posts = [line for line in lines if line["method"] == "POST"]
        statuses = Counter(line["status"] for line in lines)
        findings = [f"{line['method']} {line['path']} got {line['status']}" for line in lines if line["status"] == 500]
        findings += [f"failure: {line}" for line in server.log if line["event"] == "failure"]
        if not server.healthy() or not server.idle(IDLE):
            findings.append("in the end the server isn't healthy and idle")
        if done.returncode not in (0, 1) or len(posts) < count:
            findings.append(
                f"{len(posts)} bodies were sent, expected {count}: {done.stdout[-2000:]}{done.stderr[-500:]}"
            )
        elif done.returncode:
            failures = re.search(r"=+ FAILURES =+(.*)", done.stdout, re.DOTALL)
            findings.append(f"schemathesis: {failures[1][:4000] if failures else done.stdout[-2000:]}")
    findings += [f"standard error: {line}" for line in server.other]
    print(f"bodies    {len(posts)} bodies, {len(lines) - len(posts)} other requests: {dict(sorted(statuses.items()))}")
    return findings


def main() -> int:
    """Exit status 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--only", choices=("leaving", "slow", "ending", "bodies"), action="append")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5, help="of ending")
    parser.add_argument("--bodies", type=int, default=5000)
    parser.add_argument("--schemathesis", default="schemathesis", metavar="PROGRAM", help="default: the one on PATH")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    only, findings, seed = arguments.only or ("leaving", "slow", "ending", "bodies"), list[str](), arguments.seed
    if "leaving" in only:
        findings += asyncio.run(leaving(arguments.bundle, arguments.clients, seed))
    if "slow" in only:
        findings += asyncio.run(slow(arguments.bundle, seed))
    if "ending" in only:
        findings += asyncio.run(ending(arguments.bundle, seed, arguments.rounds))
    if "bodies" in only:
        if program := shutil.which(arguments.schemathesis):
            findings += bodies(arguments.bundle, arguments.bodies, seed, program)
        else:
            print("bodies    left out: schemathesis isn't installed (pip install schemathesis, --schemathesis PROGRAM)")
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
