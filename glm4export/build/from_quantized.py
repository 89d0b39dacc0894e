"""Building from a quantized checkpoint: which of its integers a build stores, and what to tell of the others."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping

from glm4export.build.options import BuildOptions
from glm4export.sources.quantized.checkpoint import Linear, QuantizedCheckpoint
from glm4export.weights.storage import HEAD
from glm4export.weights.widths import BLOCKS
from glm4runtime.contract import TENSORRT, UserError


def suited(options: BuildOptions, checkpoint: QuantizedCheckpoint, unused: Collection[str] = ()) -> BuildOptions:
    """The options with block size and symmetry as the checkpoint has them, where they aren't given.

    unused: names of weights that the build leaves out.

    Raises UserError for ``--calibrate`` that would only quantize weights a second time.
    """
    formats = options.formats
    if formats is None:
        return options
    if options.calibrate is not None and options.cache_dtype != "int8" and options.precision != "fp8":
        raise UserError(
            f"--calibrate does not go with {checkpoint.folder}, which is quantized ({checkpoint.declared.method}): "
            "what its weights lost is lost. Leave it out, or add --kv-cache int8, for which the text gives the scales"
        )
    linears = _read(checkpoint, unused)
    layers = [linear for name, linear in linears.items() if name != HEAD and not linear.layout.is_float]
    fitting = [linear.layout for linear in layers if linear.layout.bits <= formats.linear_bits]
    if not fitting:
        return options
    block, symmetric = options.block_size, options.symmetric
    if block is None:
        groups = {min(layout.group or BLOCKS[0], BLOCKS[0]) for layout in fitting}
        block = next((size for size in BLOCKS if all(group % size == 0 for group in groups)), None)
    if symmetric is None and options.target != TENSORRT:
        same = [name for name, linear in linears.items() if linear.layout.bits == formats.linear_bits]
        symmetric = all(checkpoint.is_centred(name) for name in same if not linears[name].layout.is_float)
    return dataclasses.replace(options, block_size=block, symmetric=symmetric)


def described(options: BuildOptions, checkpoint: QuantizedCheckpoint, unused: Collection[str] = ()) -> str:
    """A note: how the checkpoint is quantized, and what becomes of it; ``unused`` as :func:`suited` has it."""
    linears = _read(checkpoint, unused)
    layouts = ", ".join(f"{count} x {layout}" for layout, count in _layouts(linears).items())
    text = f"{checkpoint.folder}: quantized already ({layouts})"
    formats, stored = options.formats, Counter(_stored(options, checkpoint, name) for name in linears)
    kept = stored["kept"]
    if formats is None:
        text += f"; weights are dequantized and stored in {options.precision}"
    elif kept:
        block = f" in blocks of {formats.block}, {'symmetric' if formats.symmetric else 'asymmetric'}"
        block = " by rows" if formats.qdq and formats.linear_bits == 8 else block
        text += f"; {kept} of {len(linears)} weights keep their own numbers, stored{block}"
    if formats is not None and kept < len(linears):
        text += f"; {len(linears) - kept} are dequantized and quantized again, to {options.precision}"
        text += ", which loses more: --precision int8 or fp16 loses less" if formats.linear_bits == 4 else ""
    ordered = sum(checkpoint.is_permuted(name) for name in linears)
    if ordered:
        text += f"; in {ordered} act-order leaves columns of a group apart, which no kernel here takes"
    if options.prefill_precision is not None:
        text += "; prefill's own int8 weights are made from the dequantized ones where they aren't int8 by rows"
    if checkpoint.declared.activations is not None:
        text += f"; its {checkpoint.declared.activations} inputs are not: weights are what is read"
    return text


def _read(checkpoint: QuantizedCheckpoint, unused: Collection[str]) -> dict[str, Linear]:
    return {name: linear for name, linear in checkpoint.linears.items() if name not in unused}


def _layouts(linears: Mapping[str, Linear]) -> dict[str, int]:
    return dict(Counter(str(linear.layout) for linear in linears.values()).most_common())


def _stored(options: BuildOptions, checkpoint: QuantizedCheckpoint, name: str) -> str:
    """``kept`` where a weight's own integers are stored, else ``again``."""
    formats = options.formats
    if formats is None:
        return "again"
    scheme = formats.scheme(name, checkpoint.linears[name].shape[1])
    if scheme is not None:
        return "kept" if checkpoint.has(name, scheme) else "again"
    if formats.bits(name) == 16:
        return "again"
    dtype = "float8_e4m3fn" if options.precision == "fp8" and name != HEAD else "int8"
    return "kept" if checkpoint.has_rows(name, dtype) else "again"
