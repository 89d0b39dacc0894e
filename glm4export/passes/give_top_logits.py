"""Give each row's most probable tokens beside its logits, so that a session need not fetch the row to choose one.

``top_logits`` float32 [*dims, count] descending, ``top_ids`` int64 of the same dims, and ``log_sum_exp`` float32
[batch, rows]: what top-p needs to know of the tokens that aren't named.
"""

from __future__ import annotations

import onnx_ir as ir

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, counts
from glm4runtime.contract import LOG_SUM, LOGITS, TOP_IDS, TOP_LOGITS, UserError


@counts(lambda skeleton, count: {"outputs": 3})
def give_top_logits(skeleton: Skeleton, count: int) -> Counts:
    """Counts: ``outputs`` given. Raises UserError where the vocabulary has no more than ``count`` tokens."""
    if count >= skeleton.config.vocab_size:
        raise UserError(
            f"--output-top-logits {count} are not fewer than the vocabulary's {skeleton.config.vocab_size} tokens; "
            "leave it out"
        )
    logits = next(value for value in skeleton.graph.outputs if value.name == LOGITS)
    assert logits.shape is not None
    dims = list(logits.shape)[:-1]

    def constant(name: str, values: list[int]) -> ir.Value:
        return skeleton.constant(name, ir.tensor(values, dtype=ir.DataType.INT64))

    given = [
        ir.val(TOP_LOGITS, ir.DataType.FLOAT, ir.Shape([*dims, count])),
        ir.val(TOP_IDS, ir.DataType.INT64, ir.Shape([*dims, count])),
        ir.val(LOG_SUM, ir.DataType.FLOAT, ir.Shape(dims)),
    ]
    operands = [logits, constant("top/count", [count])]
    top = ir.node("TopK", operands, {"axis": -1, "largest": 1, "sorted": 1}, outputs=given[:2], name="top/TopK")
    operands = [logits, constant("top/axis", [-1])]
    total = ir.node("ReduceLogSumExp", operands, {"keepdims": 0}, outputs=given[2:], name="top/ReduceLogSumExp")
    skeleton.graph.extend([top, total])
    skeleton.graph.outputs.extend(given)
    return {"outputs": len(given)}
