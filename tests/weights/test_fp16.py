"""fp16 where GLM-4's activations leave its range: the exact rescale against a plain cast."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Glm4ForCausalLM

from glm4export.build import build as compiler
from glm4export.sources.checkpoint import Checkpoint, locate
from glm4export.sources.config_json import read_config
from glm4export.verification.verify import kl_divergence
from glm4export.weights.fp16 import BRANCH_SCALE, Fp16Scales, fp16_scales
from glm4runtime.text.tokenizer import Tokenizer
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.logits import every_logit

TEXTS = np.random.default_rng(1).integers(0, 96, (6, 60)).tolist()


def overflowing_model() -> Glm4ForCausalLM:
    """Weights enlarged until a down_proj output passes 1e6 and o_proj's passes fp16's range, as GLM-4-0414's do."""
    model = checkpoints.random_model(seed=4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate_up_proj.weight *= 20
            layer.mlp.down_proj.weight *= 600
            layer.self_attn.v_proj.weight *= 300
            layer.self_attn.o_proj.weight *= 300
    return model


def with_scales(scales: Fp16Scales | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds from here on rescale by these, whatever they compute in; None: not at all."""
    compile_graph = compiler.compile_graph
    monkeypatch.setattr(
        compiler, "compile_graph", lambda *args, **given: compile_graph(*args, **given | {"scales": scales})
    )


def largest_outputs(model: Glm4ForCausalLM) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        if name.endswith(("down_proj", "o_proj")):
            kind = name.rsplit(".", 1)[-1]
            module.register_forward_hook(
                lambda _, __, out, kind=kind: found.update({kind: max(found.get(kind, 0.0), float(out.abs().max()))})
            )
    with torch.no_grad():
        model(torch.tensor(TEXTS))
    return found


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(overflowing_model(), tmp_path_factory.mktemp("overflow"))


def test_the_checkpoint_overflows_fp16() -> None:
    found = largest_outputs(overflowing_model())
    assert found["down_proj"] > 1e6
    assert found["o_proj"] > 65504


def test_rescaled_fp16_is_finite_where_a_plain_cast_is_not(
    overflowing: Path, build_bundle: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = every_logit(build_bundle(overflowing, precision="fp32", target="cpu"), TEXTS)
    rescaled = every_logit(build_bundle(overflowing, precision="fp16", target="cpu"), TEXTS, strict=True)
    assert np.isfinite(rescaled).all()
    assert (rescaled.argmax(-1) == wanted.argmax(-1)).mean() >= 0.98

    with_scales(None, monkeypatch)
    naive = every_logit(build_bundle(overflowing, precision="fp16", target="cpu"), TEXTS, strict=True)
    assert np.isnan(naive).any()


def test_rescale_is_exact(build_bundle: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 the rescaled graph is the same function: powers of two change exponents only."""
    model = checkpoints.random_model(tie_word_embeddings=True)
    plain = build_bundle(model, precision="fp32", target="cpu")
    with_scales(Fp16Scales(branch=2.0**-10, residual=2.0**-3), monkeypatch)
    rescaled = build_bundle(model, precision="fp32", target="cpu")
    assert (rescaled / "weights.bin").read_bytes() != (plain / "weights.bin").read_bytes()
    assert BRANCH_SCALE == 2.0**-7
    np.testing.assert_allclose(every_logit(rescaled, TEXTS), every_logit(plain, TEXTS), rtol=0, atol=1e-6)


def test_residual_scale_follows_the_proven_bound(tmp_path: Path) -> None:
    """sqrt(hidden) * |weight| bounds an RMSNorm; only a stream that may leave fp16's range is scaled."""
    model = checkpoints.random_model()
    folder = checkpoints.save(model, tmp_path / "ordinary")
    assert fp16_scales(read_config(folder / "config.json"), Checkpoint.open(folder)).residual == 1.0
    with torch.no_grad():
        model.model.layers[1].post_mlp_layernorm.weight[3] = 20000.0  # alone: 8 * 20000 = 160000
    folder = checkpoints.save(model, tmp_path / "loud")
    scales = fp16_scales(read_config(folder / "config.json"), Checkpoint.open(folder))
    assert scales == type(scales)(branch=BRANCH_SCALE, residual=2.0**-3)


def test_loud_residual_stream_stays_finite(build_bundle: Build) -> None:
    model = checkpoints.random_model()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.post_mlp_layernorm.weight *= 20000
    wanted = every_logit(build_bundle(model, precision="fp32", target="cpu"), TEXTS)
    found = every_logit(build_bundle(model, precision="fp16", target="cpu"), TEXTS, strict=True)
    assert np.isfinite(found).all()
    assert (found.argmax(-1) == wanted.argmax(-1)).mean() >= 0.98


@pytest.mark.parametrize("strict", [False, True], ids=["as CPU kernels run it", "as a GPU would round it"])
def test_embedded_model_is_four_times_closer_to_fp32_than_bf16(demo_bundles: dict[str, Path], strict: bool) -> None:
    folder = locate(None).folder
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    tokens = Tokenizer.from_file(folder / "tokenizer.json").encode(text)[:512]
    ours = every_logit(demo_bundles["fp16"], [tokens], strict=strict)[0]
    wanted = every_logit(demo_bundles["fp32"], [tokens])[0]
    bf16 = Glm4ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        theirs = bf16(torch.tensor([tokens])).logits[0].float().numpy()
    assert kl_divergence(wanted, ours).mean() <= kl_divergence(wanted, theirs).mean() / 4
