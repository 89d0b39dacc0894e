"""``glm4export build``: compile a checkpoint into a bundle."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import get_args

from glm4export.build.choices import Attention, CacheName, InputKind, PrefillPrecision
from glm4export.bundle.folder import check_output
from glm4export.commands.engine_options import (
    add_engine_options,
    engine_builder,
    engine_facts,
    engine_lines,
    require_flavour,
)
from glm4export.weights.widths import BLOCKS, Bits
from glm4runtime.contract import CAUSAL_LM, PRECISIONS, TARGETS, TASKS, Precision, Target, TaskName, UserError
from glm4runtime.contract.encoder_spec import POOLINGS

EXAMPLE = "example: glm4export build zai-org/GLM-4-9B-0414 -o glm-4-9b-fp16 --precision fp16"


def configure(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument(
        "model", nargs="?", metavar="MODEL", help="checkpoint folder or hub id; the small embedded model when left out"
    )
    command.add_argument("-o", "--output", type=Path, metavar="OUT", help="bundle folder (default: NAME-PRECISION)")
    command.add_argument(
        "--task",
        choices=("auto", *TASKS),
        default="auto",
        help="default: %(default)s, what the checkpoint's class is for; features may be built of any",
    )
    command.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="with --task features: one embedding per text, its last token's or the mean (default: every token's)",
    )
    command.add_argument("--normalize", action="store_true", help="with --pooling: embeddings of length 1")
    command.add_argument("--precision", choices=PRECISIONS, default="fp16", help="default: %(default)s")
    command.add_argument(
        "--target",
        choices=("auto", *TARGETS),
        default="auto",
        help="default: %(default)s, which is cpu where no GPU is found",
    )
    command.add_argument(
        "--max-seq-len", type=int, metavar="N", help="longest prompt and answer together (default: the model's limit)"
    )
    command.add_argument(
        "--rope-scaling", choices=("yarn",), help="stretch plain rope for texts beyond the model's positions"
    )
    command.add_argument(
        "--rope-factor",
        type=float,
        metavar="F",
        help="how far --rope-scaling stretches it: GLM-4-0414's model cards advise 4 beyond 32768 tokens",
    )
    command.add_argument(
        "--attention",
        choices=get_args(Attention),
        default="standard",
        help="tensorrt: in standard operators, or as one node that full TensorRT runs with this package's kernels "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--kv-cache",
        choices=get_args(CacheName),
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
    command.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="DIR[:SCALE]",
        help="merge a LoRA adapter in peft's layout, a folder or hub id; several are merged in their order",
    )
    command.add_argument(
        "--lora-slots",
        type=int,
        metavar="N",
        help="graphs with side paths for adapters that are chosen as the bundle runs: a session loads up to N of them, "
        "made by `glm4export adapter` (cpu, cuda)",
    )
    command.add_argument("--lora-rank", type=int, metavar="R", help="the largest rank of those (default: 16)")
    command.add_argument(
        "--stages",
        type=int,
        metavar="N",
        help="split the layers over N graphs, for devices that hold a part of the weights each (cpu, cuda)",
    )
    graphs = command.add_argument_group("inputs and outputs, for programs that run the graphs themselves")
    graphs.add_argument(
        "--inputs",
        choices=get_args(InputKind),
        default="ids",
        help="embeds: graphs take inputs_embeds in the place of input_ids (default: %(default)s)",
    )
    graphs.add_argument(
        "--position-ids",
        action="store_true",
        help="positions are an input and masks are read as transformers does, rows padded in front too (cpu)",
    )
    graphs.add_argument("--output-hidden-states", action="store_true", help="outputs hidden_states.0 to .LAYERS")
    graphs.add_argument("--output-attentions", action="store_true", help="outputs attentions.0 to .LAYERS-1 (cpu)")
    graphs.add_argument(
        "--output-top-logits",
        type=int,
        metavar="K",
        help="each row's K most probable tokens and the logarithm of its sum: a session then chooses among these, and "
        "fetches a row from the device only where they can't tell (cpu, cuda)",
    )
    quantized = command.add_argument_group("weights of int8 and int4")
    quantized.add_argument(
        "--block-size",
        type=int,
        choices=sorted(BLOCKS),
        help="weights that share a scale (default: a quantized checkpoint's, else 128)",
    )
    quantized.add_argument(
        "--asymmetric",
        action="store_true",
        help="a zero point beside each block's scale (default: where a quantized checkpoint has them)",
    )
    quantized.add_argument("--head-bits", type=int, choices=get_args(Bits), help="lm_head (default: 8)")
    quantized.add_argument("--embedding-bits", type=int, choices=get_args(Bits), help="default: 16")
    quantized.add_argument(
        "--prefill-precision",
        choices=(*get_args(PrefillPrecision), "auto"),
        help="int8: weights of its own for prefill, more accurate than int4's and on most machines faster, in more "
        "memory (cpu); auto: where this machine's kernel for it is faster, measured once",
    )
    add_engine_options(command, may_skip=True)
    command.add_argument("--revision", help="branch, tag or commit of a hub id")
    command.add_argument("--token", help="hub access token (default: the stored one, or HF_TOKEN)")
    command.add_argument("--no-simplify", action="store_true", help="keep the graphs as the passes left them")
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit status."""
    require_flavour(arguments)
    _check_rope(arguments)
    name = Path(arguments.model).resolve().name if arguments.model else "glm4-demo"
    out = arguments.output or Path(f"{name}-{arguments.precision}")
    inputs = (arguments.model, arguments.calibrate, arguments.timing_cache)
    check_output(out, [Path(path).expanduser() for path in inputs if path])

    from glm4export.build.build import build
    from glm4export.build.options import BuildOptions
    from glm4export.build.targets import detect_target
    from glm4export.sources.checkpoint import locate
    from glm4export.sources.lora import open_adapter
    from glm4export.sources.task import wanted_task
    from glm4export.terminal.progress import byte_bar, note, stage

    location = locate(arguments.model, revision=arguments.revision, token=arguments.token)
    target = detect_target() if arguments.target == "auto" else arguments.target
    prefill = arguments.prefill_precision
    if prefill == "auto":
        prefill, why = _choose_prefill(arguments.precision, target, wanted_task(location.folder, arguments.task))
        note(why)
    options = BuildOptions(
        arguments.precision,
        target,
        arguments.max_seq_len,
        simplify=not arguments.no_simplify,
        block_size=arguments.block_size,
        symmetric=False if arguments.asymmetric else None,
        head_bits=arguments.head_bits,
        embedding_bits=arguments.embedding_bits,
        prefill_precision=prefill,
        kv_cache=arguments.kv_cache,
        calibrate=arguments.calibrate,
        yarn_factor=arguments.rope_factor,
        attention=arguments.attention,
        task=arguments.task,
        pooling=arguments.pooling,
        normalize=arguments.normalize,
        inputs=arguments.inputs,
        position_ids=arguments.position_ids,
        output_hidden_states=arguments.output_hidden_states,
        output_attentions=arguments.output_attentions,
        output_top_logits=arguments.output_top_logits,
        lora_slots=arguments.lora_slots,
        lora_rank=arguments.lora_rank,
        stages=arguments.stages,
    )
    builder = engine_builder(arguments, target)
    adapters = [open_adapter(text, token=arguments.token) for text in arguments.lora]
    manifest = build(location, out, options, stage=stage, bar=byte_bar, adapters=adapters, engines=builder)
    if "tokenizer.json" not in manifest.files:
        note(f"{location.folder}: no tokenizer.json; the bundle takes and gives token ids, not text")
    size = sum(spec.size for spec in manifest.files.values())
    if arguments.json:
        facts = {"bundle": str(out), "target": target, "precision": manifest.precision, "bytes": size}
        engines = {} if builder is None else {"engines": engine_facts(builder.built)}
        cache = {"task": manifest.task} if manifest.kv_cache is None else {"cache_dtype": manifest.kv_cache.dtype}
        print(json.dumps({**facts, "max_seq_len": manifest.max_seq_len, **cache, **engines}))
    else:
        cached = manifest.kv_cache is not None and manifest.kv_cache.dtype == "int8"
        what = f"{manifest.precision}{' with an int8 cache' if cached else ''} for {target}"
        what += "" if manifest.encoder is None else f", {manifest.task}"
        print(f"{out}: {what}, {size / 1e6:.1f} MB, {manifest.max_seq_len} positions")
        print(*engine_lines([] if builder is None else builder.built), sep="\n", end="\n" * (builder is not None))
    return 0


