"""Load ``glm4export serve`` over loopback for a while: errors, memory, latencies, and throughput beside one client's.

    python tools/load_server.py BUNDLE --clients 64 --slots 8 --seconds 600

Each client asks, reads its stream to the end, and asks again; where it gets 429 it waits as long as it is told. Before
that one client asks alone, on the same server. Exits with 1 where there was an error other than 429, where the server's
own memory grew by 2% or more between the run's second quarter and its last one, or where a slot isn't free at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from over_http.client import PATHS, Exchange, body_of
from over_http.server import Server, serving

WORDS = ("what", "is", "the", "capital", "of", "France", "and", "why", "does", "a", "river", "flow", "north", "there")
DRIFT = 0.02


@dataclass
class Seen:
    """What clients saw."""

    first: list[float] = field(default_factory=list)  # seconds to the first event with text
    between: list[float] = field(default_factory=list)  # seconds between two
    ends: Counter[str] = field(default_factory=Counter)
    tokens: int = 0


async def ask(server: Server, rng: random.Random, tokens: int, seen: Seen) -> float:
    """One request to its end; returns the seconds to wait before the next."""
    question = " ".join(rng.choice(WORDS) for _ in range(rng.randint(4, 60)))
    body = body_of("chat", question, tokens, stream=True, stream_options={"include_usage": True})
    began = last = time.perf_counter()
    first, done = None, False
    exchange = await Exchange.open(server.host, server.port)
    try:
        exchange.send(PATHS["chat"], body, f"load-{rng.randrange(1 << 40)}")
        await exchange.head()
        if exchange.status != 200:
            await exchange.body()
            seen.ends[str(exchange.status)] += 1
            return float(exchange.headers.get("retry-after", 0))
        async for chunk in exchange.chunks():
            now = time.perf_counter()
            if b'"content":"' in chunk and b'"role"' not in chunk:
                if first is None:
                    first = now
                    seen.first.append(now - began)
                else:
                    seen.between.append(now - last)
                last = now
            elif b'"usage":{' in chunk:
                seen.tokens += json.loads(chunk.decode().removeprefix("data: "))["usage"]["completion_tokens"]
            done = done or b"[DONE]" in chunk
        seen.ends["whole" if done else "no [DONE]"] += 1
    except (OSError, EOFError, asyncio.IncompleteReadError) as error:
        seen.ends[type(error).__name__] += 1
    finally:
        exchange.leave(reset=False)
    return 0.0


async def clients(
    server: Server, count: int, seconds: float, tokens: int, seed: int
) -> tuple[Seen, float, list[tuple[int, int]]]:
    """So many of them, until the time is over; what they saw, tokens a second, and the server's memory each second."""
    seen, memory = Seen(), list[tuple[int, int]]()
    began = time.monotonic()
    end = began + seconds

    async def one(index: int) -> None:
        rng = random.Random(seed * 1000 + index)
        while time.monotonic() < end:
            wait = await ask(server, rng, tokens, seen)
            await asyncio.sleep(min(wait, max(0.0, end - time.monotonic())))

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(server.memory())
            await asyncio.sleep(1.0)

    await asyncio.gather(watch(), *(one(index) for index in range(count)))
    return seen, seen.tokens / (time.monotonic() - began), memory


def milliseconds(values: list[float]) -> str:
    """Median and 99th percentile."""
    if len(values) < 2:
        return "too few"
    cuts = statistics.quantiles(values, n=100)
    return f"p50 {statistics.median(values) * 1e3:.1f} ms, p99 {cuts[98] * 1e3:.1f} ms"


def second_and_last(values: Sequence[int]) -> tuple[float, float]:
    """Means of these two quarters."""
    quarter = max(1, len(values) // 4)
    return statistics.mean(values[quarter : 2 * quarter] or values), statistics.mean(values[-quarter:])


def load(bundle: Path, arguments: argparse.Namespace) -> list[str]:
    """All of it; what was found."""
    sizes = ["--slots", arguments.slots, "--max-queue", arguments.max_queue, "--max-seq-len", 512]
    sizes += ["--prefix-cache-mb", 16]  # full before the second quarter: what grows from then on is a leak
    with serving(bundle, *map(str, [*sizes, "--threads", arguments.threads])) as server:
        alone_for = min(60.0, max(2.0, arguments.seconds / 10))
        alone, one, _ = asyncio.run(clients(server, 1, alone_for, arguments.tokens, arguments.seed + 1))
        seen, rate, memory = asyncio.run(
            clients(server, arguments.clients, arguments.seconds, arguments.tokens, arguments.seed)
        )
        idle, left = server.idle(10.0), server.metric("num_requests_")
        failures = [line for line in server.log if line["event"] == "failure"]
    own, mapped = zip(*memory, strict=True)
    early, late = second_and_last(own)
    drift = late / early - 1
    print(f"one client, {alone_for:.0f} s: {dict(alone.ends)}, {one:.1f} tokens/s")
    print(f"  first token {milliseconds(alone.first)}; between tokens {milliseconds(alone.between)}")
    print(f"{arguments.clients} clients, {arguments.slots} slots, {arguments.seconds:.0f} s: {dict(seen.ends)}")
    print(f"  {rate:.1f} tokens/s, {rate / one:.2f} times one client's" if one else "  one client got no tokens")
    print(f"  first token {milliseconds(seen.first)}; between tokens {milliseconds(seen.between)}")
    print(f"  own memory {early / 2**20:.1f} MiB in the second quarter, {late / 2**20:.1f} in the last: {drift:+.2%}")
    early_mapped, late_mapped = second_and_last(mapped)
    print(f"  pages of mapped files {early_mapped / 2**20:.1f} and {late_mapped / 2**20:.1f} MiB")
    print(f"  in the end {left:.0f} requests run or wait")
    findings = [f"{count} requests ended as {end}" for end, count in seen.ends.items() if end not in ("whole", "429")]
    findings += [f"one client: {end}" for end in alone.ends if end != "whole"]
    findings += [f"failure: {line}" for line in failures] + [f"standard error: {line}" for line in server.other]
    if drift >= DRIFT:
        findings.append(f"memory grew by {drift:.2%}")
    if not idle:
        findings.append("slots aren't free at the end")
    return findings


def main() -> int:
    """Exit status 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--max-queue", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--seed", type=int, default=0)
    findings = load((arguments := parser.parse_args()).bundle, arguments)
    for finding in findings:
        print(finding)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
