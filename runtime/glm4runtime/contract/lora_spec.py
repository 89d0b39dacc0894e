"""The manifest's ``lora``: what a bundle built with ``--lora-slots`` takes beside tokens, and its inputs' names.

Each linear of a layer, W, has a side path in the graph: ``y = W x + ((x Aᵀ) · gate) B``. A and B are inputs of as many
rows as are given, none by default; the gate says which rows of them each sequence of a batch uses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from glm4runtime.contract.json_reader import FieldReader

LORA = "lora."  # in front of the names of all these inputs
LORA_GATE = "lora.gate"  # [batch, 1, rows]: 1 for the rows of A and B that a sequence uses, 0 for the others
LORA_QKV_GATE = "lora.qkv_gate"  # the same of qkv_proj, where q, k and v have rows of their own, one after another
#: The linears that have a side path, by their last component, and how many projections lie fused in each.
LORA_MODULES = {"qkv_proj": 3, "o_proj": 1, "gate_up_proj": 1, "down_proj": 1}
LORA_PARTS = ("A", "B")  # [rows, in] and [rows, out]: B is transposed, and holds the adapter's scaling


def lora_name(layer: int, module: str, part: str) -> str:
    """Graph input of one linear's A or B."""
    return f"{LORA}{layer}.{module}.{part}"


def lora_module(name: str) -> str:
    """The linear, a key of LORA_MODULES, that an input of that name belongs to."""
    return name.split(".")[2]


@dataclass(frozen=True)
class LoraSpec:
    """How many adapters a session may hold, of which rank, and what of them is scaled."""

    slots: int
    rank: int  # the most
    branch_scale: float  # fp16: o_proj and the up half of gate_up_proj give so many times their values, so B must too

    @classmethod
    def read(cls, read: FieldReader) -> LoraSpec:
        """Raises BundleError for values out of range."""
        scale: float = read("branch_scale", float)
        if not (math.isfinite(scale) and scale > 0):
            raise read.error(f"branch_scale is {scale}, expected a number above 0")
        return cls(read.positive("slots"), read.positive("rank"), scale)

    def scaled_from(self, module: str, width: int) -> int:
        """The first of B's columns, [rows, width], that branch_scale is for: none of qkv_proj's or down_proj's."""
        return {"o_proj": 0, "gate_up_proj": width // 2}.get(module, width)
