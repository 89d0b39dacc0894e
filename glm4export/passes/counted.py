"""A pass is a rewrite with promised counts, which follow from the config. A pass that matches nothing is an error."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version

from glm4export.graph.skeleton import Skeleton
from glm4export.terminal.errors import InternalError

Counts = dict[str, int]


class Pass:
    """Rewrites a skeleton's nodes and recipes in place, and checks what it counted against what was promised."""

    def __init__(self, rewrite: Callable[[Skeleton], Counts], promised: Callable[[Skeleton], Counts]) -> None:
        self.name = rewrite.__name__
        self.__doc__ = rewrite.__doc__
        self._rewrite, self._promised = rewrite, promised

    def __call__(self, skeleton: Skeleton) -> Counts:
        """Run it. Raises InternalError where a count isn't the promised one: the graph isn't what passes know."""
        promised = self._promised(skeleton)  # of the skeleton as it comes: of its config, its options, passes before
        counts = self._rewrite(skeleton)
        wrong = [
            f"{name} {counts[name]}, expected {number}" for name, number in promised.items() if counts[name] != number
        ]
        if wrong:
            packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnx", "onnxscript", "onnx-ir"))
            raise InternalError(
                f"{self.name} on the {skeleton.graph.name} graph counted {'; '.join(wrong)}: the traced graph is not "
                f"what this version knows ({packages})"
            )
        skeleton.passed.append(self.name)
        return counts


def counts(promised: Callable[[Skeleton], Counts]) -> Callable[[Callable[[Skeleton], Counts]], Pass]:
    """Make a function that rewrites a skeleton and returns its counts a pass that promises these."""
    return lambda rewrite: Pass(rewrite, promised)


def per_layer(**of_a_layer: int) -> Callable[[Skeleton], Counts]:
    """Counts that are so many times the number of layers."""
    return lambda skeleton: {name: count * skeleton.config.num_hidden_layers for name, count in of_a_layer.items()}
