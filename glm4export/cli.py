"""The command line. Only argparse here: each command imports what it needs when it runs, so ``--help`` is instant."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm4export import streams
from glm4export.errors import message_text, printable_lines
from glm4export.output import check_output
from glm4export.tensorrt.cli_options import (
    add_engine_options,
    engine_builder,
    engine_facts,
    engine_lines,
    require_flavour,
)
from glm4runtime import signals
from glm4runtime.contract import MANIFEST, TENSORRT, UserError
from glm4runtime.providers import PROVIDERS, default_provider

PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "int8", "int4")
TARGETS = ("auto", "cpu", "cuda", "tensorrt")
CACHES = ("fp32", "fp16", "int8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 (verify: past its thresholds), 2 (the user's mistake), 130.

    SIGHUP, SIGINT and SIGTERM end the process, with 128 and their number; see :mod:`glm4runtime.signals`.
    """
    streams.prepare()
    with signals.handled():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    try:
        try:
            arguments = _parser().parse_args(argv)
            status: int = arguments.run(arguments)
            return status
        finally:
            print(end="", flush=True)  # here, where a broken pipe is caught
    except UserError as error:
        return _complain(str(error))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        return _complain(f"{error.name} is not installed; pip install 'glm4export[{extra}]'")
    except KeyboardInterrupt:  # in a conversation
        streams.complain("interrupted")
        return 130
    except BrokenPipeError:  # the reader went away, as `| head` does
        streams.drop()
        return 1
    except OSError as error:  # standard output on a full disk, a file that can't be read
        streams.drop()
        return _complain(str(error))


_EXTRAS = {
    "torch": "compile",
    "onnx": "compile",
    "onnx_ir": "compile",
    "onnxscript": "compile",
    "safetensors": "compile",
    "tqdm": "compile",
    "onnxruntime": "cpu",
    "matplotlib": "bench",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glm4export", description="Compile GLM-4 to ONNX prefill and decode graphs, and run them.", epilog=_EXAMPLE
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_build, _add_engine, _add_generate, _add_verify, _add_inspect, _add_prepare, _add_bench):
        add(commands)
    return parser


_EXAMPLE = "example: glm4export build zai-org/GLM-4-9B-0414 -o glm-4-9b-fp16 --precision fp16"


def _add_build(commands: Any) -> None:
    command = commands.add_parser("build", help="compile a checkpoint into a bundle", epilog=_EXAMPLE)
    command.add_argument(
        "model", nargs="?", metavar="MODEL", help="checkpoint folder or hub id; the small embedded model when left out"
    )
    command.add_argument("-o", "--output", type=Path, metavar="OUT", help="bundle folder (default: NAME-PRECISION)")
    command.add_argument("--precision", choices=PRECISIONS, default="fp16", help="default: %(default)s")
    command.add_argument(
        "--target", choices=TARGETS, default="auto", help="default: %(default)s, which is cpu where no GPU is found"
    )
    command.add_argument(
        "--max-seq-len", type=int, metavar="N", help="longest prompt and answer together (default: the model's limit)"
    )
    command.add_argument(
        "--attention",
        choices=("standard", "plugin"),
        default="standard",
        help="tensorrt: in standard operators, or as one node that full TensorRT runs with this package's kernels "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--kv-cache",
        choices=CACHES,
        help="int8, with --calibrate, takes a quarter of fp32's memory and half of fp16's (default: the dtype that "
        "attention computes in)",
    )
    command.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="text like the model's use: gives an int8 cache and fp8 activations their scales, and int8 and int4 "
        "weights that are closer to fp32, in a slower build",
    )
    quantized = command.add_argument_group("weights of int8 and int4")
    quantized.add_argument(
        "--block-size", type=int, choices=(32, 64, 128), default=128, help="weights that share a scale (default: 128)"
    )
    quantized.add_argument("--asymmetric", action="store_true", help="a zero point a block beside its scale")
    quantized.add_argument("--head-bits", type=int, choices=(4, 8, 16), default=8, help="lm_head (default: 8)")
    quantized.add_argument("--embedding-bits", type=int, choices=(4, 8, 16), default=16, help="default: 16")
    quantized.add_argument(
        "--prefill-precision",
        choices=("int8",),
        help="weights of its own for prefill, faster and more accurate than int4's, in more memory (cpu)",
    )
    add_engine_options(command, may_skip=True)
    command.add_argument("--revision", help="branch, tag or commit of a hub id")
    command.add_argument("--token", help="hub access token (default: the stored one, or HF_TOKEN)")
    command.add_argument("--no-simplify", action="store_true", help="keep the graphs as the passes left them")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=_build)


