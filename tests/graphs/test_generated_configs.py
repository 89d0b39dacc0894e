"""Generated models beside transformers' classes: 156 of them, over heads, options, ropes, sizes, padding.

Most run as :mod:`glm4graphs` in PyTorch, which is what a build traces; 36 are built, and run in ONNX Runtime.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from glm4export.graph.trace import trace_encoder
from glm4export.sources.config_json import ConfigError, parse_config, sequence_limit
from glm4graphs.activations import ACTIVATIONS
from glm4graphs.encoder import EncoderGraph, Encoding
from glm4graphs.graphs import GRAPHS, Graph
from glm4runtime import load
from tests.conftest import Build
from tests.helpers import checkpoints
from tests.helpers.configs import MASKS, POSITIONS, TASKS, Case, built_cases, case, config_of
from tests.helpers.encoders import batch, output_of, pooled, random_encoder
from tests.helpers.models import ROPE_TYPES, save, spelled
from tests.helpers.parity import TOLERANCE, check_parity, reference

CASES = [case(seed) for seed in range(120)]
BUILT = list(built_cases())


def by_name(case: Case) -> str:
    return case.name


def texts(case: Case) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [batch, seq]: a text exactly at the bound, one of a token, one of padding alone."""
    longest, vocab = case.model.positions, checkpoints.SMALL["vocab_size"]
    lengths = [longest] * 2 if case.mask in ("none", "holes") else [longest, 3, 1, 0]
    ids, mask = batch(lengths, "left" if case.mask == "left" else "right", vocab, case.seed)
    if case.mask == "holes":
        mask = torch.randint(0, 2, mask.shape, generator=torch.Generator().manual_seed(case.seed))
    return (ids[:1], mask[:1]) if case.pad is None else (ids, mask)


@pytest.mark.parametrize("case", [case for case in CASES if case.task == "causal-lm"], ids=by_name)
def test_causal_models(case: Case) -> None:
    """Logits of every position, as ``logits_to_keep=0`` gives them: in one run, and token by token behind a prompt."""
    model = checkpoints.random_model(case.seed, **case.model.fields)
    config = parse_config(spelled(case.model, model.config.to_dict() | {"architectures": ["Glm4ForCausalLM"]}), "c")
    positions = case.model.positions
    graph = Graph(config, positions, *GRAPHS["decode"]).eval()
    graph.load_state_dict(model.state_dict())
    tokens = np.random.default_rng(case.seed).integers(0, config.vocab_size, positions)

    @torch.no_grad()
    def run(lengths: list[int], *ends: int) -> Tensor:
        """Logits [batch, seq, vocab] of the tokens' beginnings of those lengths, padded on the right, run by run."""
        shape = (len(lengths), config.num_key_value_heads, positions, config.head_dim)
        cache = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]
        rows, done = [], 0
        for end in ends:
            mask = (torch.arange(end) < torch.tensor(lengths)[:, None]).long()
            ids = torch.tensor(tokens[done:end]).expand(len(lengths), -1)
            logits, cache = graph({"input_ids": ids, "attention_mask": mask}, cache)
            rows, done = [*rows, logits], end
        return torch.cat(rows, 1)

    wanted = reference(model, tokens.tolist())
    lengths = [positions] if case.mask == "none" else [positions, 5, 1]
    for found, length in zip(run(lengths, positions), lengths, strict=True):
        assert np.abs(found[:length].numpy() - wanted[:length]).max() <= TOLERANCE
    last = range(positions - 4, positions + 1)
    assert np.abs(run([positions], *last)[0].numpy() - wanted).max() <= TOLERANCE


@pytest.mark.parametrize("case", [case for case in CASES if case.task != "causal-lm"], ids=by_name)
def test_models_without_a_cache(case: Case) -> None:
    model = random_encoder(case.task, case.seed, **case.model.fields, num_labels=case.num_labels, pad_token_id=case.pad)
    config = parse_config(spelled(case.model, model.config.to_dict() | {"architectures": ["Glm4Model"]}), "c")
    features = case.task == "features"
    labels, pad = (0, None) if features else (case.num_labels, case.pad)
    encoding = Encoding(case.task, labels, pad, case.pooling, case.normalize)
    graph = EncoderGraph(config, case.model.positions, encoding).eval()
    graph.load_state_dict({f"model.{name}" if features else name: value for name, value in model.state_dict().items()})
    ids, mask = texts(case)
    with torch.no_grad():
        found, wanted = graph({"input_ids": ids, "attention_mask": mask}), output_of(model, ids, mask)
    wanted = pooled(wanted, mask, case.pooling, case.normalize)
    assert found.isfinite().all() and found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", BUILT, ids=by_name)
