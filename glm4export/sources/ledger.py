"""The ledger of tensors: those that a geometry needs, and how a checkpoint's tensors differ from them.

Arithmetic on names and shapes: a config may speak of more layers than a list of their names would fit any memory.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice

from glm4export.terminal.errors import MOST_LINES, listed, printable
from glm4export.weights.storage import EMBEDDING, HEAD, SCORE, SCORE_BIAS
from glm4graphs.config import Glm4Config
from glm4graphs.encoder import FEATURES, TOKEN_CLASSIFICATION, Encoding

Shape = tuple[int, ...]

_IN_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,9})\.(.+)")
_WRAPPERS = {  # what stands in front of every name, and where it comes from
    "_orig_mod.": "it was saved from a torch.compile'd model: save model._orig_mod",
    "module.": "it was saved from inside DataParallel or DistributedDataParallel: save model.module",
    "base_model.model.": "it was saved from inside a PEFT model: save what its merge_and_unload() returns",
}


def tensor_shapes(config: Glm4Config, encoding: Encoding | None = None) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Names and shapes of the tensors around the layers, and of a layer's, behind ``model.layers.N.``.

    ``encoding`` None stands for a causal language model, here and below.
    """
    hidden, inner, query, kv = config.hidden_size, config.intermediate_size, config.query_size, config.kv_size
    table = (config.vocab_size, hidden)
    outer: dict[str, Shape] = {EMBEDDING: table, "model.norm.weight": (hidden,)}
    if encoding is None:
        outer[HEAD] = table
    elif encoding.task != FEATURES:
        outer[SCORE] = (encoding.num_labels, hidden)
        if encoding.task == TOKEN_CLASSIFICATION:
            outer[SCORE_BIAS] = (encoding.num_labels,)
    layer: dict[str, Shape] = {"input_layernorm.weight": (hidden,)}
    for part, rows in (("q", query), ("k", kv), ("v", kv)):
        layer[f"self_attn.{part}_proj.weight"] = (rows, hidden)
        if config.attention_bias:
            layer[f"self_attn.{part}_proj.bias"] = (rows,)
    layer |= {
        "self_attn.o_proj.weight": (hidden, query),
        "post_self_attn_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_up_proj.weight": (2 * inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "post_mlp_layernorm.weight": (hidden,),
    }
    return outer, layer


def expected_tensors(config: Glm4Config, encoding: Encoding | None = None) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of the tensors that a checkpoint of this geometry holds, in the model's order."""
    outer, layer = tensor_shapes(config, encoding)
    yield EMBEDDING, outer.pop(EMBEDDING)
    for index in range(config.num_hidden_layers):
        yield from ((f"model.layers.{index}.{name}", shape) for name, shape in layer.items())
    yield from outer.items()


def expected_shape(name: str, config: Glm4Config, encoding: Encoding | None = None) -> Shape | None:
    """The shape that a tensor of this geometry has; None for one that it hasn't."""
    return _expected_shape(name, config, *tensor_shapes(config, encoding))


def unused_heads(names: Collection[str], encoding: Encoding | None) -> list[str]:
    """Tensors of heads that a task leaves out: features all, which may be made of any checkpoint, classifiers lm_head.

    transformers' classes pass over them too.
    """
    if encoding is None:
        return []
    others = (HEAD, SCORE, SCORE_BIAS) if encoding.task == FEATURES else (HEAD,)
    return [name for name in others if name in names]


def classifier_head(config: Glm4Config, encoding: Encoding | None) -> dict[str, Shape]:
    """Names and shapes of a classifier's own tensors; empty for every other task."""
    outer, _ = tensor_shapes(config, encoding)
    return {name: shape for name, shape in outer.items() if name in (SCORE, SCORE_BIAS)}


def mismatches(
    found: Mapping[str, Shape],
    config: Glm4Config,
    encoding: Encoding | None = None,
    missing_parts: Sequence[str] = (),
    misshaped_parts: Sequence[str] = (),
) -> str | None:
    """How the tensors that are there differ from the config's: a heading and a line for each of the first; or None.

    A weight that several tensors stand for is found in its own name and shape; what is wrong with them comes in lines.
    """
    unused = unused_heads(found, encoding)
    found = {name: shape for name, shape in found.items() if name not in unused}
    optional = {HEAD} if config.tie_word_embeddings and encoding is None else set()
    outer, layer = tensor_shapes(config, encoding)
    expected = {name: shape for name in found if (shape := _expected_shape(name, config, outer, layer))}
    absent = (item for item in expected_tensors(config, encoding) if item[0] not in found and item[0] not in optional)
    count = len(outer) + config.num_hidden_layers * len(layer) - len(optional - found.keys()) - len(expected)
    missing = [f"missing {name} {list(shape)}" for name, shape in islice(absent, min(count, MOST_LINES))]
    missing += missing_parts
    count += len(missing_parts)
    unexpected = [f"unexpected {name} {list(found[name])}" for name in sorted(found.keys() - expected.keys())]
    misshaped = [
        f"mis-shaped {name}: {list(found[name])}, expected {list(expected[name])}"
        for name in sorted(expected)
        if found[name] != expected[name]
    ]
    misshaped += misshaped_parts
    counted = [(missing, count), (unexpected, len(unexpected)), (misshaped, len(misshaped))]
    counted = [(lines, number) for lines, number in counted if number]
    if not counted:
        return None
    most = MOST_LINES // len(counted)
    text = f"{sum(number for _, number in counted)} tensors do not match config.json; is it this model's config?"
    text += "".join(f"\n  {listed(lines, number, most)}" for lines, number in counted)
    stored = len({match[1] for name in found if (match := _IN_LAYER.fullmatch(name))})
    if stored != config.num_hidden_layers:
        text += f"\n  num_hidden_layers={config.num_hidden_layers}, and tensors of {stored} layers are here"
    return text


def wrapped(names: Collection[str]) -> str | None:
    """What is wrong with a whole model whose names all begin with a wrapper's prefix; None where they don't."""
    for name in names:
        prefix = name.removesuffix(EMBEDDING)
        if name != prefix != "" and all(other.startswith(prefix) for other in names):
            why = next((why for known, why in _WRAPPERS.items() if prefix.startswith(known)), "save the model inside")
            return f"every tensor's name begins with `{printable(prefix)}`; {why}, or strip it from the names"
    return None


def _expected_shape(
    name: str, config: Glm4Config, outer: Mapping[str, Shape], layer: Mapping[str, Shape]
) -> Shape | None:
    match = _IN_LAYER.fullmatch(name)
    if match is None or int(match[1]) >= config.num_hidden_layers:
        return outer.get(name)
    return layer.get(match[2])
