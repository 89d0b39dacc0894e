"""Reading config.json: what transformers writes is read the same, everything else is refused by name."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm4export.sources.config_json import ConfigError, parse_config, read_config, sequence_limit
from glm4graphs.config import (
    DynamicScaling,
    Glm4Config,
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    Rope,
    YarnScaling,
)
from glm4graphs.rope import rotary_tables
from glm4runtime.contract import UserError
from tests.helpers.configs import config_of

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}

LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 32,
    "short_factor": [1.0 + 0.25 * i for i in range(8)],
    "long_factor": [2.0] * 8,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def older(data: dict[str, Any], scaling: dict[str, Any] | None = None) -> dict[str, Any]:
    """The same config in the spelling of the GLM-4-0414 checkpoints."""
    rope = data.pop("rope_parameters")
    top = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor")}
    return {**data, **top, **({} if scaling is None else {"rope_scaling": scaling})}


def without(data: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {name: value for name, value in data.items() if name not in keys}


@pytest.mark.parametrize("spell", [lambda data: data, older], ids=["rope_parameters", "top level"])
def test_every_field_is_the_one_transformers_wrote(spell: Any, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(spell(config_of())))
    assert read_config(path) == Glm4Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        hidden_act="silu",
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        attention_bias=True,
        tie_word_embeddings=False,
        rope=Rope(theta=10000.0, partial_rotary_factor=0.5),
    )


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (YARN, Rope(1e4, 0.5, scaling=YarnScaling(4.0, 32768))),
        ({"type": "yarn", "factor": 4}, Rope(1e4, 0.5, scaling=YarnScaling(4.0, 64))),
        ({**YARN, "truncate": False, "mscale": 1, "beta_fast": 16}, None),
        ({"rope_type": "linear", "factor": 8}, Rope(1e4, 0.5, scaling=LinearScaling(8.0))),
        ({"rope_type": "dynamic", "factor": 4}, Rope(1e4, 0.5, DynamicScaling(4.0))),
        (LLAMA3, Rope(1e4, 0.5, Llama3Scaling(8.0, 1.0, 4.0, 32))),
        (LONGROPE, Rope(1e4, 0.5, LongropeScaling(2.0, 32, tuple(LONGROPE["short_factor"])))),
        ({**YARN, "factor": None, "original_max_position_embeddings": 16}, Rope(1e4, 0.5, YarnScaling(4.0, 16))),
        ({**YARN, "truncate": None}, Rope(1e4, 0.5, YarnScaling(4.0, 32768, truncate=False))),  # as transformers
        ({**YARN, "mrope_section": None, "beta_fast": None}, Rope(1e4, 0.5, YarnScaling(4.0, 32768))),
        ({"rope_type": "default"}, Rope(1e4, 0.5)),
        ({}, Rope(1e4, 0.5)),
    ],
)
def test_both_spellings_of_scaling_agree(scaling: dict[str, Any], expected: Rope | None) -> None:
    new = parse_config({**config_of(), "rope_parameters": {**DEFAULT, **_typed(scaling)}}, "c")
    old = parse_config(older(config_of(), scaling), "c")
    assert new == old
    assert expected is None or new.rope == expected


def _typed(scaling: dict[str, Any]) -> dict[str, Any]:
    return {("rope_type" if name == "type" else name): value for name, value in scaling.items()}


def test_original_positions_may_stand_at_the_top_level() -> None:
    data = {**older(config_of(), {"type": "yarn", "factor": 4.0}), "original_max_position_embeddings": 16}
    assert parse_config(data, "c").rope.scaling == YarnScaling(4.0, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": YARN}, r"c: rope_type is given twice, as 'yarn' and as 'default'; keep the right one"),
        ({"partial_rotary_factor": 1.0}, r"partial_rotary_factor is given twice, as 1\.0 and as 0\.5"),
        ({"rope_theta": 1e6}, r"rope_theta is given twice, as 1000000\.0 and as 10000\.0"),
        (
            {"rope_scaling": {"rope_type": "default"}},
            r"rope_theta is given in rope_parameters alone, and transformers r",
        ),
    ],
)
def test_spellings_that_disagree_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config({**config_of(), **change}, "c")


def test_spellings_that_agree_are_read() -> None:
    data = {**config_of(), "rope_theta": 10000, "partial_rotary_factor": 0.5}
    assert parse_config(data, "c") == parse_config(config_of(), "c")


@pytest.mark.parametrize("data", [config_of(rope_parameters=None), older(config_of())], ids=["new", "older"])
def test_neither_spelling_of_the_rotary_factor(data: dict[str, Any]) -> None:
    data = copy.deepcopy(without(data, "partial_rotary_factor"))
    data.get("rope_parameters", {}).pop("partial_rotary_factor", None)
    with pytest.raises(ConfigError, match=r"partial_rotary_factor is given neither at the top level nor in rope_param"):
        parse_config(data, "c")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["LlamaForCausalLM"]}, r"architectures=\['LlamaForCausalLM'\] .* supported: Glm4ForCausalLM"),
    ({"architectures": ["Glm4ForCausalLM", "Glm4ForCausalLM"]}, r"architectures=.* is not supported"),
    ({"architectures": "Glm4ForCausalLM"}, r"architectures='Glm4ForCausalLM' is not supported"),
    ({"architectures": None}, r"architectures=\[\] is not supported; supported: Glm4ForCausalLM"),
    *(
        ({"hidden_act": name}, rf"hidden_act='{name}' is not supported; supported: gelu, .*silu")
        for name in ("prelu", "xielu", "geglu", "")  # the first two have weights of their own
    ),
    ({"hidden_act": 1}, r"hidden_act=1 must be a str"),
    ({"num_key_value_heads": 3}, r"num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    ({"num_key_value_heads": 0}, r"num_key_value_heads=0 must be at least 1"),
    ({"num_hidden_layers": -1}, r"num_hidden_layers=-1 must be at least 1"),
    ({"hidden_size": "64"}, r"hidden_size='64' must be a int"),
    ({"hidden_size": 64.0}, r"hidden_size=64\.0 must be a int"),
    ({"hidden_size": True}, r"hidden_size=True must be a int"),
    ({"vocab_size": None}, r"key 'vocab_size' is missing"),
    ({"max_position_embeddings": None}, r"key 'max_position_embeddings' is missing"),
    ({"head_dim": 0}, r"head_dim=0 must be at least 1"),
    ({"head_dim": None, "hidden_size": 3}, r"head_dim=0 must be at least 1"),
    ({"head_dim": 3}, r"head_dim=3 and partial_rotary_factor=0\.5 give 1 rotary columns; an even number"),
    ({"head_dim": 6}, r"give 3 rotary columns; an even number of at least 2 is needed"),
    ({"rms_norm_eps": math.nan}, r"rms_norm_eps=nan must be a float"),
    ({"rms_norm_eps": math.inf}, r"rms_norm_eps=inf must be a float"),
    ({"rms_norm_eps": 0}, r"rms_norm_eps=0\.0 must be above 0"),
    ({"rms_norm_eps": 10**400}, r"rms_norm_eps=10+\.\.\.0+ must be a float"),
    ({"rms_norm_eps": None}, r"key 'rms_norm_eps' is missing"),
    ({"rms_norm_eps": 1e-46}, r"rms_norm_eps=1e-46 is not in 1\.2e-38 to 65504, what a norm can compute with"),
    ({"rms_norm_eps": 65505}, r"rms_norm_eps=65505\.0 is not in 1\.2e-38 to 65504"),
    *(
        ({name: 2**31}, rf"{name}=2147483648 must be at most 2147483647")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ),
    ({"hidden_size": 2**60}, r"hidden_size=1152921504606846976 must be at most 2147483647"),
    ({"hidden_size": 10**400}, r"hidden_size=10+\.\.\.0+ must be at most 2147483647"),
    ({"head_dim": 2**16 + 1}, r"head_dim=65537 must be at most 65536"),
    ({"max_position_embeddings": 10**8}, r"max_position_embeddings=100000000 must be at most 16777216"),
    ({"hidden_act": "\x1b[2J" * 100}, r"hidden_act='(\\x1b\[2J){4}.*\.\.\..*' is not supported"),
    ({"attention_bias": 1}, r"attention_bias=1 must be a bool"),
    ({"tie_word_embeddings": "no"}, r"tie_word_embeddings='no' must be a bool"),
    ({"model_type": "glm"}, r"model_type='glm' is not supported; supported: glm4"),
    *(
        ({name: value}, rf"{name}=.* is no field of Glm4Config, and may change what the model computes; if it does n")
        for name, value in (
            ("is_causal", False),
            ("sliding_window", 4096),
            ("layer_types", ["sliding_attention"]),
            ("per_layer_config", {"0": {"num_key_value_heads": 1}}),
            ("mlp_bias", False),
            ("logit_scale", 0.5),
            ("final_logit_softcapping", 30.0),
        )
    ),
    ({"rope_parameters": [1]}, r"rope_parameters=\[1\] must be an object"),
    ({"rope_parameters": None, "rope_scaling": "yarn"}, r"rope_scaling='yarn' must be an object"),
]
REFUSED_ROPE: list[tuple[dict[str, Any], str]] = [
    *(
        ({"rope_type": kind}, rf"rope_type={kind!r} is not supported; supported: default, linear, dynamic, yarn, lon")
        for kind in ("proportional", "axial", "su", "YaRN", 3, True)
    ),
    ({"partial_rotary_factor": 0}, r"partial_rotary_factor=0\.0 is not in \(0, 1\]"),
    ({"partial_rotary_factor": 1.5}, r"partial_rotary_factor=1\.5 is not in \(0, 1\]"),
    ({"partial_rotary_factor": "half"}, r"partial_rotary_factor='half' must be a float"),
    ({"rope_theta": None}, r"key 'rope_theta' is missing"),
    ({"rope_theta": 1}, r"rope_theta=1\.0 must be above 1"),
    ({"rope_type": "linear"}, r"key 'factor' is missing"),
    ({"rope_type": "linear", "factor": 0}, r"factor=0\.0 must be above 0"),
    ({"rope_type": "yarn"}, r"key 'factor' is missing"),
    ({**YARN, "factor": -4}, r"factor=-4\.0 must be above 0"),
    ({**YARN, "beta_fast": 0}, r"beta_fast=0\.0 must be above 0"),
    ({**YARN, "original_max_position_embeddings": 0}, r"original_max_position_embeddings=0 must be at least 1"),
    ({**YARN, "truncate": 1}, r"truncate=1 must be a bool"),
    ({**YARN, "attention_factor": "1"}, r"attention_factor='1' must be a float"),
    ({"rope_theta": 1e80}, r"rope_theta=1e\+80 give an inverse frequency of 0\.0; is it this model's config"),
    ({"rope_type": "linear", "factor": 1e50}, r"factor=1e\+50 times max_position_embeddings=64 is more than 16777216"),
    ({"rope_type": "linear", "factor": 1e-46}, r"factor=1e-46 give an inverse frequency of inf"),
    ({"rope_type": "linear", "factor": 1e-7}, r"factor=1e-07 turn position 63 by 6\.3e\+08 radians, of which float32"),
    ({**LONGROPE, "short_factor": [1e50] * 8}, r"short_factor=.* give an inverse frequency of 0\.0"),
    (
        {**LONGROPE, "short_factor": [1e12] * 8},
        r"short_factor=.* turn position 31 by 3\.1e-11 radians, as good as none",
    ),
    ({**LONGROPE, "short_factor": [1.0] * 7}, r"short_factor=\[1\.0, .*\] must be 8 numbers above 0"),
    ({**LONGROPE, "long_factor": [1.0] * 9}, r"long_factor=\[1\.0, .*\] must be 8 numbers above 0"),
    ({**LONGROPE, "long_factor": [0.0] * 8}, r"long_factor=\[0\.0, .*\] must be 8 numbers above 0"),
    ({**LONGROPE, "short_factor": [True] * 8}, r"short_factor=\[True, .*\] must be 8 numbers above 0"),
    ({**LONGROPE, "short_factor": 2.0}, r"short_factor=2\.0 must be a list"),
    ({**LONGROPE, "long_factor": None}, r"key 'long_factor' is missing"),
    ({**LONGROPE, "original_max_position_embeddings": None}, r"key 'factor' is missing"),
    ({**LONGROPE, "original_max_position_embeddings": 1, "factor": 2}, r"can't be computed with \(.*division by zero"),
    ({"rope_type": "dynamic"}, r"key 'factor' is missing"),
    ({**LLAMA3, "low_freq_factor": None}, r"key 'low_freq_factor' is missing"),
    ({**LLAMA3, "high_freq_factor": 1}, r"high_freq_factor=1\.0 must be above low_freq_factor=1\.0"),
    ({"factor": 4}, r"rope_type='default' does not go with factor=4; it takes no further key\. Give the rope_type"),
    (
        {"mrope_section": [8, 12, 12]},
        r"rope_type='default' does not go with mrope_section=\[8, 12, 12\]; it takes no f",
    ),
    (
        {**YARN, "mrope_section": [2, 3, 3]},
        r"rope_type='yarn' does not go with mrope_section=.*; it takes factor, orig",
    ),
    ({**YARN, "short_factor": [1.0]}, r"rope_type='yarn' does not go with short_factor=\[1\.0\]"),
    ({"rope_type": "linear", "factor": 2, "attention_factor": 1.5}, r"'linear' does not go with attention_factor=1\.5"),
    ({"full_attention": {"rope_type": "yarn"}}, r"rope_type='default' does not go with full_attention=\{"),
    ({**YARN, "factor": 1e308}, r"factor=1e\+308 times original_max_position_embeddings=32768 is more than 16777216"),
    ({**YARN, "factor": 513}, r"factor=513\.0 times original_max_position_embeddings=32768 is more than 16777216 pos"),
    ({**YARN, "factor": 1e-46}, r"factor=1e-46, .* give an inverse frequency of nan"),
    ({**YARN, "attention_factor": 1e-5}, r"attention_factor=1e-05, .* scale cos and sin by 1e-05, which float16"),
    ({**YARN, "attention_factor": 65505}, r"attention_factor=65505\.0, .* scale cos and sin by 6\.55e\+04, which"),
    ({**YARN, "mscale": 1e308, "mscale_all_dim": 1e-9}, r"mscale=1e\+308, .* scale cos and sin by 1\.39e\+307, which"),
    ({**YARN, "beta_fast": 1e308}, r"beta_fast=1e\+308, .* can't be computed with \(math domain error\)"),
    ({**YARN, "beta_slow": 5e-324}, r"beta_slow=5e-324, .* can't be computed with \(cannot convert float infinity"),
    ({"rope_type": ["\x1b"] * 50}, r"rope_type=\['\\x1b', .*\.\.\.\] is not supported"),
]


@pytest.mark.parametrize(
    ("change", "message"),
    [*REFUSED, *(({"rope_parameters": {**DEFAULT, **change}}, message) for change, message in REFUSED_ROPE)],
)
def test_refusals_name_key_value_and_remedy(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^some/config.json: .*{message}"):
        parse_config({**config_of(), **change}, "some/config.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"config.json: no such file; a checkpoint folder in Hugging Face layout holds one"),
        (b"", r"config.json: cannot be read as JSON"),
        (b'{"a": ', r"config.json: cannot be read as JSON \(Expecting value"),
        (b"\xff\xfe{}", r"config.json: cannot be read as JSON"),
        (b"[" * 100_000, r"config.json: cannot be read as JSON"),
        (b"[1]", r"config.json: expected a JSON object, found list"),
        (b"null", r"config.json: expected a JSON object, found NoneType"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', r"cannot be read as JSON \(key 'c' is given twice\)"),
        (b" " * (2**24 + 1), r"cannot be read as JSON \(16777217 bytes; at most 16777216 are read\)"),
    ],
    ids=["missing", "empty", "cut", "utf-16", "deep", "list", "null", "twice", "huge"],
)
def test_unreadable_files(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"cannot be read as JSON \(not a regular file\)"):
        read_config(tmp_path / "config.json")


def test_a_git_lfs_pointer_is_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match=r"config\.json: a git-lfs pointer, not the file; run `git lfs pull` in"):
        read_config(tmp_path / "config.json")


def test_spellings_nested_too_deep_to_compare() -> None:
    deep: list[list[Any]] = [[], []]
    for _ in range(5000):
        deep = [[inner] for inner in deep]
    data = {**config_of(), "rope_theta": deep[0], "rope_parameters": {**DEFAULT, "rope_theta": deep[1]}}
    with pytest.raises(ConfigError, match=r"c: rope_theta is given twice, as \[+\.\.\.\]+ and as \[+\.\.\.\]+; keep"):
        parse_config(data, "c")


def test_null_heads_are_as_other_models_write_them() -> None:
    """transformers 5 takes no null here; a missing count could mean its default of 2."""
    read = parse_config({**config_of(), "head_dim": None, "num_key_value_heads": None}, "c")
    assert (read.head_dim, read.num_key_value_heads) == (16, 4)
    assert parse_config(without(config_of(), "head_dim"), "c").head_dim == 16
    with pytest.raises(ConfigError, match=r"key 'num_key_value_heads' is missing"):
        parse_config(without(config_of(), "num_key_value_heads"), "c")


@pytest.mark.parametrize(
    ("rope", "positions", "message"),
    [
        ({}, 64, r"the model's positions; for longer texts .* YaRN: --rope-scaling yarn --rope-factor 4"),
        ({"rope_type": "linear", "factor": 2.5}, 160, r"the model's positions as rope_type='linear' stretches them"),
        ({**YARN, "original_max_position_embeddings": 32}, 128, r"positions as rope_type='yarn' stretches them"),
        (LLAMA3, 64, r"positions as rope_type='llama3' stretches them"),
        (
            {"rope_type": "dynamic", "factor": 4},
            64,
            r"where rope_type='dynamic' is one table: for longer runs it goes by",
        ),
        (
            LONGROPE,
            32,
            r"where rope_type='longrope' is one table: .* while the KV cache holds rows rotated for shorter",
        ),
    ],
    ids=["default", "linear", "yarn", "llama3", "dynamic", "longrope"],
)
def test_the_longest_sequence_by_rope_type(rope: dict[str, Any], positions: int, message: str) -> None:
    config = parse_config({**config_of(), "rope_parameters": {**DEFAULT, **rope}}, "c")
    assert sequence_limit(config, None) == sequence_limit(config, positions) == positions
    with pytest.raises(ConfigError, match=rf"^--max-seq-len {positions + 1} is not in 1\.\.{positions}, .*{message}"):
        sequence_limit(config, positions + 1)


@pytest.mark.parametrize("positions", [1, 2**24])
def test_the_fewest_and_the_most_positions(positions: int) -> None:
    config = parse_config({**config_of(), "max_position_embeddings": positions}, "c")
    assert config.max_positions == positions
    cos, _ = rotary_tables(config, positions, positions - 1)
    assert cos.shape == (1, 8)
    assert float(cos[0, 0]) == pytest.approx(math.cos(positions - 1), abs=1e-6)


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 40)
    | st.sampled_from([2**53, 10**400, -(10**400)])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["silu", "yarn", "linear", "llama3", "longrope", "dynamic", "Glm4ForCausalLM"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)
SPELLINGS = [
    config_of(),
    older(config_of()),
    older(config_of(), dict(YARN)),
    *(config_of(rope_parameters=DEFAULT | scaling) for scaling in (YARN, LONGROPE, LLAMA3)),
]


@settings(max_examples=400, deadline=None)
@given(data=st.data(), base=st.sampled_from(SPELLINGS), value=JSON_VALUES)
def test_any_value_of_any_key_parses_or_is_refused(data: st.DataObject, base: dict[str, Any], value: Any) -> None:
    changed = copy.deepcopy(base)
    targets = [changed, *(inner for inner in changed.values() if isinstance(inner, dict))]
    target = data.draw(st.sampled_from(targets))
    if data.draw(st.booleans()):
        target[data.draw(st.sampled_from(sorted(target)) if target else st.text())] = value
    else:
        target.pop(data.draw(st.sampled_from(sorted(target))), None)
    try:
        config = parse_config(changed, "c")
    except ConfigError as error:
        assert str(error).startswith("c: ")
    else:
        assert isinstance(config, Glm4Config)
