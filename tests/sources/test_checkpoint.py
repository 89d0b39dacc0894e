"""Reading checkpoints: windows, shards and their index, damage."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glm4export.sources.checkpoint import Checkpoint, CheckpointError
from glm4export.sources.config_json import read_config
from glm4export.sources.ledger import expected_tensors
from glm4export.weights.tensors import whole
from glm4runtime.contract import UserError
from tests.helpers import checkpoints
from tests.helpers.checkpoints import change

INDEX = "model.safetensors.index.json"


@cache
def opened(folder: Path) -> tuple[Checkpoint, dict[str, torch.Tensor]]:
    return Checkpoint.open(folder), load_file(folder / "model.safetensors")


def test_single_file_and_shards_hold_the_same_tensors(single: Path, sharded: Path) -> None:
    shards = sorted(path.name for path in sharded.glob("*.safetensors"))
    assert len(shards) > 2 and (sharded / INDEX).is_file()
    one, many = Checkpoint.open(single), Checkpoint.open(sharded)
    assert (
        one.tensors.keys() == many.tensors.keys() == dict(expected_tensors(read_config(single / "config.json"))).keys()
    )
    for name, stored in one.tensors.items():
        assert (stored.shape, stored.dtype) == (many.tensors[name].shape, many.tensors[name].dtype)
        window = whole(stored.shape)
        assert torch.equal(one.read(name, window), many.read(name, window)), name
    one.check(read_config(single / "config.json"))
    many.check(read_config(sharded / "config.json"))
    assert one.fingerprint() == many.fingerprint()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_windows_are_slices(single: Path, data: st.DataObject) -> None:
    checkpoint, tensors = opened(single)
    name = data.draw(st.sampled_from(sorted(tensors)))
    window = []
    for size in tensors[name].shape:
        start = data.draw(st.integers(0, size - 1))
        window.append((start, data.draw(st.integers(start + 1, size))))
    found = checkpoint.read(name, tuple(window))
    assert torch.equal(found, tensors[name][tuple(slice(*bounds) for bounds in window)])
    found.zero_()  # a copy: the file keeps its data
    assert torch.equal(checkpoint.read(name, whole(tensors[name].shape)), tensors[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_stored_dtype_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    checkpoints.save(checkpoints.random_model().to(dtype), tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert {stored.dtype for stored in checkpoint.tensors.values()} == {dtype}
    assert checkpoint.read("model.norm.weight", ((3, 5),)).dtype == dtype


def test_fingerprint_tells_configs_and_shapes_apart(mine: Path) -> None:
    prints = [Checkpoint.open(mine).fingerprint()]
    change(mine, model__norm__weight=torch.ones(65))
    prints.append(Checkpoint.open(mine).fingerprint())
    change(mine, model__norm__weight=torch.ones(65, dtype=torch.float16))
    prints.append(Checkpoint.open(mine).fingerprint())
    (mine / "config.json").write_text((mine / "config.json").read_text() + " ")
    prints.append(Checkpoint.open(mine).fingerprint())
    assert len(set(prints)) == 4


HEADER = 8  # bytes of the header's length in front of a safetensors file


@pytest.mark.parametrize("size", [0, 1, HEADER - 1, HEADER, HEADER + 1, 1000, "half", "less one"])
def test_truncated_files(size: int | str, mine: Path) -> None:
    file = mine / "model.safetensors"
    whole_size = file.stat().st_size
    os.truncate(file, {"half": whole_size // 2, "less one": whole_size - 1}.get(str(size), size))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: damaged or truncated \(.+\); fetch the file again$"
    ):
        Checkpoint.open(mine)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 64,
        (2).to_bytes(8, "little") + b"{]" + bytes(64),
        (1 << 40).to_bytes(8, "little") + b"{}",
        pickle.dumps({"weight": 1}),
    ],
    ids=["ones", "not json", "huge header", "pickle"],
)
def test_garbage_headers(content: bytes, mine: Path) -> None:
    (mine / "model.safetensors").write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: damaged or truncated \(.+\); fetch the file again$"
    ):
        Checkpoint.open(mine)


@pytest.mark.parametrize("name", [INDEX, "model-00001-of-00004.safetensors"])
def test_a_clone_without_git_lfs(name: str, my_shards: Path) -> None:
    names = sorted(path.name for path in my_shards.glob("*.safetensors"))
    file = my_shards / (name if name == INDEX else names[0])
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match=rf"{file}: a git-lfs pointer, not the file; run `git lfs pull` in the folder"):
        Checkpoint.open(my_shards)


def test_a_file_that_vanishes_after_opening(mine: Path) -> None:
    checkpoint = Checkpoint.open(mine)
    (mine / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot read model\.norm\.weight \("):
        checkpoint.read("model.norm.weight", ((0, 64),))


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.int8, "I8"), (torch.float64, "F64"), (torch.float8_e4m3fn, "F8_E4M3")]
)
def test_unsupported_dtype(dtype: torch.dtype, name: str, mine: Path) -> None:
    change(mine, model__norm__weight=torch.ones(64).to(dtype))
    with pytest.raises(CheckpointError, match=rf"model\.norm\.weight has dtype {name}; supported: F32, F16, BF16"):
        Checkpoint.open(mine)


def test_only_a_pickle(mine: Path) -> None:
    (mine / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json found$"):
        Checkpoint.open(mine)
    (mine / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(
        CheckpointError, match=r"pytorch_model\.bin is a pickle, which is never read: convert it to safe"
    ):
        Checkpoint.open(mine)


def test_missing_shards_are_all_named(my_shards: Path) -> None:
    files = sorted(path.name for path in my_shards.glob("*.safetensors"))
    (my_shards / files[0]).unlink()
    (my_shards / files[-1]).unlink()
    with pytest.raises(CheckpointError, match=rf"2 of {len(files)} shards are missing: {files[0]}, {files[-1]}$"):
        Checkpoint.open(my_shards)


def reindex(folder: Path, **placed: str | None) -> list[str]:
    """Give tensors to other shards in the index, or (None) to none; returns all shards' names."""
    data = json.loads((folder / INDEX).read_text())
    for name, file in placed.items():
        data["weight_map"].pop(name.replace("__", "."))
        if file is not None:
            data["weight_map"][name.replace("__", ".")] = file
    (folder / INDEX).write_text(json.dumps(data))
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_shards_that_their_index_contradicts(my_shards: Path) -> None:
    """Every kind of contradiction, in one list; which numbers are the model's is nowhere said."""
    holders = {name: path.name for path in my_shards.glob("*.safetensors") for name in load_file(path)}
    where = holders["model.norm.weight"]
    other = next(name for name in holders.values() if name != where)
    copied = load_file(my_shards / other)
    save_file({**copied, "model.norm.weight": torch.zeros(64), "extra": torch.zeros(1)}, my_shards / other)
    embedding = holders["model.embed_tokens.weight"]
    elsewhere = next(name for name in sorted(holders.values()) if name != embedding)
    reindex(my_shards, model__embed_tokens__weight=elsewhere)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(my_shards)
    assert str(caught.value).splitlines() == [
        f"{my_shards}/{INDEX}: contradicted by its shards about 3 tensors; fetch index and shards again, or save the "
        "model again",
        f"  model.embed_tokens.weight: given to {elsewhere}, which doesn't hold it; {embedding} does",
        f"  model.norm.weight: given to {where}, and in {other} too",
        f"  extra: in {other}, and not in weight_map",
    ]


