"""Inputs and outputs by option, against transformers' arguments and outputs of these names, same weights, in fp32."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor
from transformers import Glm4ForCausalLM

from glm4export.sources.checkpoint import CONFIG
from glm4export.sources.config_json import read_config
from glm4export.sources.quantized.checkpoint import open_checkpoint
from glm4export.weights.fp16 import fp16_scales
from glm4runtime import load, load_encoder
from glm4runtime.contract import BundleError, UserError, read_manifest
from tests.conftest import Build
from tests.helpers.cached_graph import CachedGraph
from tests.helpers.checkpoints import random_model, save
from tests.helpers.encoders import batch, random_encoder
from tests.helpers.logits import strict_session
from tests.helpers.parity import TOLERANCE, check_parity
from tests.helpers.step_graph import StepGraph

OTHER = {
    "hidden_size": 72,
    "intermediate_size": 100,
    "vocab_size": 131,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25},
}
OUTPUTS = {"output_hidden_states": True, "output_attentions": True}
CPU = {"precision": "fp32", "target": "cpu"}


def theirs(model: Any, **arguments: Any) -> Any:
    """transformers' outputs, hidden states and attentions with them."""
    model.set_attn_implementation("eager")
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of the cache's name, which differs by release
        return model(**OUTPUTS, **arguments)


def check(found: np.ndarray, wanted: Tensor, real: Tensor | None = None) -> None:
    """The same, within the tolerance, where ``real`` is true."""
    assert found.dtype == np.float32 and found.shape == tuple(wanted.shape)
    apart = np.abs(found - wanted.numpy())
    assert (apart if real is None else apart[real.numpy()]).max() <= TOLERANCE


def check_outputs(found: dict[str, np.ndarray], wanted: Any, mask: Tensor) -> None:
    """Hidden states and attentions of the tokens that the mask [batch, seq] takes for real."""
    for index, state in enumerate(wanted.hidden_states):
        check(found.pop(f"hidden_states.{index}"), state, mask.bool())
    for layer, weights in enumerate(wanted.attentions):
        check(found.pop(f"attentions.{layer}"), weights, mask.bool()[:, None].expand(weights.shape[:3]))
    assert len(found) == 1, "outputs that transformers doesn't have"


