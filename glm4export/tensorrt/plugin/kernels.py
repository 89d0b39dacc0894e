"""The attention plugin's three kernels, in Triton: append to the cache, attend, combine.

Their parameters stand in the order in which TensorRT passes them: a plugin's inputs, its scalars, its outputs. A
parameter that a kernel does not read is there because the plugin has that input: a cache that is updated in place is
both an input and an output, at one address.

Offsets into the cache and the mask are 64-bit from the batch row on, since ``batch * max_seq * ...`` leaves 32 bits.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) is exp2(x * LOG2E), and exp2 is what the hardware has
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: added and taken away, it rounds a small float to even


@triton.jit
def _rotate(x_ptr, x_offsets, x_mask, dims, position, cos_ptr, sin_ptr, ROTARY_DIM: tl.constexpr):
    """Load rows and rotate their leading ROTARY_DIM columns as adjacent pairs, in float32.

    x_offsets, x_mask, dims: [rows, head_dim]; position: [rows, 1]. Column d of a pair is turned with its partner d ^ 1,
    which is loaded by itself: no layout changes between registers, and its cache line is there already.
    """
    x = tl.load(x_ptr + x_offsets, mask=x_mask, other=0.0).to(tl.float32)
    turned = x_mask & (dims < ROTARY_DIM)
    partner = tl.load(x_ptr + (x_offsets - dims + (dims ^ 1)), mask=turned, other=0.0).to(tl.float32)
    angle = position * (ROTARY_DIM // 2) + dims // 2
    cos = tl.load(cos_ptr + angle, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=turned, other=0.0).to(tl.float32)
    return x * cos + tl.where(dims % 2 == 0, -partner, partner) * sin


@triton.jit
def _quantize(x, scale):
    """Symmetric int8, rounded to nearest even, as ONNX's QuantizeLinear does."""
    rounded = (tl.div_rn(x, scale) + _ROUND) - _ROUND
    return tl.minimum(tl.maximum(rounded, -128.0), 127.0).to(tl.int8)


