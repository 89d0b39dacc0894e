"""Reading a graph into a TensorRT network: errors in the model's words, and what the parser recognised."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from glm4runtime.contract import UserError
from glm4runtime.contract.engine_spec import FULL, PLUGIN, PLUGINS_OF_LAYER, STANDARD

# Fused layers by TensorRT's name, and how many of each one decoder layer of the model has.
FUSED = {
    STANDARD: {"ATTENTION_OUTPUT": 1, "ROTARY_EMBEDDING": 2, "KV_CACHE_UPDATE": 2},
    PLUGIN: {"PLUGIN_V3": PLUGINS_OF_LAYER},
    FULL: {"ATTENTION_OUTPUT": 1, "ROTARY_EMBEDDING": 2},
}

_LAYER = re.compile(r"model\.layers\.\d+")


class Log:
    """What TensorRT said: errors as text, and sizes in bytes that it states nowhere else."""

    # Said wherever there's no GPU; building for another machine's GPU goes on all the same.
    HARMLESS = "CUDA driver version is insufficient"
    _SIZES = re.compile(r"^Total (Weights|Activation) Memory: (\d+) bytes")

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.sizes: dict[str, int] = {}

    def add(self, message: str, *, error: bool) -> None:
        """One message; those below an error are looked through for sizes."""
        if error and self.HARMLESS not in message:
            self.errors.append(message.strip())
        elif found := self._SIZES.match(message):
            self.sizes[found[1].lower()] = int(found[2])

    def text(self) -> str:
        """The errors on one line."""
        lines = (line.strip() for error in self.errors for line in error.splitlines())
        return "; ".join(dict.fromkeys(filter(None, lines))) or "TensorRT gave no reason"


def logger(module: Any, log: Log) -> Any:
    """A logger object of the flavour's that writes into ``log``."""

    class Logger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            log.add(message, error=int(severity) <= int(module.ILogger.Severity.ERROR))

    return Logger()


def new_network(module: Any, builder: Any) -> Any:
    """A strongly typed network. TensorRT 11 and RTX make no other kind, and 11 may drop the flag."""
    flag = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if flag is None else 1 << int(flag))


def parse(module: Any, network: Any, trt_logger: Any, graph: Path, log: Log) -> Any:
    """Read ``graph`` and, by memory map, the weights file beside it into ``network``.

    Returns the parser, which holds the weights: it must live as long as the network. Raises UserError naming the graph
    node and the model's layer that TensorRT can't take.
    """
    parser = module.OnnxParser(network, trt_logger)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise UserError("; ".join(dict.fromkeys(map(describe, errors))) or f"{graph.name}: {log.text()}")
    return parser


def describe(error: Any) -> str:
    """One parser error: the node, the layer of the model that it came from, and TensorRT's reason."""
    name, kind, reason = error.node_name(), error.node_operator(), " ".join(error.desc().split())
    where = f"node {name!r} ({kind})" if name else "the graph as a whole"
    if layer := _LAYER.search(name):
        where += f" of {layer[0]}"
    return f"TensorRT can't take {where}: {reason}"


def count_layers(network: Any) -> dict[str, int]:
    """The network's layers by type, most frequent first; types as ``LayerType`` names them."""
    types = (network.get_layer(index).type for index in range(network.num_layers))
    return dict(Counter(kind.name for kind in types).most_common())


def require_fused(counts: dict[str, int], layers: int, attention: str) -> None:
    """Raise UserError unless every attention, rotary embedding and cache update was recognised as such.

    A cache update that became an ordinary scatter would copy the cache, and break where past and present share memory.
    """
    for kind, each in FUSED[attention].items():
        if (found := counts.get(kind, 0)) != layers * each:
            raise UserError(
                f"TensorRT recognised {found} of {layers * each} {kind.lower().replace('_', ' ')} layers; "
                "TensorRT 10.15 and TensorRT-RTX 1.7 have them all: upgrade it"
            )