def positions_of(mask: Tensor) -> Tensor:
    """What transformers' generate makes of a mask: position_ids int64 [batch, seq]."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def arrays(**tensors: Tensor) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("fields", [{}, OTHER], ids=["gqa", "tied, odd sizes"])
def test_every_option_at_once(fields: dict[str, Any], build_bundle: Build) -> None:
    """Padded prompts and steps: embeddings and positions in; logits, hidden states and attentions out."""
    model = random_model(**fields)
    bundle = build_bundle(model, **CPU, **OUTPUTS, inputs="embeds", position_ids=True)
    for side, length in (("left", 16), ("right", 16), ("left", 0)):
        ids, mask = batch([6, 3, 1], side, model.config.vocab_size)
        positions, graph, cache = positions_of(mask), CachedGraph(bundle, "decode", 3, length), None
        for _ in range(3):
            given = {
                "inputs_embeds": model.model.embed_tokens(ids).detach(),
                "attention_mask": mask,
                "position_ids": positions,
            }
            wanted = theirs(model, **given, past_key_values=cache)
            found, real = graph.run(**arrays(**given)), mask[:, -ids.shape[1] :]
            check(found["logits"], wanted.logits, real.bool())
            check_outputs(found, wanted, real)
            cache, ids = wanted.past_key_values, wanted.logits[:, -1:].argmax(-1)
            mask = torch.cat((mask, torch.ones(3, 1, dtype=torch.int64)), 1)
            positions = positions.max(1, keepdim=True).values + 1


@pytest.fixture(scope="module")
def model() -> Glm4ForCausalLM:
    return random_model()


@pytest.fixture(scope="module")
def observed(model: Glm4ForCausalLM, build_bundle: Build) -> Path:
    """The same model, asked in the usual way, with its hidden states and attentions."""
    return build_bundle(model, **CPU, **OUTPUTS)


@pytest.mark.parametrize("keep", [0, 1, 4, [0], [1, 5], [6, 2, 2]])
def test_logits_to_keep(keep: int | list[int], model: Glm4ForCausalLM, observed: Path) -> None:
    """docs/config.md: the last so many rows, or those listed; 0 means all. Hidden states are of every token."""
    ids, mask = batch([7, 7], "right", 96)
    wanted = theirs(model, input_ids=ids, logits_to_keep=torch.tensor(keep) if isinstance(keep, list) else keep)
    rows = np.arange(7)[-keep:] if isinstance(keep, int) else np.array(keep)
    given = arrays(input_ids=ids, attention_mask=mask)
    found = CachedGraph(observed, "prefill", 2).run(**given, logit_rows=np.broadcast_to(rows, (2, len(rows))))
    check(found["logits"], wanted.logits)
    check_outputs(found, wanted, mask)
    if keep == 0:  # and over a past of no rows, as use_cache=False
        check(CachedGraph(observed, "decode", 2, max_seq=0).run(**given)["logits"], wanted.logits)


@pytest.mark.parametrize("options", [OUTPUTS, {"position_ids": True}], ids=["outputs", "positions"])
def test_a_session_runs_such_bundles(options: dict[str, bool], model: Glm4ForCausalLM, build_bundle: Build) -> None:
    bundle = build_bundle(model, **CPU, **options)
    with load(bundle, prefill_chunk=6) as session:
        check_parity(session, model, [5, 6, 7, 8, 9, 10, 11])
        session.runner.rewind()
        session.runner.prefill([5, 6, 7])
        drafts = session.runner.verify([8, 9]).copy()
    wanted = theirs(model, input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 3:]
    check(drafts, wanted)
    manifest = bundle / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"max_seq_len": 64', '"max_seq_len": 65'))
    with pytest.raises(BundleError, match="it knows 64 positions, the manifest's cache has 65"):
        load(bundle)


@pytest.mark.parametrize(
    ("task", "options"),
    [("features", {"inputs": "embeds"}), ("sequence-classification", {"position_ids": True})],
)
def test_without_a_cache(task: str, options: dict[str, Any], build_bundle: Build, tmp_path: Path) -> None:
    encoder = random_encoder(task)
    bundle = build_bundle(save(encoder, tmp_path), **CPU, **OUTPUTS, **options)
    session = ort.InferenceSession(bundle / "model.onnx")
    backbone = encoder if task == "features" else encoder.model
    for side in ("left", "right"):
        ids, mask = batch([6, 3, 1], side, 96)
        given = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in options:
            given["position_ids"] = torch.randint(0, 64, ids.shape, generator=torch.Generator().manual_seed(0))
        if "inputs" in options:
            given["inputs_embeds"] = backbone.embed_tokens(given.pop("input_ids")).detach()
        names = [value.name for value in session.get_outputs()]
        found = dict(zip(names, session.run(None, arrays(**given)), strict=True))
        wanted = theirs(encoder, **given)
        if task == "sequence-classification":
            check(found["logits"], wanted.logits)
        else:
            check(found["last_hidden_state"], wanted.last_hidden_state, mask.bool())
        check_outputs(found, wanted, mask)


def test_an_encoder_gives_the_usual_positions(build_bundle: Build, tmp_path: Path) -> None:
    folder = save(random_encoder("features"), tmp_path)
    texts = [[5, 6, 7, 8], [9]]
    found = []
    for options in ({}, {"position_ids": True, **OUTPUTS}):
        with load_encoder(build_bundle(folder, **CPU, **options)) as encoder:
            found.append(encoder.hidden_states(texts))
    for plain, told in zip(*found, strict=True):
        np.testing.assert_allclose(told, plain, rtol=0, atol=TOLERANCE)


def test_what_enters_and_leaves_a_rescaled_stream(build_bundle: Build, tmp_path: Path) -> None:
    """In fp16 the stream is scaled by r: hidden states beyond fp16's largest number come out as they are."""
    model = random_model()
    with torch.no_grad():
        model.model.embed_tokens.weight *= 3e5
        for layer in model.model.layers:
            layer.post_mlp_layernorm.weight *= 2e4
    folder = save(model, tmp_path)
    assert fp16_scales(read_config(folder / CONFIG), open_checkpoint(folder)).residual == 2.0**-5
    bundle = build_bundle(folder, precision="fp16", target="cpu", inputs="embeds", **OUTPUTS)
    graph = CachedGraph(bundle, "decode", 2)
    graph.session = strict_session(bundle / "decode.onnx")
    ids, mask = batch([7, 7], "right", 96)
    given = {"inputs_embeds": model.model.embed_tokens(ids).detach(), "attention_mask": mask}
    found, wanted = graph.run(**arrays(**given)), theirs(model, **given)
    assert wanted.hidden_states[0].abs().max() > 2 * 65504
    for index, state in enumerate(wanted.hidden_states):
        assert np.abs(found[f"hidden_states.{index}"] - state.numpy()).max() <= 3e-3 * state.abs().max()
    for layer, weights in enumerate(wanted.attentions):
        assert np.abs(found[f"attentions.{layer}"] - weights.numpy()).max() <= 3e-3


