"""Attention as a TensorRT plugin: rotary, cache and attention in three kernels of our own, for full TensorRT.

Why three. A quickly deployable plugin (QDP) with an ahead-of-time implementation launches one kernel, and blocks of
one kernel can't wait for each other. The cache's new rows must be there before they are attended to, and the shares of
a sequence that was split must be there before they are combined. So ``glm4::Attention`` becomes a chain of plugins
(:mod:`.graph`), whose order the graph's edges give:

- ``AppendToCache`` rotates new keys and writes keys and values into the cache, in place;
- ``FlashAttention`` rotates queries and attends to the cache, prefill's way or, split along the sequence, decode's;
- ``CombineSplits`` combines the shares, in place; with one share it returns at once.

One step graph serves both phases, so one chain does: how many shares there are follows from batch and seq, as symbolic
dimensions (:func:`.geometry.split_sizes`), and TensorRT times a tile for decode and a tile for prefill in each
optimization profile (:class:`.register.Tactic`). The two small launches should cost a few microseconds per layer;
appending inside the attention kernel would save one, but make every tile of a prompt rotate the keys before it again.

In place. An output made by ``TensorDesc.aliased()`` shares its input's buffer. What must hold, by TensorRT's headers
and samples: the build sets ``PreviewFeature.ALIASED_PLUGIN_IO_10_03``; an input is aliased by one output only, and by
one plugin only, as here; ``present`` is bound to the address of its ``past``, for results are where the input is.
``get_aliased_input_tensor`` does not report it: the caller must know. Where TensorRT would copy the cache first,
results are the same: kernels read and write through the output.

What TensorRT passes a kernel: inputs, 32-bit scalars, outputs. Triton's two scratch pointers are taken out of the PTX
(:mod:`.aot`), and no launch needs more than 48 KiB of shared memory (:mod:`.tiles`). The parser looks operators up by
name alone, so the node ``glm4::Attention`` itself must not reach it (TensorRT-RTX 1.7.1 answers "only supports
Attention nodes with one output"). TensorRT 11.1 and 11.2.1 are reported to leak memory where an AOT plugin meets
changing shapes (github.com/NVIDIA/TensorRT, issue 4849): prefill in chunks of one size there.

Never run on a GPU or inside full TensorRT: docs/status.md. ``tools/gpu_check.py`` is for whoever has a GPU.
"""
