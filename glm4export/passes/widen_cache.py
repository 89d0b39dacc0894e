"""Keep the KV cache in int8 and attend over a float copy of it: for long runs of tokens on a CPU.

ONNX Runtime's CPU kernel multiplies an int8 cache row by row. That suits one token; over 512 it takes four times as
long as the float kernel (onnxruntime 1.32, AVX2). So prefill copies the past to float, attends, and scatters what is
new into the int8 cache, where it is what :mod:`glm4export.passes.quantize_cache` has the kernel store. The keys and
values of the run itself it reads unrounded.

The copy is as long as the past, not as the buffer, and one layer's at a time. For that the nodes around each attention
are tied to it: ONNX Runtime runs nodes that wait for nothing first, and nodes that nothing waits for last.
"""

from __future__ import annotations

import onnx_ir as ir

from glm4export.graph.skeleton import Skeleton
from glm4export.passes.counted import Counts, counts, per_layer
from glm4export.passes.lower_attention_gqa import CONTRIB
from glm4export.passes.quantize_cache import Int8Cache, int8_caches
from glm4runtime.contract import ATTENTION_MASK

_TENSOR_SCATTER_OPSET = 24
_COS = 7  # GroupQueryAttention's input that has the dtype it computes in
_TOKENS = 2  # the dim of a cache [batch, kv_heads, max_seq, head_dim] that tokens lie along
_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


@counts(per_layer(caches=2))
def widen_cache(skeleton: Skeleton) -> Counts:
    """Counts: ``caches``, two per layer, that are int8 now."""
    layers = list(int8_caches(skeleton))
    if layers:
        shared = _Shared(skeleton, layers[0][0])
        for attention, caches in layers:
            _Layer(skeleton, attention, caches, shared).widen()
    skeleton.model.opset_imports[""] = _TENSOR_SCATTER_OPSET
    return {"caches": sum(len(caches) for _, caches in layers)}


class _Shared:
    """Constants, and the number of tokens that the caches hold after the run: int64 [1]."""

    def __init__(self, skeleton: Skeleton, anchor: ir.Node) -> None:
        (mask,) = (value for value in skeleton.graph.inputs if value.name == ATTENTION_MASK)

        def constant(name: str, value: float | list[int], dtype: ir.DataType) -> ir.Value:
            return skeleton.constant(f"cache/{name}", ir.tensor(value, dtype=dtype))

        self.start = constant("start", [0], _INT64)
        self.axis = constant("axis", [_TOKENS], _INT64)
        self.as_they_are = constant("as_they_are", [0, -1], _INT64)  # dims of a Reshape
        self.one = constant("one", 1.0, _FLOAT)
        self.zero = constant("zero", 0, ir.DataType.INT8)
        bounds = {"start": 1, "end": 2}
        self.total = skeleton.insert_before(anchor, "cache/total", "Shape", [mask], bounds).outputs[0]


class _Layer:
    """One layer's attention and the nodes that go around it."""

    def __init__(self, skeleton: Skeleton, attention: ir.Node, caches: list[Int8Cache], shared: _Shared) -> None:
        self.skeleton, self.attention, self.caches, self.shared = skeleton, attention, caches, shared
        query, cos = attention.inputs[0], attention.inputs[_COS]
        assert query is not None and cos is not None and cos.dtype is not None and attention.name is not None
        self.query, self.compute, self.name = query, cos.dtype, attention.name
        self.scope = self.name.rsplit("/", 1)[0]

    def widen(self) -> None:
        """Replace the attention."""
        attention = self.attention
        # Of this layer's query, so that the past is not read before the layers in front are done.
        new = self._add("cache/New", "Shape", [self.query], start=1, end=2)
        past = self._add("cache/Past", "Sub", [self.shared.total, new])  # int64 [1]
        batch = self._add("cache/Batch", "Shape", [self.query], start=0, end=1)
        write = self._add("cache/WriteIndices", "Expand", [past, batch])  # int64 [batch]
        inputs = list(attention.inputs)
        for cache in self.caches:
            inputs[cache.input_index] = self._wide(cache, past)
        outputs = [ir.val(f"{self.name}:{index}") for index in range(len(attention.outputs))]
        attributes = {name: attribute.value for name, attribute in attention.attributes.items()}
        self.skeleton.insert_before(
            attention, self.name, "GroupQueryAttention", inputs, attributes, domain=CONTRIB, outputs=outputs
        )
        stored = [self._store(cache, outputs[cache.output_index], past, write) for cache in self.caches]
        # A reshape to the shape it has, that waits for both caches.
        rows = [
            self._add("Rows", "Shape", [present], cache, start=0, end=1)
            for cache, present in zip(self.caches, stored, strict=True)
        ]
        shape = [self._add("cache/Most", "Max", rows), self.shared.as_they_are]
        attended = self._add(
            "cache/Attended", "Reshape", [outputs[0], self._add("cache/Dims", "Concat", shape, axis=0)]
        )
        self.skeleton.replace_outputs(attention, [attended, *stored])
        attended.name = f"{self.scope}/cache/Attended"  # the presents' names are the graph's; this one is its node's

    def _wide(self, cache: Int8Cache, past: ir.Value) -> ir.Value:
        """The past's keys or values in the dtype that attention computes in: [batch, kv_heads, past, head_dim]."""
        buffer = self._buffer(cache)
        steps = self._add("Past", "Slice", [buffer, self.shared.start, past, self.shared.axis], cache)
        wide = self._add("Widened", "Mul", [self._cast("PastCast", steps, _FLOAT, cache), cache.scales], cache)
        return wide if self.compute == _FLOAT else self._cast("WidenedCast", wide, self.compute, cache)

    def _store(self, cache: Int8Cache, present: ir.Value, past: ir.Value, write: ir.Value) -> ir.Value:
        """Write what is behind the past into the int8 buffer; the graph's output."""
        new = self._add("New", "Slice", [present, past, self.shared.total, self.shared.axis], cache)
        if self.compute != _FLOAT:
            new = self._cast("NewCast", new, _FLOAT, cache)
        steps = self._add("Steps", "Div", [new, cache.scales], cache)
        stored = self._add("Stored", "QuantizeLinear", [steps, self.shared.one, self.shared.zero], cache)
        return self._add("TensorScatter", "TensorScatter", [self._buffer(cache), stored, write], cache, axis=_TOKENS)

    def _buffer(self, cache: Int8Cache) -> ir.Value:
        buffer = self.attention.inputs[cache.input_index]
        assert buffer is not None
        return buffer

    def _cast(self, name: str, value: ir.Value, dtype: ir.DataType, cache: Int8Cache) -> ir.Value:
        return self._add(name, "Cast", [value], cache, to=int(dtype))

    def _add(
        self, name: str, op_type: str, inputs: list[ir.Value], cache: Int8Cache | None = None, **attributes: int
    ) -> ir.Value:
        full = f"{self.scope}/{name}" if cache is None else f"{self.scope}/{cache.part}_cache/{name}"
        return self.skeleton.insert_before(self.attention, full, op_type, inputs, attributes).outputs[0]