def test_the_step_graph_takes_positions_and_padding_in_front(model: Glm4ForCausalLM, build_bundle: Build) -> None:
    """Its mask hides any row of the cache from any token, so the rows of a batch may be padded on either side."""
    bundle = build_bundle(model, precision="fp32", target="tensorrt")
    ids, mask = batch([6, 3, 1], "left", 96)
    positions = positions_of(mask)
    wanted = theirs(model, input_ids=ids, attention_mask=mask, position_ids=positions).logits
    graph = StepGraph(bundle, batch=3)
    slots = np.arange(64)
    visible = (slots <= np.arange(6)[:, None]) & np.pad(mask.bool().numpy(), ((0, 0), (0, 58)))[:, None, None]
    visible[:, 0, range(6), range(6)] = True  # padding sees itself: a row that sees nothing is left to each kernel
    feed = arrays(input_ids=ids, position_ids=positions)
    rows = np.broadcast_to(np.arange(6), (3, 6))
    past = {name: value.numpy() for name, value in graph.cache.items()}
    feed |= {"write_indices": np.zeros(3, np.int64), "attention_mask": visible, "logit_rows": rows, **past}
    check(graph.session.run(["logits"], feed)[0], wanted, mask.bool())


def test_a_table_that_nobody_reads_is_not_stored(model: Glm4ForCausalLM, build_bundle: Build) -> None:
    """And a session, which has token ids to give, refuses such a bundle in a line."""
    sizes = {}
    for precision in ("fp32", "int4"):
        bundle = build_bundle(model, precision=precision, target="cpu", inputs="embeds")
        sizes[precision] = (bundle / "weights.bin").stat().st_size
        plain = build_bundle(model, precision=precision, target="cpu")
        width = 4 if precision == "fp32" else 2
        assert (plain / "weights.bin").stat().st_size - sizes[precision] == 96 * 64 * width
        assert not (bundle / "genai_config.json").exists()
    (embeds, *_) = read_manifest(bundle).graphs["prefill"].inputs
    assert (embeds.name, embeds.dtype, embeds.dims) == ("inputs_embeds", "float32", ("batch", "seq", 64))
    with pytest.raises(UserError, match="built with --inputs embeds, so its graphs take inputs_embeds: run them with"):
        load(bundle)
    features = build_bundle(model, **CPU, inputs="embeds", task="features")
    with pytest.raises(UserError, match="built with --inputs embeds, so its graphs take inputs_embeds"):
        load_encoder(features)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "tensorrt", "inputs": "embeds"}, "--inputs embeds does not go with --target tensorrt: engines"),
        ({"target": "tensorrt", "output_hidden_states": True}, "--output-hidden-states does not go with --target tens"),
        (
            {"target": "tensorrt", "position_ids": True},
            "and a step graph has position_ids anyway; build",
        ),
        (
            {"target": "cuda", "precision": "fp16", "position_ids": True},
            "whose kernel of GroupQueryAttention has an inp",
        ),
        ({"target": "cuda", "precision": "bf16", "output_attentions": True}, "--output-attentions goes with --target"),
        (
            {"precision": "fp16", "output_attentions": True, "kv_cache": "int8", "calibrate": Path("a")},
            "--output-attentions does not go with --kv-cache int8; leave one of them out",
        ),
        (
            {"task": "sequence-classification", "inputs": "embeds"},
            "the last token, which is classified, is found in input_ids",
        ),
        (
            {"precision": "int4", "inputs": "embeds", "embedding_bits": 8},
            "--embedding-bits does not go with --inputs emb",
        ),
    ],
)
def test_refusals(options: dict[str, Any], message: str, build_bundle: Build, tmp_path: Path) -> None:
    folder = save(random_encoder("sequence-classification"), tmp_path)
    with pytest.raises(UserError, match=message):
        build_bundle(folder, **{**CPU, **options})
