"""Bundles and engines of a model, built, compared with PyTorch and timed: for ``gpu_check.py``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glm4export import cli
from glm4export.sources.checkpoint import locate
from glm4export.tensorrt.flavour import installed_flavours
from glm4export.verification.verify import verify
from glm4runtime import Engine, Request, SamplingParams, Session, load
from glm4runtime.contract import WEIGHTS

Result = dict[str, Any]
MAX_SEQ_LEN = 2048
DECODED, PROMPT = 128, 512  # tokens that a speed is taken from, behind so many
REQUESTS = 8


def cuda_bundles(
    model: str | None, folder: Path, precisions: Sequence[str], *, provider: str, peak: float | None
) -> Iterator[Result]:
    """Each precision's largest mean KL from PyTorch, its speed, the same by CUDA graphs, and eight requests at once.

    peak: bytes a second that the device copies, for the share of it that decoding reaches; None where it isn't a GPU.
    """
    decoded = DECODED if provider == "cuda" else 8
    for precision in precisions:
        bundle, name = folder / f"cuda-{precision}", f"cuda bundle, {precision}"
        command = ["build", *([model] if model else []), "-o", str(bundle), "--target", "cuda"]
        if status := cli.main([*command, "--precision", precision, "--max-seq-len", str(MAX_SEQ_LEN)]):
            yield {"case": name, "ok": False, "error": f"glm4export build ended with status {status}"}
            continue
        try:
            with load(bundle, provider=provider) as session:  # type: ignore[arg-type]
                found = verify(session, checkpoint=model)
                plain, speed = greedy(session, decoded)
            worst = max(phase.mean_kl for phase in found.phases)
            reached = {} if peak is None else {"of_copy": speed * (bundle / WEIGHTS).stat().st_size / (peak / 2)}
            yield {"case": name, "ok": not found.failures, "mean_kl": worst, "tokens_per_second": speed, **reached}
            if provider == "cuda":
                with load(bundle, cuda_graphs=True) as session:
                    replayed, speed = greedy(session, decoded)
                pairs = enumerate(zip(replayed, plain, strict=True))
                same = next((index for index, (ours, theirs) in pairs if ours != theirs), decoded)
                # Attention divides its work by the total that it's told, so later tokens may part within rounding
                yield {"case": f"{name}, CUDA graphs", "ok": same >= 8, "same": same, "tokens_per_second": speed}
                captured = at_once(bundle, provider, decoded, cuda_graphs=True)
                yield {"case": f"{name}, {REQUESTS} requests at once, CUDA graphs", **captured}
            yield {"case": f"{name}, {REQUESTS} requests at once", **at_once(bundle, provider, decoded)}
        except Exception as error:  # the report is for finding out what fails: the next precision may not
            yield {"case": name, "ok": False, "error": f"{type(error).__name__}: {error}"}


def greedy(session: Session, count: int) -> tuple[list[int], float]:
    """Tokens behind a prompt, and how many a second."""
    runner, tokens = session.runner, list[int]()
    runner.rewind()
    token = int(runner.prefill(np.arange(PROMPT) % session.manifest.vocab_size).argmax())
    token = int(runner.decode(token).argmax())  # the first one is captured, or tunes kernels
    start = time.perf_counter()
    for _ in range(count):
        tokens.append(token)
        token = int(runner.decode(token).argmax())
    return tokens, count / (time.perf_counter() - start)


def at_once(bundle: Path, provider: str, count: int, **settings: Any) -> Result:
    """Whether requests are answered together as each is alone, and tokens a second of all."""
    params = SamplingParams(max_new_tokens=count)
    requests = [Request(list(range(300 + 7 * index, 330 + 9 * index)), params=params) for index in range(REQUESTS)]
    answers, seconds = list[list[Any]](), list[float]()
    with Engine.load(
        bundle,
        slots=REQUESTS,
        provider=provider,
        invariant=provider == "cpu",
        prefix_cache="off",  # type: ignore[arg-type]
        **settings,
    ) as engine:
        alone = [engine.generate(request).result().choices for request in requests]
        start = time.perf_counter()
        handles = [engine.submit(request) for request in requests]
        answers = [handle.result().choices for handle in handles]
        seconds.append(time.perf_counter() - start)
    # On a GPU bits depend on what runs beside a row, and two tokens within rounding may change places
    least = REQUESTS if provider == "cpu" else REQUESTS // 2
    same = sum(ours == theirs for ours, theirs in zip(answers, alone, strict=True))
    return {"ok": same >= least, "same_as_alone": same, "tokens_per_second": REQUESTS * count / seconds[0]}


def transformers_speed(model: str | None) -> Iterator[Result]:
    """Greedy tokens a second of transformers in fp16 on the GPU, behind the same prompt."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(locate(model).folder, dtype=torch.float16).to("cuda")
    ids = (torch.arange(PROMPT) % theirs.config.vocab_size)[None].to("cuda")
    settings: Result = {"do_sample": False, "min_new_tokens": DECODED, "max_new_tokens": DECODED}
    for _ in range(2):  # the first one warms up
        torch.cuda.synchronize()
        start = time.perf_counter()
        theirs.generate(ids, **settings)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    yield {"case": "transformers, fp16, prompt and decoding", "ok": True, "tokens_per_second": DECODED / seconds}