def _build(arguments: argparse.Namespace) -> int:
    require_flavour(arguments)
    name = Path(arguments.model).resolve().name if arguments.model else "glm4-demo"
    out = arguments.output or Path(f"{name}-{arguments.precision}")
    inputs = (arguments.model, arguments.calibrate, arguments.timing_cache)
    check_output(out, [Path(path).expanduser() for path in inputs if path])

    from glm4export.checkpoint import locate
    from glm4export.compile import build, detect_target
    from glm4export.options import BuildOptions
    from glm4export.progress import byte_bar, note, stage

    location = locate(arguments.model, revision=arguments.revision, token=arguments.token)
    target = detect_target() if arguments.target == "auto" else arguments.target
    options = BuildOptions(
        arguments.precision,
        target,
        arguments.max_seq_len,
        simplify=not arguments.no_simplify,
        block_size=arguments.block_size,
        symmetric=not arguments.asymmetric,
        head_bits=arguments.head_bits,
        embedding_bits=arguments.embedding_bits,
        prefill_precision=arguments.prefill_precision,
        kv_cache=arguments.kv_cache,
        calibrate=arguments.calibrate,
        attention=arguments.attention,
    )
    builder = engine_builder(arguments, target)
    manifest = build(location, out, options, stage=stage, bar=byte_bar, engines=builder)
    if "tokenizer.json" not in manifest.files:
        note(f"{location.folder}: no tokenizer.json; the bundle takes and gives token ids, not text")
    size = sum(spec.size for spec in manifest.files.values())
    if arguments.json:
        facts = {"bundle": str(out), "target": target, "precision": manifest.precision, "bytes": size}
        engines = {} if builder is None else {"engines": engine_facts(builder.built)}
        cache = manifest.cache
        print(json.dumps({**facts, "max_seq_len": cache.max_seq_len, "cache_dtype": cache.dtype, **engines}))
    else:
        what = f"{manifest.precision}{' with an int8 cache' if manifest.cache.dtype == 'int8' else ''} for {target}"
        print(f"{out}: {what}, {size / 1e6:.1f} MB, {manifest.cache.max_seq_len} positions")
        print(*engine_lines([] if builder is None else builder.built), sep="\n", end="\n" * (builder is not None))
    return 0


def _add_engine(commands: Any) -> None:
    command = commands.add_parser(
        "engine",
        help="build TensorRT engines for a finished bundle; no checkpoint needed",
        epilog="example: glm4export engine glm-4-9b-fp16 --compute-capability 8.6 8.9",
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE", help="one that was built for --target tensorrt")
    add_engine_options(command, may_skip=False)
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=_engine)


def _engine(arguments: argparse.Namespace) -> int:
    from glm4export.tensorrt.engines import add_engines
    from glm4runtime.contract import read_manifest

    read_manifest(arguments.bundle)  # a bundle that isn't one is told before a TensorRT that isn't there
    builder = engine_builder(arguments, TENSORRT)
    assert builder is not None
    add_engines(arguments.bundle, builder)
    if arguments.json:
        print(json.dumps({"bundle": str(arguments.bundle), "engines": engine_facts(builder.built)}))
    else:
        print(f"{arguments.bundle}:", *engine_lines(builder.built), sep="\n")
    return 0


