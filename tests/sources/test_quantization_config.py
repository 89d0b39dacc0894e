"""config.json's quantization_config: read, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4export.sources.config_json import ConfigError
from glm4export.sources.quantized.checkpoint import open_checkpoint
from glm4export.sources.quantized.declared import parse_quantization
from glm4runtime.contract import UserError
from tests.helpers import quantized
from tests.helpers.quantized import FP8, INT4


def groups(weights: dict[str, Any], **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights}
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed"}
    return {**said, "config_groups": {"group_0": group}, **more}


REFUSED: dict[str, tuple[Any, str]] = {
    "not an object": ([], r"quantization_config=\[\] must be an object"),
    "no method": ({}, r"has quant_method=None, which is not read; read: gptq, awq, compressed-tensors"),
    "hqq": ({"quant_method": "hqq"}, r"has quant_method='hqq', which is not read; .*dequantize it there"),
    "nf4": (
        {"quant_method": "bitsandbytes"},
        r"quant_method='bitsandbytes', which is not read: its 4-bit levels are not",
    ),
    "3 bits": (
        {**quantized.GPTQ, "bits": 3},
        r"has bits=3, which is not supported; supported: 4, 8; 2 and 3 bits have",
    ),
    "no bits": ({"quant_method": "gptq"}, r"has bits=None, which is not supported"),
    "bits as text": ({**quantized.GPTQ, "bits": "4"}, r"has bits='4', which is not supported"),
    "marlin": ({**quantized.GPTQ, "is_marlin_format": True}, r"has is_marlin_format=True.*packed for one kernel"),
    "marlin format": (
        {**quantized.GPTQ, "checkpoint_format": "marlin"},
        r"checkpoint_format='marlin'.*: gptq, gptq_v2",
    ),
    "planar": ({**quantized.GPTQ, "format": "gptq_p"}, r"checkpoint_format='gptq_p', which is not supported"),
    "int64 words": ({**quantized.GPTQ, "pack_dtype": "int64"}, r"has pack_dtype='int64'"),
    "group of 0": (
        {**quantized.GPTQ, "group_size": 0},
        r"has group_size=0, which is neither -1 nor a number of columns",
    ),
    "rotated": (
        {**quantized.GPTQ, "rotation": "hadamard"},
        r"has rotation='hadamard', which may change what the tensors",
    ),
    "dynamic": ({**quantized.GPTQ, "dynamic": {"x": {"zeta": 1}}}, r"dynamic\['x'\] has zeta=1, which may change"),
    "dynamic bits": (
        {**quantized.GPTQ, "dynamic": {"x": {"bits": 2}}},
        r"dynamic\['x'\] has bits=2, which is not supp",
    ),
    "dynamic text": ({**quantized.GPTQ, "dynamic": "x"}, r"dynamic\['dynamic'\]='x' must be an object"),
    "gemv": ({**quantized.AWQ, "version": "gemv"}, r"has version='gemv'.* supported: gemm.*shuffled for one package"),
    "exllama": (
        {**quantized.AWQ, "version": "exllama"},
        r"has version='exllama', .*shuffled for one package's kernels",
    ),
    "llm-awq": ({**quantized.AWQ, "backend": "llm-awq"}, r"has backend=llm-awq, whose layout is not read"),
    "no zeros": ({**quantized.AWQ, "zero_point": False}, r"has zero_point=False.*AWQ's GEMM layout has zero points"),
    "not converted": (
        {**quantized.AWQ, "modules_to_not_convert": "x"},
        r"modules_to_not_convert='x', which must be a l",
    ),
    "w3a16": (
        groups({**INT4, "num_bits": 3}),
        r"group_0\.weights has num_bits=3, which is not supported; supported: 4, 8",
    ),
    "blocks": (groups({**FP8, "strategy": "block"}, format="float-quantized"), r"has strategy='block', which is not"),
    "fp8 with zeros": (
        groups({**FP8, "strategy": "channel", "symmetric": False}, format="float-quantized"),
        r"group_0\.weights has symmetric=False, which is not supported; supported: True",
    ),
    "nvfp4": (
        groups(INT4, format="nvfp4-pack-quantized"),
        r"has format='nvfp4-pack-quantized', which is not supported",
    ),
    "frozen": (groups(INT4, quantization_status="frozen"), r"has quantization_status='frozen'.*aren't compressed yet"),
    "sparse": (groups(INT4, sparsity_config={"format": "sparse-24-bitmask"}), r"sparsity_config has format='sparse-24"),
    "rotation": (groups(INT4, transform_config={"config_groups": {"R1": {}}}), r"has transform_config=.*may change"),
    "cache": (groups(INT4, kv_cache_scheme={"num_bits": 8}), r"has kv_cache_scheme=.*may change what the tensors mean"),
    "no groups": (groups(INT4, config_groups={}), r"config_groups quantizes no weights; remove quantization_config"),
    "unknown": (groups({**INT4, "zeta": 1}), r"group_0\.weights has zeta=1, which may change"),
    "disagreeing": (groups({**INT4, "group_size": None}), r"group_0\.weights has .*group_size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_quantization_that_is_not_read_is_refused_by_name(name: str, mine: Path) -> None:
    said, message = REFUSED[name]
    config = json.loads((mine / "config.json").read_text())
    (mine / "config.json").write_text(json.dumps({**config, "quantization_config": said}))
    with pytest.raises(ConfigError, match=message) as error:
        open_checkpoint(mine)
    assert isinstance(error.value, UserError)
    assert str(mine / "config.json") in str(error.value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 200) | st.sampled_from(["group", "int", "float", "", "gemm", 1.5]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "-:a", "bits"]), inner, max_size=2)
    ),
    max_leaves=4,
)
WEIGHTS = st.dictionaries(st.sampled_from([*INT4, "symmetric", "actorder", "dynamic", "zeta"]), JSON)
GROUP = st.dictionaries(st.sampled_from(["weights", "targets", "format", "input_activations"]), JSON | WEIGHTS)
SAID = st.one_of(
    st.fixed_dictionaries({"x": JSON}).flatmap(
        lambda x: st.sampled_from([*quantized.GPTQ, "dynamic", "meta", "format"]).map(
            lambda key: {**quantized.GPTQ, key: x["x"]}
        )
    ),
    st.fixed_dictionaries({"x": JSON}).flatmap(
        lambda x: st.sampled_from([*quantized.AWQ, "backend"]).map(lambda key: {**quantized.AWQ, key: x["x"]})
    ),
    st.dictionaries(st.sampled_from("ab"), JSON | GROUP).map(lambda found: groups(INT4, config_groups=found)),
    JSON,
)


@given(said=SAID)
@settings(max_examples=300, deadline=None)
def test_any_quantization_config_is_read_or_refused(said: object) -> None:
    try:
        assert parse_quantization(said, "config.json").layouts
    except ConfigError as error:
        assert str(error).startswith("config.json: quantization_config")


def test_a_format_of_null_is_none() -> None:
    assert parse_quantization({**quantized.GPTQ, "format": None}, "c") == parse_quantization(quantized.GPTQ, "c")
