"""Activations by their names in config.json, transformers' ``ACT2FN``: what a feed-forward makes of gate and up.

Left out are those with weights of their own: ``prelu`` and ``xielu``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Gating = Callable[[Tensor, Tensor], Tensor]  # of gate and up, each [..., intermediate], in one dtype


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _gelu_clipped(x: Tensor) -> Tensor:
    return F.gelu(x).clamp(-10, 10)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _laplace(x: Tensor) -> Tensor:
    """Ma et al., 2022, https://arxiv.org/abs/2209.10655, with the constants of its appendix."""
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


def _linear(x: Tensor) -> Tensor:
    return x


def _sqrt_softplus(x: Tensor) -> Tensor:
    return F.softplus(x).sqrt()


def _relu_squared(gate: Tensor, up: Tensor) -> Tensor:
    """So et al., 2021, https://arxiv.org/abs/2109.08668. In this order gate² alone can't overflow float16."""
    positive = F.relu(gate)
    return positive * (positive * up)


def _gating(activation: Callable[[Tensor], Tensor]) -> Gating:
    return lambda gate, up: activation(gate) * up


_OF_GATE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": _gelu_clipped,
    "gelu_accurate": _gelu_tanh,  # the same formula by five names
    "gelu_fast": _gelu_tanh,
    "gelu_new": _gelu_tanh,
    "gelu_python": F.gelu,
    "gelu_python_tanh": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "hardswish": F.hardswish,
    "laplace": _laplace,
    "leaky_relu": F.leaky_relu,
    "linear": _linear,
    "mish": F.mish,
    "quick_gelu": _quick_gelu,
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": _sqrt_softplus,
    "swish": F.silu,
    "tanh": torch.tanh,
}
ACTIVATIONS: dict[str, Gating] = {
    **{name: _gating(activation) for name, activation in _OF_GATE.items()},
    "relu2": _relu_squared,
}