def _add_generate(commands: Any) -> None:
    command = commands.add_parser(
        "generate",
        help="answer a prompt, or chat",
        epilog='example: glm4export generate glm4-demo-fp16 --prompt "What is the capital of France?"',
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE")
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="one question; - reads it from standard input")
    what.add_argument("--chat", action="store_true", help="a conversation, a line a question, until Ctrl-D")
    command.add_argument(
        "--raw", action="store_true", help="with --prompt: continue the text, without the chat template"
    )
    command.add_argument("--system", metavar="TEXT", help="system message")
    command.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer before TEXT; may be given again"
    )
    command.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="a Jinja template in place of the bundle's own"
    )
    command.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    command.add_argument("--temperature", type=float, default=0.0, help="default: %(default)s, which is greedy")
    command.add_argument("--top-k", type=int, default=0, metavar="K", help="default: %(default)s, which is off")
    command.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: %(default)s, which is off")
    command.add_argument("--seed", type=int, help="the same seed gives the same text")
    command.add_argument(
        "--lookup",
        type=int,
        default=0,
        metavar="N",
        help="guess up to N tokens per step where the text repeats itself: faster (try 7)",
    )
    _add_session_options(command)
    command.add_argument("--json", action="store_true", help="with --prompt: print text, reason and timing as JSON")
    command.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    from glm4export import generate
    from glm4runtime import SamplingParams
    from glm4runtime.lookup import check_limit

    check_limit(arguments.lookup)
    if arguments.chat and (arguments.json or arguments.raw):
        raise UserError("--json and --raw go with --prompt, not with --chat")
    for option, value in (("--system", arguments.system), ("--chat-template", arguments.chat_template)):
        if arguments.raw and value is not None:
            raise UserError(f"{option} needs the chat template; leave out --raw")
    params = SamplingParams(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        max_new_tokens=arguments.max_new_tokens,
    )
    session = _load(arguments, chat_template=arguments.chat_template)
    if arguments.chat:
        with signals.raised():  # Ctrl-C ends an answer
            generate.converse(session, params, system=arguments.system, lookup=arguments.lookup, stop=arguments.stop)
        return 0
    prompt = generate.read_prompt() if arguments.prompt == "-" else arguments.prompt
    generate.answer(
        session,
        prompt,
        params,
        raw=arguments.raw,
        system=arguments.system,
        as_json=arguments.json,
        lookup=arguments.lookup,
        stop=arguments.stop,
    )
    return 0


def _add_verify(commands: Any) -> None:
    command = commands.add_parser(
        "verify",
        help="compare a bundle with PyTorch in fp32; exit status 1 past the thresholds",
        epilog="example: glm4export verify glm-4-9b-fp16 --checkpoint ./GLM-4-9B-0414",
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE")
    command.add_argument(
        "--checkpoint", metavar="MODEL", help="what it was built from; needed where that was a local folder"
    )
    command.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="instead of the built-in ones")
    command.add_argument(
        "--steps", type=int, default=32, metavar="N", help="decode steps a prompt (default: %(default)s)"
    )
    command.add_argument(
        "--long",
        action="store_true",
        help="also fill the cache to its last row, where rotary tables and YaRN may be wrong: minutes to hours, since "
        "PyTorch computes as many tokens in fp32 (--max-seq-len makes them fewer)",
    )
    command.add_argument(
        "--max-kl", type=float, metavar="NATS", help="mean KL divergence allowed in a phase (default: by precision)"
    )
    command.add_argument(
        "--min-top1", type=float, metavar="SHARE", help="top-1 agreement asked over all (default: by precision)"
    )
    _add_session_options(command)
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from glm4export import verify

    session = _load(arguments, check_hashes=True)
    default = verify.thresholds_of(session.manifest)
    thresholds = verify.Thresholds(
        mean_kl=default.mean_kl if arguments.max_kl is None else arguments.max_kl,
        top1=default.top1 if arguments.min_top1 is None else arguments.min_top1,
    )
    report = verify.verify(
        session,
        checkpoint=arguments.checkpoint,
        prompts=arguments.prompt,
        steps=arguments.steps,
        long=arguments.long,
        thresholds=thresholds,
    )
    print(json.dumps(report.to_dict(), ensure_ascii=False) if arguments.json else verify.table(report))
    return 1 if report.failures else 0


def _add_inspect(commands: Any) -> None:
    command = commands.add_parser(
        "inspect",
        help="show what a bundle holds, or what a model will take before it is built",
        epilog="example: glm4export inspect zai-org/GLM-4-9B-0414 --json",
    )
    command.add_argument("what", metavar="BUNDLE|MODEL", help="bundle folder, checkpoint folder, or hub id")
    command.add_argument("--check-hashes", action="store_true", help="compare every file of a bundle with its sha256")
    command.add_argument("--target", choices=TARGETS, default="auto", help="what a model is to be built for")
    command.add_argument("--revision", help="branch, tag or commit of a hub id")
    command.add_argument("--token", help="hub access token (default: the stored one, or HF_TOKEN)")
    command.add_argument("--json", action="store_true", help="print the facts as JSON")
    command.set_defaults(run=_inspect)