@triton.jit
def append(
    qkv, past_key, past_value, position_ids, write_indices, cos, sin, key_scale, value_scale,
    seq, present_key, present_value,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    MAX_SEQ: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Rotate new keys and write new keys and values into the cache, in int8 where it holds that.

    Grid: (cdiv(seq, BLOCK_M), kv_heads, batch), a program for BLOCK_M tokens of one kv head. Rows past the cache's end
    are dropped.
    """
    batch = tl.program_id(2)
    head = tl.program_id(1)
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    dims = tl.arange(0, HEAD_DIM)[None, :]
    row = tl.load(write_indices + batch).to(tl.int32) + token
    kept = (token < seq) & (row >= 0) & (row < MAX_SEQ)
    position = tl.minimum(tl.load(position_ids + batch * seq + token, mask=kept, other=0), MAX_SEQ - 1)
    offsets = (batch * seq + token) * ((NUM_HEADS + 2 * KV_HEADS) * HEAD_DIM) + (NUM_HEADS + head) * HEAD_DIM + dims
    key = _rotate(qkv, offsets, kept, dims, position, cos, sin, ROTARY_DIM)
    value = tl.load(qkv + offsets + KV_HEADS * HEAD_DIM, mask=kept, other=0.0)
    if present_key.dtype.element_ty == tl.int8:
        stored_key = _quantize(key, tl.load(key_scale + head))
        stored_value = _quantize(value.to(tl.float32), tl.load(value_scale + head))
    else:
        stored_key = key.to(present_key.dtype.element_ty)
        stored_value = value
    cache = (batch * KV_HEADS + head).to(tl.int64) * (MAX_SEQ * HEAD_DIM) + row * HEAD_DIM + dims
    tl.store(present_key + cache, stored_key, mask=kept)
    tl.store(present_value + cache, stored_value, mask=kept)


@triton.jit
def attend(
    qkv, key_cache, value_cache, position_ids, write_indices, attention_mask, cos, sin, key_scale, value_scale,
    seq, splits, rows, attended, partial, lse,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    MAX_SEQ: tl.constexpr, SCALE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attend to the cache, with an online softmax over blocks of BLOCK_N of its rows.

    Grid: (cdiv(seq * group, BLOCK_M), splits, batch * kv_heads). A query is a pair of token and head of the group,
    tokens first: the group shares each load of keys and values, and a decoding step of 16 heads per kv head fills a
    16-row tile. With one split ``attended`` is written; with more, ``partial`` [batch * kv_heads, splits, rows,
    head_dim] and ``lse`` [batch * kv_heads, splits, rows], base-2 logarithms of the softmax's denominators, for
    ``combine``. A token sees the cache's rows that the mask shows, up to its own.
    Flash attention: Dao et al., arXiv:2205.14135; its split along the sequence: pytorch.org/blog/flash-decoding.
    """
    GROUP: tl.constexpr = NUM_HEADS // KV_HEADS
    WIDTH: tl.constexpr = (NUM_HEADS + 2 * KV_HEADS) * HEAD_DIM
    QUANTIZED: tl.constexpr = key_cache.dtype.element_ty == tl.int8
    batch = tl.program_id(2) // KV_HEADS
    kv_head = tl.program_id(2) % KV_HEADS
    first = tl.program_id(0) * BLOCK_M
    query = first + tl.arange(0, BLOCK_M)
    token = query // GROUP
    head = kv_head * GROUP + query % GROUP
    real = query < seq * GROUP
    dims = tl.arange(0, HEAD_DIM)

    # Padding may stand past the end of the rotary tables
    position = tl.minimum(tl.load(position_ids + batch * seq + token, mask=real, other=0), MAX_SEQ - 1)
    offsets = (batch * seq + token[:, None]) * WIDTH + head[:, None] * HEAD_DIM + dims[None, :]
    q = _rotate(qkv, offsets, real[:, None], dims[None, :], position[:, None], cos, sin, ROTARY_DIM)
    q = q.to(qkv.dtype.element_ty)
    scale = SCALE * LOG2E
    if QUANTIZED:  # a program has one kv head, so the cache's scales stay out of the loop
        scale = scale * tl.load(key_scale + kv_head)

    # The cache rows that the tile's last token may see, in shares of whole blocks
    start = tl.load(write_indices + batch).to(tl.int32)
    last_token = tl.minimum((first + BLOCK_M - 1) // GROUP, seq - 1)
    end = tl.minimum(start + last_token + 1, MAX_SEQ)
    share = tl.cdiv(tl.cdiv(end, BLOCK_N), splits) * BLOCK_N
    low = tl.program_id(1) * share
    high = tl.minimum(low + share, end)

    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    mixed = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    keys_base = key_cache + (batch * KV_HEADS + kv_head).to(tl.int64) * (MAX_SEQ * HEAD_DIM)
    values_base = value_cache + (batch * KV_HEADS + kv_head).to(tl.int64) * (MAX_SEQ * HEAD_DIM)
    mask_base = attention_mask + (batch * seq + first // GROUP).to(tl.int64) * MAX_SEQ
    mask_rows = (token - first // GROUP)[:, None] * MAX_SEQ
    for block in range(low, high, BLOCK_N):
        column = block + tl.arange(0, BLOCK_N)
        inside = column < high
        keys = tl.load(keys_base + column[None, :] * HEAD_DIM + dims[:, None], mask=inside[None, :], other=0)
        scores = tl.dot(q, keys.to(q.dtype)) * scale
        causal = real[:, None] & inside[None, :] & (column[None, :] <= start + token[:, None])
        shown = tl.load(mask_base + mask_rows + column[None, :], mask=causal, other=0) != 0
        scores = tl.where(shown, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        safe_top = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing shown yet: no inf - inf
        weights = tl.exp2(scores - safe_top[:, None])
        shrink = tl.exp2(top - safe_top)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(values_base + column[:, None] * HEAD_DIM + dims[None, :], mask=inside[:, None], other=0)
        mixed = tl.dot(weights.to(q.dtype), values.to(q.dtype), mixed * shrink[:, None])
        top = new_top

    total = tl.where(total == 0.0, 1.0, total)  # a query that sees nothing gives zeros
    mixed = mixed / total[:, None]
    if QUANTIZED:
        mixed = mixed * tl.load(value_scale + kv_head)
    if splits == 1:
        out = (batch * seq + token[:, None]) * (NUM_HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + dims[None, :]
        tl.store(attended + out, mixed.to(attended.dtype.element_ty), mask=real[:, None])
    else:
        share_row = (tl.program_id(2) * splits + tl.program_id(1)).to(tl.int64) * rows + query
        tl.store(partial + share_row[:, None] * HEAD_DIM + dims[None, :], mixed, mask=real[:, None])
        tl.store(lse + share_row, top + tl.log2(total), mask=real)


@triton.jit
def combine(
    attended, partial, lse, seq, splits, rows, combined,
    NUM_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """Weigh the splits' results by their shares of the softmax. Grid: (rows, kv_heads, batch).

    ``combined`` is ``attended``, in place; with one split that is complete already, and nothing is done.
    """
    if splits > 1:
        GROUP: tl.constexpr = NUM_HEADS // KV_HEADS
        query = tl.program_id(0)
        kv_head = tl.program_id(1)
        batch = tl.program_id(2)
        split = tl.arange(0, MAX_SPLITS)
        dims = tl.arange(0, HEAD_DIM)
        row = ((batch * KV_HEADS + kv_head) * splits + split).to(tl.int64) * rows + query
        logs = tl.load(lse + row, mask=split < splits, other=float("-inf"))
        top = tl.max(logs, 0)
        weights = tl.exp2(logs - tl.where(top == float("-inf"), 0.0, top))
        total = tl.sum(weights, 0)
        # A split that saw nothing weighs nothing, whatever its rows hold
        parts = tl.load(partial + row[:, None] * HEAD_DIM + dims[None, :], mask=(weights > 0.0)[:, None], other=0.0)
        mixed = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
        head = kv_head * GROUP + query % GROUP
        out = (batch * seq + query // GROUP) * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM + dims
        tl.store(combined + out, mixed.to(combined.dtype.element_ty))