def engines(model: str | None, folder: Path) -> Iterator[Result]:
    """Each engine's largest mean KL from PyTorch and its decoding speed; what could not be built or run says why.

    The first of a flavour is built again for eight requests at once, which have a case of their own.
    """
    standard = [("standard", precision, "", "") for precision in ("fp16", "bf16", "fp8", "int8", "int4")]
    plugin = [
        ("plugin", precision, way, cache)
        for precision in ("fp16", "bf16", "int8", "int4")
        for way, cache in (("aliased", ""), ("bound", ""), ("aliased", "int8"))
    ]
    for flavour in installed_flavours():
        for attention, precision, way, cache in [*standard, *(plugin if flavour.takes_plugins else [])]:
            bundle = folder / "-".join(filter(None, (flavour.name, precision, attention, way, cache)))
            command = ["build", *([model] if model else []), "-o", str(bundle), "--target", "tensorrt"]
            command += ["--precision", precision, "--attention", attention, "--engine", flavour.name]
            command += ["--max-seq-len", str(MAX_SEQ_LEN)]
            command += ["--plugin-cache", way] if way else []
            command += ["--kv-cache", cache] if cache else []
            if precision == "fp8" or cache:
                command += ["--calibrate", str(locate(None).folder / "heldout.txt")]
            case = {"case": f"{flavour.name}, {precision}, {attention} attention {way}".rstrip()}
            case["case"] += f", {cache} cache" if cache else ""
            if status := cli.main(command):
                yield {**case, "ok": False, "error": f"glm4export build ended with status {status}"}
                continue
            try:
                with load(bundle, provider="engine") as session:
                    found = verify(session, checkpoint=model)
                    _, speed = greedy(session, DECODED)
            except Exception as error:  # as above
                yield {**case, "ok": False, "error": f"{type(error).__name__}: {error}"}
            else:
                worst = max(phase.mean_kl for phase in found.phases)
                yield {**case, "ok": not found.failures, "mean_kl": worst, "tokens_per_second": speed}
            if (attention, precision) == standard[0][:2]:
                yield {"case": f"{case['case']}, {REQUESTS} requests at once", **engine_batch(bundle, flavour.name)}


def engine_batch(bundle: Path, flavour: str) -> Result:
    """An engine for several requests in the place of the one that a bundle has, and what it gives."""
    if status := cli.main(["engine", str(bundle), "--engine", flavour, "--max-batch", str(REQUESTS)]):
        return {"ok": False, "error": f"glm4export engine ended with status {status}"}
    try:
        return at_once(bundle, "engine", DECODED)
    except Exception as error:  # as above
        return {"ok": False, "error": f"{type(error).__name__}: {error}"}