def test_built(case: Case, build_bundle: Build, tmp_path: Path) -> None:
    causal = case.task == "causal-lm"
    if causal:
        model = checkpoints.random_model(case.seed, **case.model.fields)
    else:
        model = random_encoder(case.task, case.seed, **case.model.fields)
    folder = save(case.model, model, tmp_path)
    bundle = build_bundle(folder, precision="fp32", target=case.target, max_seq_len=POSITIONS)
    ids, mask = texts(case)
    if causal:
        with load(bundle, provider="cpu") as session:
            check_parity(session, model, ids[0, :16].tolist())  # to the last position
        return
    session = ort.InferenceSession(bundle / "model.onnx")
    (found,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    wanted = output_of(model, ids, mask).numpy()
    assert found.dtype == np.float32 and found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= TOLERANCE


def test_what_the_cases_cover() -> None:
    every = [*CASES, *BUILT]
    assert len({(case.task, case.target, json.dumps(case.model.fields), case.pooling) for case in every}) >= 150
    assert len(BUILT) >= 30
    for cases in (CASES, BUILT):
        fields = [case.model.fields for case in cases]
        assert {(case.task, case.model.fields["rope_parameters"]["rope_type"]) for case in cases} == {
            (task, rope) for task in TASKS for rope in ROPE_TYPES
        }
        assert {case.mask for case in cases} == set(MASKS)
        for name in ("attention_bias", "tie_word_embeddings", "rms_norm_eps"):
            assert len({field[name] for field in fields}) == 2, name
        layouts = {field["num_attention_heads"] // field["num_key_value_heads"] for field in fields}
        assert len(layouts) >= 2 and max(layouts) >= 4
    assert {case.model.fields["hidden_act"] for case in CASES} == ACTIVATIONS.keys()
    assert {(case.pooling, case.normalize) for case in CASES if case.task == "features"} >= {
        (None, False), ("last", False), ("last", True), ("mean", False), ("mean", True)
    }  # fmt: skip
    assert {case.num_labels for case in CASES} == {1, 2, 3, 4} and None in {case.pad for case in CASES}
    assert {name for case in CASES for name in case.model.null} == {"head_dim", "num_key_value_heads"}
    optional = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
    ropes = [case.model.fields["rope_parameters"] for case in CASES]
    assert all(any(name in rope for rope in ropes) for name in optional)


def test_how_far_the_ropes_go() -> None:
    """Beyond the length that they were made for, or as far as one table is exact, which is refused by name."""
    for each in [*CASES, *BUILT]:
        fields = each.model.fields
        rope, positions = fields["rope_parameters"], each.model.positions
        kind, original = rope["rope_type"], fields["max_position_embeddings"]
        original = rope.get("original_max_position_embeddings", original)
        data = config_of(**fields)
        config = parse_config(spelled(each.model, data), "c")
        if kind in ("linear", "yarn", "llama3"):
            assert positions > original
        else:
            assert positions <= original
            with pytest.raises(ConfigError, match=kind if kind != "default" else "--rope-scaling yarn"):
                sequence_limit(config, original + 1)


def test_a_trace_is_the_same_for_every_rope_and_length() -> None:
    """As tests that keep traces take it to be: tables are data."""
    one, other = (
        parse_config(config_of(**case.model.fields), "c")
        for case in BUILT
        if case.task == "token-classification"
        and case.model.fields["rope_parameters"]["rope_type"] in ("default", "yarn")
    )
    traced = [
        trace_encoder(config, Encoding("token-classification", 3), dtype=torch.float32, max_seq_len=length)
        for config, length in ((one, POSITIONS), (other, POSITIONS + 1))
    ]
    nodes = [[(node.op_type, [*map(str, node.attributes.values())]) for node in model.graph] for model in traced]
    assert one.rope != other.rope and nodes[0] == nodes[1]
