"""Check a bundle's graph files against its manifest, before anything is opened or allocated, and choose among them.

A manifest's sizes decide how much memory is taken; the graphs' are the ones that fit the weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from glm4runtime.contract import (
    ATTENTIONS,
    DECODE,
    HIDDEN_STATES,
    INPUTS_EMBEDS,
    LOG_SUM,
    LOGITS,
    LORA,
    LORA_GATE,
    LORA_MODULES,
    LORA_PARTS,
    LORA_QKV_GATE,
    POSITION_IDS,
    PREFILL,
    STREAM,
    TOP_IDS,
    TOP_LOGITS,
    BundleError,
    CacheSpec,
    EncoderSpec,
    GraphName,
    GraphSpec,
    Manifest,
    TensorSpec,
    UserError,
    encoder_output,
    graph_names,
    past_name,
    present_name,
    shown,
    stream_name,
)
from glm4runtime.contract.onnxfile import Graph, read_graph

_PARTS = ("key", "value")
_FLOATS = ("float32", "float16", "bfloat16")
_EMBEDDING = "model.embed_tokens.weight"
_COSINES = {"GroupQueryAttention": 7, "RotaryEmbedding": 1}  # which input holds a cosine for every position


def require_graphs(folder: Path, manifest: Manifest) -> None:
    """Raise BundleError unless every graph has the inputs, outputs, cache and files that the manifest lists."""
    names = graph_names(manifest.target, manifest.task)
    layers = {part: own for name in names for part, own in manifest.parts(name).items()}
    for name, spec in manifest.graphs.items():
        path = folder / spec.file
        graph = read_graph(path)
        _require_same(path, "input", graph.inputs, spec.inputs)
        _require_same(path, "output", graph.outputs, spec.outputs)
        if manifest.encoder is None:
            own = layers.get(name, range(manifest.cache.layers))
            if own.stop == manifest.cache.layers:
                _require_vocabulary(path, graph, manifest.vocab_size)
            _require_cache(path, graph, manifest.cache, own)
            _require_top_logits(path, graph, manifest.vocab_size)
        else:
            _require_encoder(path, graph, manifest, manifest.encoder)
        _require_lora(path, graph, manifest)
        for file in sorted(graph.files):
            if (Path(spec.file).parent / file).as_posix() not in manifest.files:
                raise _error(path, f"it reads a file {shown(file)} that the manifest doesn't list")
    for name in names:
        _require_streams(folder, manifest, name)


def _require_streams(folder: Path, manifest: Manifest, graph: GraphName) -> None:
    """Every stage takes what the one before it gives, which is the stream in front of its layers."""
    given: list[TensorSpec] = []
    parts = manifest.parts(graph)
    for part, layers in parts.items():
        spec = manifest.graphs[part]
        taken, before = [tensor for tensor in spec.inputs if tensor.name.startswith(STREAM)], given
        given = [tensor for tensor in spec.outputs if tensor.name.startswith(STREAM)]
        wanted = [stream_name(layers.start)] if layers.start else []
        if taken != before or [tensor.name for tensor in taken] != wanted:
            has, gives = (", ".join(map(_words, tensors)) or "nothing" for tensors in (taken, before))
            raise _error(
                folder / spec.file,
                f"from the stage before it takes {has}, expected {', '.join(wanted) or 'nothing'}; it gets {gives}",
            )
    if given:
        raise _error(folder / spec.file, f"it gives {', '.join(map(_words, given))}, and no stage comes behind it")


def require_token_ids(folder: Path, manifest: Manifest) -> None:
    """Raise UserError for a bundle whose graphs take embeddings: a session has token ids to give, and no table."""
    if any(tensor.name == INPUTS_EMBEDS for spec in manifest.graphs.values() for tensor in spec.inputs):
        raise UserError(
            f"{folder}: built with --inputs embeds, so its graphs take {INPUTS_EMBEDS}: run them with onnxruntime, or "
            "build without it for a session, which gives token ids"
        )


def takes_positions(graph: GraphSpec) -> bool:
    """whether a graph has positions for an input, as ``--position-ids`` builds them."""
    return any(tensor.name == POSITION_IDS for tensor in graph.inputs)


def graphs_to_open(folder: Path, manifest: Manifest) -> tuple[GraphName, ...]:
    """Of a bundle's prefill and decode graphs, those that a session needs: the first for prompts, the last for steps.

    Prefill computes whichever rows of logits are asked for, and so everything. Only where decode has other kernels or
    weights is it needed as well: beside int8 prefill, and on a CPU with an int8 cache, over which prompts attend to a
    wider copy. Raises BundleError where a graph can't be read.
    """
    prefill, decode = (read_whole(folder, manifest, name) for name in (PREFILL, DECODE))
    return (PREFILL,) if _weighted(prefill) == _weighted(decode) else (PREFILL, DECODE)


def read_whole(folder: Path, manifest: Manifest, name: GraphName) -> Graph:
    """A graph as read from its file, or its stages' files put together. Raises BundleError where one can't be read."""
    parts = [read_graph(folder / manifest.graphs[part].file) for part in manifest.parts(name)]
    return Graph(
        nodes=tuple(node for part in parts for node in part.nodes),
        stored={name: stored for part in parts for name, stored in part.stored.items()},
        inputs=tuple(dict.fromkeys(spec for part in parts for spec in part.inputs)),
        outputs=tuple(spec for part in parts for spec in part.outputs),
        files=frozenset(file for part in parts for file in part.files),
    )


def _weighted(graph: Graph) -> Counter[tuple[object, ...]]:
    """The operators that read stored numbers, with attributes and the names of what they read.

    int64 numbers are shapes and indices.
    """
    numbers = {name for name, stored in graph.stored.items() if stored.dtype != "int64"}
    read = ((node, tuple(name for name in node.inputs if name in numbers)) for node in graph.nodes)
    return Counter((node.domain, node.op, node.attributes, names) for node, names in read if names)


def _require_vocabulary(path: Path, graph: Graph, vocab_size: int) -> None:
    vocab = next((output.dims[-1:] for output in graph.outputs if output.name == LOGITS), ())
    if vocab != (vocab_size,):
        raise _error(path, f"its logits are {shown(list(vocab))} wide, the manifest's vocab_size is {vocab_size}")


def _require_top_logits(path: Path, graph: Graph, vocab_size: int) -> None:
    """All three outputs for held rows, of as many tokens, or none: buffers are as large as they say."""
    names = (TOP_LOGITS, TOP_IDS, LOG_SUM)
    found = {output.name: output for output in graph.outputs if output.name in names}
    if not found:
        return
    count = found[TOP_LOGITS].dims[-1] if TOP_LOGITS in found and found[TOP_LOGITS].dims else 0
    rows: tuple[str, ...] = ("batch", "rows")
    wanted = zip(names, ("float32", "int64", "float32"), ((*rows, count), (*rows, count), rows), strict=True)
    fits = isinstance(count, int) and 0 < count < vocab_size
    if not fits or list(found.values()) != [TensorSpec(*spec) for spec in wanted]:
        told = ", ".join(map(_words, found.values()))
        raise _error(path, f"it gives {told}; expected {', '.join(names)}, of fewer tokens than {vocab_size}")


def _require_encoder(path: Path, graph: Graph, manifest: Manifest, encoder: EncoderSpec) -> None:
    wanted = encoder_output(manifest.task, encoder.pooling)
    width = len(encoder.labels) or manifest.config["hidden_size"]
    outputs = [output for output in graph.outputs if not output.name.startswith((HIDDEN_STATES, ATTENTIONS))]
    if [(output.name, output.dims[-1:]) for output in outputs] != [(wanted, (width,))]:
        found = ", ".join(_words(output) for output in graph.outputs)
        raise _error(path, f"it gives {found}; for the manifest's {manifest.task} it should give {wanted!r} of {width}")
    for name, stored in graph.stored.items():
        if name.startswith(_EMBEDDING) and stored.shape[:1] != (manifest.vocab_size,):
            rows = stored.shape[0] if stored.shape else 0
            raise _error(path, f"it knows {rows} tokens, the manifest's vocab_size is {manifest.vocab_size}")
    _require_positions(path, graph, encoder.max_seq_len, "encoder")


def _require_lora(path: Path, graph: Graph, manifest: Manifest) -> None:
    """Its inputs for adapters: the gates and matrices of linears that are known, where the manifest speaks of slots."""
    inputs = [spec for spec in graph.inputs if spec.name.startswith(LORA)]
    if bool(inputs) != (manifest.lora is not None):
        raise _error(path, f"it has {len(inputs)} inputs for adapters, the manifest's lora is {shown(manifest.lora)}")
    gates = {spec.name for spec in inputs} & {LORA_GATE, LORA_QKV_GATE}
    if inputs and len(gates) != 2:
        raise _error(path, f"it lacks {LORA_GATE} or {LORA_QKV_GATE}")
    for spec in inputs:
        parts = spec.name.split(".")
        named = len(parts) == 4 and parts[2] in LORA_MODULES and parts[3] in LORA_PARTS
        sized = len(spec.dims) == 2 and isinstance(spec.dims[1], int)
        if spec.dtype not in _FLOATS or not (spec.name in gates or (named and sized)):
            raise _error(path, f"{_words(spec)} is no input for an adapter")


def _require_same(path: Path, kind: str, found: Sequence[TensorSpec], told: Sequence[TensorSpec]) -> None:
    for own, listed in zip(found, told, strict=False):
        if own != listed:
            raise _error(path, f"its {kind} is {_words(own)}, the manifest says {_words(listed)}")
    if len(found) != len(told):
        raise _error(path, f"it has {len(found)} {kind}s, the manifest lists {len(told)}")


def _require_cache(path: Path, graph: Graph, cache: CacheSpec, layers: range) -> None:
    """Compare the cache with the graph's, whose number of tensors bounds the loops over layers, here and elsewhere."""
    tensors = {spec.name: spec for spec in (*graph.inputs, *graph.outputs)}
    has = sum(spec.name.startswith("past_key_values.") for spec in graph.inputs)
    if has != 2 * len(layers):
        raise _error(path, f"it has keys and values of {has / 2:g} layers, the manifest's cache of {len(layers)}")
    for name in (name(layer, part) for layer in layers for part in _PARTS for name in (past_name, present_name)):
        spec = tensors.get(name)
        if spec is None:
            raise _error(path, f"it has no {name}")
        told = (cache.dtype, ("batch", cache.kv_heads, cache.max_seq_len, cache.head_dim))
        dims = tuple(told[1][2] if index == 2 and isinstance(dim, str) else dim for index, dim in enumerate(spec.dims))
        if (spec.dtype, dims) != told:
            raise _error(path, f"it has {_words(spec)}, the manifest's cache is {told[0]} {list(told[1])}")
    _require_positions(path, graph, cache.max_seq_len, "cache")


def _require_positions(path: Path, graph: Graph, max_seq_len: int, what: str) -> None:
    for node in graph.nodes:
        cosines = node.inputs[_COSINES[node.op] :][:1] if node.op in _COSINES else ()
        for name in cosines:
            if name in graph.stored and max_seq_len > (rows := graph.stored[name].shape[0]):
                raise _error(path, f"it knows {rows} positions, the manifest's {what} has {max_seq_len}")


def _words(spec: TensorSpec) -> str:
    return f"{shown(spec.name)} {spec.dtype} {shown(list(spec.dims))}"


def _error(path: Path, message: str) -> BundleError:
    return BundleError(f"{path}: {message}; copy or build the bundle again")