def _inspect(arguments: argparse.Namespace) -> int:
    from glm4export import inspect
    from glm4export.checkpoint import ADAPTER, CONFIG, locate
    from glm4export.compile import detect_target

    folder = Path(arguments.what)
    model = any((folder / name).is_file() for name in (CONFIG, ADAPTER)) and not (folder / MANIFEST).is_file()
    if model or not folder.exists():
        location = locate(arguments.what, revision=arguments.revision, token=arguments.token, weights=False)
        target = detect_target() if arguments.target == "auto" else arguments.target
        facts = inspect.inspect_model(location, target)
        shown = inspect.model_text(arguments.what, facts)
    else:
        facts = inspect.inspect_bundle(folder, check_hashes=arguments.check_hashes)
        shown = inspect.text(facts)
    print(json.dumps(facts, ensure_ascii=False) if arguments.json else printable_lines(shown))
    return 0


def _add_bench(commands: Any) -> None:
    command = commands.add_parser(
        "bench",
        help="measure speed and memory beside this machine's limits",
        epilog="example: glm4export bench glm4-demo-fp16 --prefill 128,512 --plot bench.png",
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE")
    command.add_argument("--prefill", metavar="N,N", help="prompt lengths (default: 32,128,512,2048; what fits)")
    command.add_argument(
        "--decode-context",
        metavar="N,N",
        help="tokens in the cache before the timed steps (default: 16,512,2048; what fits)",
    )
    command.add_argument(
        "--batch",
        metavar="N,N",
        help="sequences decoded at once; beyond 1 at the shortest context (default: 1,2,4,8; for tensorrt 1)",
    )
    command.add_argument("--steps", type=int, default=32, metavar="N", help="decode steps a run (default: %(default)s)")
    command.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each (default: %(default)s)")
    command.add_argument("--plot", type=Path, metavar="FILE", help="write a roofline and length curves, .png or .svg")
    _add_session_options(command)
    command.add_argument("--json", action="store_true", help="print all raw figures as JSON")
    command.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    from glm4export import bench, bench_report

    prefill = bench.numbers("--prefill", arguments.prefill)
    contexts = bench.numbers("--decode-context", arguments.decode_context)
    batches = bench.numbers("--batch", arguments.batch)
    if arguments.plot:
        from glm4export import plot

        plot.check(arguments.plot)
    session = _load(arguments)
    plan = bench.plan(
        session.runner.max_seq_len,
        prefill=prefill,
        contexts=contexts,
        batches=batches or ((1,) if session.manifest.target == TENSORRT else bench.BATCHES),
        steps=arguments.steps,
        repeats=arguments.repeats,
    )
    provider = arguments.provider or default_provider(session.manifest)
    report = bench.bench(session, plan, provider=provider, threads=arguments.threads)
    print(json.dumps(report.to_dict(), ensure_ascii=False) if arguments.json else bench_report.table(report))
    if arguments.plot:
        plot.write(report, arguments.plot)
    return 0


def _add_prepare(commands: Any) -> None:
    command = commands.add_parser(
        "prepare",
        help="save a bundle's weights as this machine's kernels want them: one copy in memory",
        epilog="example: glm4export prepare glm-4-9b-int4",
    )
    command.add_argument("bundle", type=Path, metavar="BUNDLE")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=_prepare)


def _prepare(arguments: argparse.Namespace) -> int:
    from glm4runtime.contract import read_manifest
    from glm4runtime.prepare import prepare

    prepared = prepare(arguments.bundle, read_manifest(arguments.bundle))
    if arguments.json:
        print(json.dumps({"bundle": str(arguments.bundle), "prepared": str(prepared)}))
    else:
        print(f"{prepared}: ready for this machine")
    return 0


def _add_session_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--provider",
        choices=PROVIDERS,
        help="default: the bundle's target; bundles for tensorrt run on their engine by default, and in ONNX Runtime "
        "on the other four",
    )
    command.add_argument("--threads", type=int, default=0, metavar="N", help="default: 0, onnxruntime chooses")
    command.add_argument("--max-seq-len", type=int, metavar="N", help="length of the cache (default: the bundle's)")
    command.add_argument(
        "--invariant",
        action="store_true",
        help="the same tokens, to the bit, with and without --lookup; int8 and int4 then decode up to a fifth slower",
    )


def _load(arguments: argparse.Namespace, *, check_hashes: bool = False, chat_template: Path | None = None) -> Any:
    from glm4runtime import load

    return load(
        arguments.bundle,
        provider=arguments.provider,
        threads=arguments.threads,
        max_seq_len=arguments.max_seq_len,
        check_hashes=check_hashes,
        invariant=arguments.invariant,
        chat_template=chat_template,
    )


def _complain(message: str) -> int:
    streams.complain(f"glm4export: error: {message_text(message)}")
    return 2