def test_a_tensor_that_no_shard_holds(my_shards: Path) -> None:
    first = reindex(my_shards)[0]
    data = json.loads((my_shards / INDEX).read_text())
    data["weight_map"]["model.norm.bias"] = first
    (my_shards / INDEX).write_text(json.dumps(data))
    with pytest.raises(
        CheckpointError, match=rf"1 tensors;(.|\n)*  model\.norm\.bias: given to {first}, which doesn't ho"
    ):
        Checkpoint.open(my_shards)


def test_a_shard_that_the_index_does_not_name_is_not_read(my_shards: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(64)}, my_shards / "model-00009-of-00009.safetensors")
    checkpoint, config = Checkpoint.open(my_shards), read_config(my_shards / "config.json")
    checkpoint.check(config)
    assert checkpoint.read("model.norm.weight", ((0, 64),)).abs().min() > 0
    with pytest.raises(CheckpointError, match=rf"not read, since {INDEX} is: model-00009-of-00009\.safetensors$"):
        checkpoint.check(dataclasses.replace(config, vocab_size=97))


def test_a_single_file_beside_an_index_of_others(my_shards: Path) -> None:
    save_file({"model.norm.weight": torch.zeros(64)}, my_shards / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"holds model\.safetensors, and {INDEX} that names \d+ files; remove"):
        Checkpoint.open(my_shards)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "./x.safetensors"])
def test_index_naming_a_file_elsewhere(name: str, my_shards: Path) -> None:
    data = json.loads((my_shards / INDEX).read_text())
    data["weight_map"]["model.norm.weight"] = name
    (my_shards / INDEX).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=rf"names '{name}', which is not a file of this folder; refusing it"):
        Checkpoint.open(my_shards)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "3", "{}", "\udcff", "[" * 100_000, '{"weight_map": 3}', '{"weight_map": []}'),
        *('{"weight_map": {}}', '{"weight_map": {"a": "x", "a": "y"}}'),
        *('{"weight_map": {"a": 5}}', '{"weight_map": {"a": ["x"]}}', '{"weight_map": {"a": null, "b": "x"}}'),
    ],
)
def test_malformed_index(content: str, my_shards: Path) -> None:
    (my_shards / INDEX).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"index\.json: not a safetensors index \(.+\); fetch it again"):
        Checkpoint.open(my_shards)
