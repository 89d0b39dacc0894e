"""Rewrite graphs/golden: the reviewed listings of the graphs that every target and precision gets.

    python tools/golden.py

Read the diff before committing it: each change there is a change in what users run.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx_ir as ir
import torch

from glm4export.build.build import compile_graph
from glm4export.build.options import CALIBRATED, PRECISIONS_OF, BuildOptions
from glm4export.graph.skeleton import Skeleton
from glm4export.passes.cut_stages import cut_stages
from glm4export.sources.checkpoint import CONFIG, Checkpoint, locate
from glm4export.sources.config_json import read_config
from glm4export.weights.fp16 import fp16_scales
from glm4graphs.encoder import Encoding
from glm4runtime.contract import MODEL, Precision, Target, graph_names

GOLDEN = Path(__file__).parent.parent / "graphs" / "golden"
_GOLDEN_SEQ_LEN = 512
ENCODERS: dict[
    tuple[Target, Precision, str], Encoding
] = {  # heads without a cache, each in some of the targets and precisions: attention is lowered in one way
    ("cpu", "fp32", "features"): Encoding("features"),
    ("cpu", "fp32", "features-every-option"): Encoding("features"),
    ("cpu", "int4", "features-mean"): Encoding("features", pooling="mean", normalize=True),
    ("cuda", "bf16", "features-last"): Encoding("features", pooling="last"),
    ("cpu", "int8", "sequence-classification"): Encoding("sequence-classification", 3, 2036),
    ("tensorrt", "fp16", "sequence-classification"): Encoding("sequence-classification", 3, None),
    ("cuda", "fp16", "token-classification"): Encoding("token-classification", 3),
    ("tensorrt", "int4", "token-classification"): Encoding("token-classification", 3),
}


def golden_skeletons() -> dict[str, Skeleton]:
    """For the embedded model, each target and precision: path below ``graphs/golden`` and graph."""
    folder = locate(None).folder
    config, checkpoint = read_config(folder / CONFIG), Checkpoint.open(folder)
    variants = {
        f"{target}-{precision}": BuildOptions(precision, target, calibrate=Path() if precision in CALIBRATED else None)
        for target, precisions in PRECISIONS_OF.items()
        for precision in precisions
    }
    variants["cpu-int4-prefill-int8"] = BuildOptions("int4", "cpu", prefill_precision="int8")
    every = {"inputs": "embeds", "position_ids": True, "output_hidden_states": True, "output_attentions": True}
    variants["cpu-fp16-every-option"] = BuildOptions("fp16", "cpu", **every)
    variants["cpu-fp32-cache-int8"] = BuildOptions("fp32", "cpu", kv_cache="int8", calibrate=Path("unread"))
    variants["cpu-fp16-lora-slots"] = BuildOptions("fp16", "cpu", lora_slots=4)
    variants["cuda-int4-top-logits"] = BuildOptions("int4", "cuda", output_top_logits=64)
    variants["cuda-fp16-stages"] = BuildOptions("fp16", "cuda", stages=2)
    tasks: dict[str, Encoding | None] = dict.fromkeys(variants)
    for (target, precision, head), encoding in ENCODERS.items():
        variant = f"{target}-{precision}-{head}"
        options = every if head.endswith("every-option") else {}
        variants[variant], tasks[variant] = BuildOptions(precision, target, **options), encoding
    skeletons: dict[str, Skeleton] = {}
    for variant, options in variants.items():
        scales = fp16_scales(config, checkpoint) if options.compute_dtype == torch.float16 else None
        encoding = tasks[variant]
        names = graph_names(options.target) if encoding is None else (MODEL,)
        graphs = {
            name: compile_graph(config, name, options, max_seq_len=_GOLDEN_SEQ_LEN, scales=scales, encoding=encoding)
            for name in names
        }
        if options.stages is not None:
            _, graphs = cut_stages(graphs, options.stages)
        skeletons |= {str(Path(variant) / f"{name}.txt"): skeleton for name, skeleton in graphs.items()}
    return skeletons


def listing(skeleton: Skeleton) -> str:
    """A graph as text: boundary, weights with their recipes, then one line per node in execution order."""
    graph = skeleton.graph
    opsets = ", ".join(
        f"{domain or 'ai.onnx'} {number}" for domain, number in sorted(skeleton.model.opset_imports.items())
    )
    lines = [f"graph {graph.name}, opset {opsets}", "", "inputs"]
    lines += [f"  {_declared(value)}" for value in graph.inputs]
    lines += ["", "outputs", *(f"  {_declared(value)}" for value in graph.outputs)]
    lines += [
        "",
        "weights",
        *(f"  {name} {list(recipe.shape)} = {recipe}" for name, recipe in skeleton.recipes.items()),
    ]
    lines += ["", "nodes", *(f"  {_node(node)}" for node in graph)]
    return "\n".join(lines) + "\n"


def _declared(value: ir.Value) -> str:
    dims = ", ".join(str(dim) for dim in value.shape or ())
    return f"{value.name} {value.dtype} [{dims}]"


def _node(node: ir.Node) -> str:
    outputs = ", ".join(f"%{value.name}" if value.name else "-" for value in node.outputs)
    inputs = ", ".join(_operand(value) for value in node.inputs)
    attributes = ", ".join(f"{name}={node.attributes[name].value}" for name in sorted(node.attributes))
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return f"{outputs} = {operator}({inputs})" + (f" {{{attributes}}}" if attributes else "")


def _operand(value: ir.Value | None) -> str:
    if value is None:
        return "-"
    if value.const_value is not None and not value.is_graph_input():
        return str(value.const_value.numpy().tolist())
    return f"%{value.name}"


def main() -> None:
    skeletons = golden_skeletons()
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for name, skeleton in skeletons.items():
        path = GOLDEN / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(listing(skeleton), encoding="utf-8")
        print(path.relative_to(GOLDEN.parent.parent))


if __name__ == "__main__":
    main()