def _check_rope(arguments: argparse.Namespace) -> None:
    scaling, factor = arguments.rope_scaling, arguments.rope_factor
    if (scaling is None) != (factor is None):
        raise UserError("--rope-scaling yarn and --rope-factor F go together; give both or neither")
    if factor is not None and not 1 < factor < math.inf:
        raise UserError(f"--rope-factor {factor} must be a number above 1: how far the positions are stretched")


def _choose_prefill(precision: Precision, target: Target, task: TaskName | None) -> tuple[PrefillPrecision | None, str]:
    """What ``--prefill-precision auto`` comes to on this machine, and a line that says why."""
    from glm4export.bench.kernels import kernel_speeds
    from glm4runtime.backends.ort_session import lacking_kernels

    if task not in (CAUSAL_LM, None):
        return None, f"--prefill-precision auto: none, since {task} has no prefill"
    if target != "cpu" or precision not in ("int8", "int4"):
        return None, "--prefill-precision auto: the weights of the precision, which has no others for prefill"
    if lack := lacking_kernels():
        return None, f"--prefill-precision auto: the precision's own weights, since {lack}"
    speeds = kernel_speeds()
    figures = f"{speeds.int8 / 1e9:.0f} GOP/s against {speeds.int4 / 1e9:.0f} of weights in blocks on this machine"
    if speeds.rows_are_faster:
        return "int8", f"--prefill-precision auto: int8, {figures}"
    return None, f"--prefill-precision auto: the precision's own weights, since int8 has {figures}"
