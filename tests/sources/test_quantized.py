"""Quantized checkpoints: what their weights mean by the packages that write them, and tensors that contradict it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import Glm4ForCausalLM

from glm4export.sources.checkpoint import CheckpointError
from glm4export.sources.config_json import read_config
from glm4export.sources.quantized.checkpoint import QuantizedCheckpoint, open_checkpoint
from glm4export.weights.quantize import Scheme
from glm4export.weights.tensors import whole
from tests.helpers import checkpoints, quantized
from tests.helpers.checkpoints import change
from tests.helpers.dequantize import dequantize
from tests.helpers.quantized import BY_ROWS, FP8, INPUTS, INT4

GOLDEN = Path(__file__).parent / "data/gptqmodel.safetensors"
K_PROJ = "model.layers.0.self_attn.k_proj"
DOWN = "model.layers.1.mlp.down_proj"
COMPRESSED: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "int4 groups": (INT4, None),
    "int4 groups, asymmetric": ({**INT4, "symmetric": False}, None),
    "int4 rows, asymmetric": ({"num_bits": 4, "strategy": "channel", "symmetric": False}, None),
    "int8 groups, packed": ({**INT4, "num_bits": 8}, None),
    "int8 rows": (BY_ROWS, INPUTS),
    "int8 rows, asymmetric": ({**BY_ROWS, "symmetric": False}, INPUTS),
    "int8, one scale": ({"num_bits": 8, "strategy": "tensor"}, INPUTS),
    "int4 rows in int8": ({"num_bits": 4, "strategy": "channel"}, INPUTS),
    "fp8 static": ({**FP8, "strategy": "tensor"}, {**FP8, "strategy": "tensor"}),
    "fp8 dynamic": ({**FP8, "strategy": "channel"}, {**FP8, "strategy": "token", "dynamic": True}),
}


def opened(folder: Path) -> QuantizedCheckpoint:
    """Opened and checked, as a build does."""
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, QuantizedCheckpoint)
    checkpoint.check(read_config(folder / "config.json"))
    return checkpoint


def assert_means(checkpoint: QuantizedCheckpoint, model: Glm4ForCausalLM, count: int) -> None:
    """Every tensor reads as the model has it; a quantized weight to a rounding of float32."""
    assert len(checkpoint.linears) == count
    for name, parameter in model.named_parameters():
        found = checkpoint.read(name, whole(tuple(parameter.shape)))
        if name in checkpoint.linears:
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, parameter.detach(), rtol=2e-7, atol=0)
        else:
            assert torch.equal(found, parameter.detach())


@pytest.fixture(scope="module")
def gptq_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized.save_gptq(checkpoints.random_model(), tmp_path_factory.mktemp("gptq"), symmetric=False)


@pytest.fixture
def mine(gptq_folder: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(gptq_folder, tmp_path / "mine"))


def part(suffix: str) -> str:
    return f"{DOWN}.{suffix}".replace(".", "__")


@pytest.mark.parametrize("kind", ["sym_v1", "asym_v1", "asym_v2", "act_order", "int8_v1"])
def test_gptqmodels_own_files_mean_what_gptqmodel_makes_of_them(kind: str, tmp_path: Path) -> None:
    """``asym`` ones have zero points of 0, which v1 stores as a borrow from the next one."""
    golden = {
        name.removeprefix(f"{kind}."): data for name, data in load_file(GOLDEN).items() if name.startswith(f"{kind}.")
    }
    meant = golden.pop("dequantized")  # by gptqmodel, in float16
    checkpoints.save(checkpoints.random_model(head_dim=16), tmp_path)
    change(tmp_path, **{f"{K_PROJ}.weight".replace(".", "__"): None})
    change(tmp_path, **{f"{K_PROJ}.{name}".replace(".", "__"): data for name, data in golden.items()})
    said = {**quantized.GPTQ, "bits": 8 if "int8" in kind else 4, "group_size": 16, "desc_act": kind == "act_order"}
    said |= {"checkpoint_format": "gptq_v2" if "v2" in kind else "gptq", "meta": {"quantizer": "gptqmodel:7.7.0"}}
    quantized.say(tmp_path, said)
    checkpoint = opened(tmp_path)
    found = checkpoint.read(f"{K_PROJ}.weight", ((0, 32), (0, 64)))
    assert torch.equal(found.half(), meant)
    assert checkpoint.is_permuted(f"{K_PROJ}.weight") == (kind == "act_order")
    assert checkpoint.is_centred(f"{K_PROJ}.weight") == (kind in ("sym_v1", "act_order"))


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"v1": False}, {"shuffled": True}, {"bits": 8}], ids=str)
def test_gptq(options: dict[str, Any], tmp_path: Path) -> None:
    model = checkpoints.random_model()
    assert_means(opened(quantized.save_gptq(model, tmp_path, **options)), model, 12)


def test_a_quantized_head_is_read(tmp_path: Path) -> None:
    model = checkpoints.random_model()
    assert_means(opened(quantized.save_gptq(model, tmp_path, head=True)), model, 13)


def test_awq_is_what_compressed_tensors_makes_of_it(tmp_path: Path) -> None:
    convert = pytest.importorskip("compressed_tensors.entrypoints.convert.converters.autoawq").AutoAWQConverter()
    model = checkpoints.random_model()
    checkpoint = opened(quantized.save_awq(model, tmp_path))
    assert_means(checkpoint, model, 12)
    generator = torch.Generator().manual_seed(0)
    stored = load_file(tmp_path / "model.safetensors")
    for suffix in ("qweight", "qzeros"):  # any bits mean something
        shape = stored[f"{DOWN}.{suffix}"].shape
        words = torch.randint(-(2**31), 2**31, tuple(shape), generator=generator).int()
        change(tmp_path, **{part(suffix): words})
        stored[f"{DOWN}.{suffix}"] = words
    q, scales, zeros = convert._convert_gemm_module(
        *(stored[f"{DOWN}.{suffix}"] for suffix in ("qweight", "scales", "qzeros"))
    )
    wide = [tensor.float().repeat_interleave(32, 1) for tensor in (zeros, scales)]
    found = opened(tmp_path).read(f"{DOWN}.weight", whole(tuple(q.shape)))
    assert torch.equal(found, (q.float() - wide[0]) * wide[1])


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_tensors(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = checkpoints.random_model()
    weights, inputs = COMPRESSED[kind]
    checkpoint = opened(quantized.save_compressed(model, tmp_path, weights, inputs))
    assert_means(checkpoint, model, 12)
    assert (checkpoint.declared.activations is None) == (inputs is None)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_window_is_a_piece_of_the_whole(data: st.DataObject, gptq_folder: Path, awq_folder: Path) -> None:
    checkpoint = opened_once(data.draw(st.sampled_from([gptq_folder, awq_folder])))
    name = data.draw(st.sampled_from(sorted(checkpoint.linears)))
    shape = checkpoint.tensors[name].shape
    window = tuple(
        tuple(sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True)))) for size in shape
    )
    expected = checkpoint.read(name, whole(shape))[tuple(slice(*bounds) for bounds in window)]
    assert torch.equal(checkpoint.read(name, window), expected)


@pytest.fixture(scope="module")
def awq_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized.save_awq(checkpoints.random_model(), tmp_path_factory.mktemp("awq"))


OPENED: dict[Path, QuantizedCheckpoint] = {}


def opened_once(folder: Path) -> QuantizedCheckpoint:
    if folder not in OPENED:
        OPENED[folder] = opened(folder)
    return OPENED[folder]


@pytest.mark.parametrize(
    ("stored", "scheme", "fits"),
    [
        ({}, Scheme(4, 32), True),
        ({}, Scheme(4, 16), True),
        ({}, Scheme(4, 64), False),
        ({}, Scheme(4, 32, symmetric=False), True),
        ({}, Scheme(4, 32, positive=True), True),
        ({}, Scheme(8, 32), True),
        ({"symmetric": False}, Scheme(4, 32), False),
        ({"symmetric": False}, Scheme(4, 16, symmetric=False), True),
        ({"symmetric": False}, Scheme(8, 16), True),
        ({"symmetric": False}, Scheme(8, 32, symmetric=False), True),
        ({"shuffled": True}, Scheme(4, 32), False),
        ({"bits": 8}, Scheme(8, 32), True),
        ({"bits": 8}, Scheme(4, 32), False),
        ({"bits": 8, "symmetric": False}, Scheme(8, 32), False),
    ],
    ids=str,
)
def test_integers_are_handed_over_where_they_mean_the_same(
    stored: dict[str, Any], scheme: Scheme, fits: bool, tmp_path: Path
) -> None:
    """Handed over, they dequantize to the bit to what is read; elsewhere nothing is."""
    checkpoint = opened(quantized.save_gptq(checkpoints.random_model(), tmp_path, **stored))
    for name, linear in checkpoint.linears.items():
        rows = (3, linear.shape[0] - 2)
        given = checkpoint.quantized(name, scheme, rows)
        assert (given is not None) == fits
        if given is not None:
            assert torch.equal(dequantize(given, scheme), checkpoint.read(name, (rows, (0, linear.shape[1]))))
            assert (given.zero_points is None) == scheme.symmetric


@pytest.mark.parametrize(
    ("kind", "dtype", "fits"),
    [
        ("int8 rows", "int8", True),
        ("int8, one scale", "int8", True),
        ("int4 rows in int8", "int8", True),
        ("int8 rows, asymmetric", "int8", False),
        ("int4 groups", "int8", False),
        ("int8 rows", "float8_e4m3fn", False),
        ("fp8 static", "float8_e4m3fn", True),
        ("fp8 dynamic", "float8_e4m3fn", True),
        ("fp8 dynamic", "int8", False),
    ],
)
def test_rows_are_handed_over_where_they_mean_the_same(kind: str, dtype: str, fits: bool, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    checkpoint = opened(quantized.save_compressed(checkpoints.random_model(), tmp_path, *COMPRESSED[kind]))
    for name, linear in checkpoint.linears.items():
        rows = (5, linear.shape[0] - 1)
        given = checkpoint.quantized_rows(name, dtype, torch.float32, rows)
        assert (given is not None) == fits
        if given is not None:
            assert str(given.data.dtype) == f"torch.{dtype}"
            found = given.data.float() * given.scales[:, None]
            assert torch.equal(found, checkpoint.read(name, (rows, (0, linear.shape[1]))))


def test_the_ledger_lists_what_stands_for_weights_at_once(mine: Path) -> None:
    stored = load_file(mine / "model.safetensors")
    changes = {
        part("scales"): None,
        part("qzeros"): stored[f"{DOWN}.qzeros"][:, 1:].contiguous(),
        part("g_idx"): stored[f"{DOWN}.g_idx"].float(),
        f"{K_PROJ}.qweight".replace(".", "__"): stored[f"{K_PROJ}.qweight"][1:],
        "model__layers__7__mlp__down_proj__qweight": torch.zeros(4, 4, dtype=torch.int32),
        "model__norm__weight": torch.zeros(64, dtype=torch.int32),
        "model__layers__0__self_attn__v_proj__bias": None,
    }
    change(mine, **changes)
    with pytest.raises(CheckpointError) as error:
        opened(mine)
    for line in (
        "7 tensors do not match config.json",
        f"missing {DOWN}.scales [4, 64], of GPTQ int4 in groups of 32",
        "missing model.layers.0.self_attn.v_proj.bias [64]",
        "unexpected model.layers.7.mlp.down_proj.qweight [4, 4]",
        f"mis-shaped {DOWN}.qzeros: [4, 7], expected [4, 8] of GPTQ int4 in groups of 32",
        f"mis-shaped {K_PROJ}.qweight: [7, 64], expected [8, 64]",
        f"mis-typed {DOWN}.g_idx: float32, expected int32",
        "mis-typed model.norm.weight: int32, expected float32 or float16 or bfloat16",
    ):
        assert line in str(error.value), line


@pytest.mark.parametrize("first", ["symmetric", "asymmetric"])
def test_groups_with_and_without_zero_points(first: str, tmp_path: Path) -> None:
    """A symmetric layout fits tensors of an asymmetric one too, but for their zero points."""
    pytest.importorskip("compressed_tensors")
    models = {kind: checkpoints.random_model() for kind in ("symmetric", "asymmetric")}
    folders = {
        kind: quantized.save_compressed(model, tmp_path / kind, {**INT4, "symmetric": kind == "symmetric"})
        for kind, model in models.items()
    }
    plain, shifted = (load_file(folder / "model.safetensors") for folder in folders.values())
    both = {name: tensor for name, tensor in plain.items() if ".down_proj." not in name}
    save_file(
        both | {name: t for name, t in shifted.items() if ".down_proj." in name},
        folders[first] / "model.safetensors",
    )
    configs = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in folders.values()]
    ordered = configs if first == "symmetric" else configs[::-1]
    schemes = {f"group_{index}": each["config_groups"]["group_0"] for index, each in enumerate(ordered)}
    quantized.say(folders[first], {**configs[0], "config_groups": schemes})
    checkpoint = opened(folders[first])
    for kind, name in (("asymmetric", f"{DOWN}.weight"), ("symmetric", f"{K_PROJ}.weight")):
        meant = models[kind].get_parameter(name)
        torch.testing.assert_close(checkpoint.read(name, whole(tuple(meant.shape))), meant.detach(), rtol=1e-6, atol=0)


def test_a_weight_shape_that_is_not_the_weights_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    quantized.save_compressed(checkpoints.random_model(), tmp_path, INT4)
    change(tmp_path, **{part("weight_shape"): torch.tensor([64, 120])})
    with pytest.raises(CheckpointError, match=rf"{re.escape(DOWN)}: weight_shape is \[64, 120\], expected \[64, 128\]"):
        opened(tmp_path)


def test_a_truncated_file_is_named(mine: Path) -> None:
    file = mine / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged or truncated"):
        opened(mine)


def test_an_empty_bias_that_no_glm4_has_is_left_out(mine: Path) -> None:
    change(mine, **{part("bias"): torch.zeros(64)})
    assert len(opened(mine).linears) == 12
    change(mine, **{part("bias"): torch.ones(64)})
    with pytest.raises(CheckpointError, match=rf"unexpected {re.escape(DOWN)}\.bias \[64\]"):
        opened(mine)


def test_groups_that_do_not_exist_are_refused(mine: Path) -> None:
    change(mine, **{part("g_idx"): torch.full((128,), 4, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match=rf"{re.escape(DOWN)}: g_idx has groups 4 to 4; 0 to 3 exist"):
        opened(mine)


def test_zero_points_that_writers_disagree_about_are_refused(mine: Path) -> None:
    change(mine, **{part("qzeros"): torch.full((4, 8), -1, dtype=torch.int32)})
    assert len(opened(mine).linears) == 12  # gptqmodel says that it wrote it
    quantized.say(mine, {**quantized.GPTQ, "sym": False})
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(DOWN)}: zero points of 0 in checkpoint_format gptq.*gptq_v2"
    ):
        opened(mine)


def test_a_linear_that_lies_there_as_it_is_needs_no_word_of_the_config(mine: Path) -> None:
    change(mine, **{part(suffix): None for suffix in ("qweight", "qzeros", "scales", "g_idx")})
    weight = torch.randn(64, 128)
    change(mine, **{part("weight"): weight})
    quantized.say(
        mine, {**quantized.GPTQ, "sym": False, "dynamic": {"-:.*(a+)+$": {}}, "meta": {"quantizer": "gptqmodel:7.7.0"}}
    )
    checkpoint = opened(mine)
    assert len(checkpoint.linears) == 11
    assert torch.equal(checkpoint.read(f"{DOWN}.weight", whole((64, 128))), weight)


def test_layers_quantized_by_rules_of_their_own_are_told_by_their_shapes(mine: Path) -> None:
    weight = torch.randn(64, 128)
    of = quantized.rounded(weight, 8, 64)
    change(mine, **{part(suffix): tensor for suffix, tensor in quantized.gptq(of, 8).items()})
    with pytest.raises(CheckpointError, match=r"mis-shaped .*down_proj\.qweight: \[32, 64\], expected \[16, 64\]"):
        opened(mine)
    rules = {r"+:.*\.1\.mlp\.down.*": {"bits": 8, "group_size": 64}}
    quantized.say(mine, {**quantized.GPTQ, "dynamic": rules, "meta": {"quantizer": "gptqmodel:7.7.0"}})
    assert torch.equal(opened(mine).read(f"{DOWN}.weight", whole((64, 128))), of.weight)


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({**quantized.GPTQ, "lm_head": True}, r"says that lm_head is quantized, and lm_head\.weight is stored as it is"),
    ({**quantized.AWQ, "group_size": -1}, r"do not match config\.json"),
]


@pytest.mark.parametrize(("said", "message"), CONTRADICTIONS, ids=range(len(CONTRADICTIONS)))
def test_tensors_that_contradict_the_config_are_refused(said: dict[str, Any], message: str, mine: Path) -> None:
    quantized.say(mine, {**said, "meta": {"quantizer": "gptqmodel:7.7.0"}})
    with pytest.raises(CheckpointError, match=message):
        opened(mine)


def test_a_module_that_is_not_to_be_converted_and_is(awq_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(awq_folder, tmp_path / "mine"))
    quantized.say(folder, {**quantized.AWQ, "modules_to_not_convert": [DOWN]})
    with pytest.raises(CheckpointError, match=rf"says that {re.escape(DOWN)} isn't quantized, and its tensors are"):
        opened(folder)


def test_a_checkpoint_that_says_it_is_quantized_and_is_not(tmp_path: Path) -> None:
    checkpoints.save(checkpoints.random_model(), tmp_path)
    quantized.say(tmp_path, quantized.GPTQ)
    with pytest.raises(CheckpointError, match="says that weights are quantized, and none is; remove it"):
        opened(tmp_path)


def test_a_quantized_checkpoint_whose_config_does_not_say_so(mine: Path) -> None:
    config = json.loads((mine / "config.json").read_text())
    del config["quantization_config"]
    (mine / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"has dtype I32; .*; if it is quantized, config\.json lacks its quant"):
        open_checkpoint(mine)
