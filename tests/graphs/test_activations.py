"""Activations beside transformers', in PyTorch and in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS, ACT2FN

from glm4graphs.activations import ACTIVATIONS


class _Every(nn.Module):
    """All activations of one gate, for one export."""

    def forward(self, gate: Tensor, up: Tensor) -> list[Tensor]:
        return [gating(gate, up) for gating in ACTIVATIONS.values()]


def test_activations_are_transformers_in_pytorch_and_in_onnx_runtime() -> None:
    gate = torch.linspace(-30, 30, 2048).reshape(2, 1024)
    up = torch.linspace(0.5, -1, 1024).expand(2, -1)
    exported = torch.onnx.export(
        torch.export.export(_Every(), (gate, up)), dynamo=True, optimize=False, opset_version=23, verbose=False
    )
    assert exported is not None
    onnx.checker.check_model(exported.model_proto, full_check=True)
    session = ort.InferenceSession(exported.model_proto.SerializeToString())
    inputs = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), (gate, up), strict=True)}
    for name, found in zip(ACTIVATIONS, session.run(None, inputs), strict=True):
        wanted = ACT2FN[name](gate) * up
        ours = ACTIVATIONS[name](gate, up)
        torch.testing.assert_close(ours, wanted, rtol=3e-6, atol=3e-6, msg=lambda text, name=name: f"{name}: {text}")
        np.testing.assert_allclose(found, wanted.numpy(), rtol=3e-6, atol=3e-6, err_msg=name)


def test_every_activation_of_transformers_is_built_but_those_with_weights() -> None:
    assert ACT2CLS.keys() - ACTIVATIONS.keys() == {"prelu", "xielu"}
    assert all(list(ACT2FN[name].parameters()) for name in ("prelu", "xielu"))
    assert ACTIVATIONS.keys() <= ACT2CLS.keys()


def test_a_squared_gate_alone_does_not_overflow_float16() -> None:
    """With up scaled as the fp16 pass scales it; gate² is 1e6."""
    gate, up = torch.tensor([1000.0]).half(), torch.tensor([3 * 2.0**-7]).half()
    assert ACT2FN["relu2"](gate).isinf()
    torch.testing.assert_close(ACTIVATIONS["relu2"](gate, up).float(), torch.tensor([3e6 * 2.0**-7]), rtol=1e-3, atol=0)
