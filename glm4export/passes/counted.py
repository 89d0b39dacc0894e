"""A pass is a rewrite with promised counts, which follow from the config. A pass that matches nothing is an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Concatenate, ParamSpec

from glm4export.graph.skeleton import Skeleton
from glm4export.terminal.errors import InternalError

Counts = dict[str, int]
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Pass:
    """Rewrites a skeleton's nodes and recipes in place, and checks what it counted against what was promised."""

    name: str
    rewrite: Callable[[Skeleton], Counts]
    promised: Callable[[Skeleton], Counts]

    def __call__(self, skeleton: Skeleton) -> Counts:
        """Run it. Raises InternalError where a count isn't the promised one: the graph isn't what passes know."""
        promised = self.promised(skeleton)  # of the skeleton as it comes: of its config and the passes before
        counts = self.rewrite(skeleton)
        wrong = [
            f"{name} {counts[name]}, expected {number}" for name, number in promised.items() if counts[name] != number
        ]
        if wrong:
            packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "onnx", "onnxscript", "onnx-ir"))
            raise InternalError(
                f"{self.name} on the {skeleton.graph.name} graph counted {'; '.join(wrong)}: the traced graph is not "
                f"what this version knows ({packages})"
            )
        skeleton.drop_unused_weights()
        skeleton.passed.append(self.name)
        return counts


def counts(
    promised: Callable[Concatenate[Skeleton, Arguments], Counts],
) -> Callable[[Callable[Concatenate[Skeleton, Arguments], Counts]], Callable[Arguments, Pass]]:
    """Make ``rewrite(skeleton, formats) -> counts`` into ``rewrite(formats)``, the pass with these formats.

    ``promised`` takes the same arguments, whatever they are, and returns the counts that must come out.
    """

    def of(rewrite: Callable[Concatenate[Skeleton, Arguments], Counts]) -> Callable[Arguments, Pass]:
        def bound(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Pass:
            return Pass(
                rewrite.__name__,
                lambda skeleton: rewrite(skeleton, *args, **kwargs),
                lambda skeleton: promised(skeleton, *args, **kwargs),
            )

        bound.__doc__ = rewrite.__doc__
        return bound

    return of


def per_layer(**of_a_layer: int) -> Callable[[Skeleton], Counts]:
    """Counts that are so many times the number of layers."""
    return lambda skeleton: {name: count * skeleton.config.num_hidden_layers for name, count in of_a_layer.items()}


def layers_linears(skeleton: Skeleton) -> Counts:
    """Every linear of every layer, and what they read: the input of q, k and v, of o, of gate_up, of down."""
    layers = skeleton.config.num_hidden_layers
    return {"linears": skeleton.linears_of_layer * layers, "activations": 4 * layers}
