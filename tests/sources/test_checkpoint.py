"""Finding and reading checkpoints: shards, damage, the ledger, and the hub."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import shutil
import threading
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from glm4export.sources.checkpoint import Checkpoint, CheckpointError, Location, locate
from glm4export.sources.config import read_config
from glm4export.sources.ledger import expected_tensors
from glm4export.weights.recipes import whole
from glm4runtime.contract import UserError
from tests.helpers import checkpoints

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.save(checkpoints.random_model(), tmp_path_factory.mktemp("checkpoint") / "single")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "sharded"
    return checkpoints.save(checkpoints.random_model(), folder, max_shard_size="100KB")


@pytest.fixture
def mine(single: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(single, tmp_path / "mine"))


@pytest.fixture
def my_shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "shards"))


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Set or (None) drop tensors of a single-file checkpoint; ``__`` stands for a dot."""
    file = folder / "model.safetensors"
    data = {name: tensor.clone() for name, tensor in load_file(file).items()}
    for name, tensor in tensors.items():
        data.pop(name.replace("__", "."), None)
        if tensor is not None:
            data[name.replace("__", ".")] = tensor
    save_file(data, file)


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


def test_ledger_lists_everything_at_once(mine: Path) -> None:
    change(
        mine,
        model__norm__weight=None,
        model__layers__1__mlp__down_proj__weight=None,
        model__layers__0__self_attn__q_proj__bias=torch.zeros(7),
        lm_head__weight=torch.zeros(64, 96),
        model__layers__2__input_layernorm__weight=torch.zeros(64),
        score__weight=torch.zeros(2, 64),
        model__rotary_emb__inv_freq=torch.zeros(8),  # some releases stored it: not an error
    )
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(mine).check(read_config(mine / "config.json"))
    assert str(caught.value).splitlines() == [
        f"{mine}: 6 tensors do not match config.json; is it this model's config?",
        "  missing model.layers.1.mlp.down_proj.weight [64, 128]",
        "  missing model.norm.weight [64]",
        "  unexpected model.layers.2.input_layernorm.weight [64]",
        "  unexpected score.weight [2, 64]",
        "  mis-shaped lm_head.weight: [64, 96], expected [96, 64]",
        "  mis-shaped model.layers.0.self_attn.q_proj.bias: [7], expected [128]",
        "  num_hidden_layers=2, and tensors of 3 layers are here",
    ]


def test_a_long_ledger_is_cut_and_counted(mine: Path) -> None:
    extra = {f"model__layers__0__self_attn__experts{index}": torch.zeros(1) for index in range(3000)}
    change(mine, **extra, model__norm__weight=torch.zeros(3))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(mine).check(read_config(mine / "config.json"))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{mine}: 3001 tensors do not match config.json; is it this model's config?"
    assert lines[1] == "  unexpected model.layers.0.self_attn.experts0 [1]"
    assert lines[11:] == ["  … and 2990 more", "  mis-shaped model.norm.weight: [3], expected [64]"]


@pytest.mark.parametrize("layers", [10**6, 2**31 - 1])
def test_layers_that_nothing_could_hold_are_refused_by_arithmetic(layers: int, single: Path) -> None:
    """13 tensors for every layer that isn't there, counted and not made."""
    config = dataclasses.replace(read_config(single / "config.json"), num_hidden_layers=layers)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(single).check(config)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{single}: {13 * (layers - 2)} tensors do not match")
    assert lines[1] == "  missing model.layers.2.input_layernorm.weight [64]"
    assert lines[-2:] == [
        f"  … and {13 * (layers - 2) - 20} more",
        f"  num_hidden_layers={layers}, and tensors of 2 layers are here",
    ]


@pytest.mark.parametrize("bias", [False, True])
def test_names_and_shapes_are_those_of_transformers(bias: bool, tmp_path: Path) -> None:
    model = checkpoints.random_model(attention_bias=bias, num_hidden_layers=3, num_attention_heads=6, head_dim=16)
    config = read_config(checkpoints.save(model, tmp_path) / "config.json")
    assert dict(expected_tensors(config)) == {name: tuple(t.shape) for name, t in model.state_dict().items()}


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("_orig_mod.", "it was saved from a torch.compile'd model: save model._orig_mod, or strip it from the names"),
        ("module.", "it was saved from inside DataParallel or DistributedDataParallel: save model.module, or strip"),
        ("base_model.model.", "it was saved from inside a PEFT model: save what its merge_and_unload() returns, or"),
        ("glm.\x1b[31m", "save the model inside, or strip it from the names"),
    ],
)
def test_a_prefix_of_every_name_is_named(prefix: str, message: str, mine: Path) -> None:
    file = mine / "model.safetensors"
    save_file({prefix + name: tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(mine).check(read_config(mine / "config.json"))
    shown = prefix.replace("\x1b", r"\x1b")
    assert str(caught.value).startswith(f"{mine}: every tensor's name begins with `{shown}`; {message}")


def test_a_lora_folder_is_told_from_a_model(mine: Path) -> None:
    (mine / "model.safetensors").rename(mine / "adapter_model.safetensors")
    (mine / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError) as without_weights:
        Checkpoint.open(mine)
    remedy = f"build the model that it was made for, with `--lora {mine}`"
    assert str(without_weights.value) == f"{mine}: a LoRA adapter (adapter_config.json), without weights; {remedy}"
    (mine / "config.json").unlink()
    with pytest.raises(CheckpointError) as without_config:
        locate(str(mine))
    assert str(without_config.value) == f"{mine}: a LoRA adapter (adapter_config.json), not a model; {remedy}"


def test_unmerged_lora_weights_are_told(mine: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    change(mine, **{name.replace(".", "__"): torch.zeros(8, 64)})
    with pytest.raises(
        CheckpointError, match=r": '.*lora_A\.weight' is a LoRA adapter's, not merged; save what its merge_and_unload"
    ):
        Checkpoint.open(mine).check(read_config(mine / "config.json"))


def test_names_with_control_codes_are_shown_escaped(mine: Path) -> None:
    change(mine, **{"\x1b[2Jx\n  missing all": torch.zeros(1)})
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(mine).check(read_config(mine / "config.json"))
    assert str(caught.value).splitlines()[1:] == [r"  unexpected \x1b[2Jx\n  missing all [1]"]


@pytest.mark.parametrize("store_head", [False, True])
def test_tied_checkpoints_may_store_the_head_or_not(store_head: bool, tmp_path: Path) -> None:
    checkpoints.save(checkpoints.random_model(tie_word_embeddings=True), tmp_path)
    if store_head:
        change(tmp_path, lm_head__weight=torch.zeros(96, 64))
    checkpoint, config = Checkpoint.open(tmp_path), read_config(tmp_path / "config.json")
    assert config.tie_word_embeddings and ("lm_head.weight" in checkpoint.tensors) is store_head
    checkpoint.check(config)


def test_untied_checkpoint_needs_its_head(mine: Path) -> None:
    change(mine, lm_head__weight=None)
    with pytest.raises(CheckpointError, match=r"1 tensors do not match(.|\n)*missing lm_head\.weight \[96, 64\]"):
        Checkpoint.open(mine).check(read_config(mine / "config.json"))


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


def test_local_folders(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert locate(str(single)) == Location(single, {})
    monkeypatch.setenv("HOME", str(single.parent))
    assert locate(f"~/{single.name}").folder == single
    monkeypatch.chdir(single.parent.parent)
    assert locate(f"{single.parent.name}/{single.name}") == Location(Path(single.parent.name, single.name), {})


@pytest.mark.parametrize(
    "name", ["nowhere", "/no/such/folder", "a/b/c", "-a/b", "a/..", "a b/c", "http://x/y", "a/\0", "n/", "模/型"]
)
def test_names_that_are_neither_folder_nor_hub_id(name: str) -> None:
    with pytest.raises(CheckpointError, match=r": no such folder, and not a hub id such as zai-org/GLM-4-9B-0414$"):
        locate(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("~nobody-of-that-name/x", "home directory"),
        ("x" * 5000, "File name too long"),
        ("a/b--c", r"Cannot have -- or \.\. in repo_id.*; check the id"),
        ("a/b.git", r"cannot end by '\.git'.*; check the id"),
        ("a/" + "b" * 200, "maximum length is 96.*; check the id"),
    ],
)
def test_names_that_nothing_can_have(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        locate(name)
    assert "\n" not in str(caught.value)


def test_a_file_is_not_a_checkpoint(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(single)  # "folder/file" looks like a hub id
    (single / "sub").mkdir(exist_ok=True)
    (single / "sub" / "model").touch()
    with pytest.raises(CheckpointError, match=r"sub/model: no such folder"):
        locate("sub/model")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def hub_is_the_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here reaches the network: an empty cache and an endpoint that nobody listens on."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between huggingface_hub's own retries
    use_endpoint(monkeypatch, "http://127.0.0.1:9")


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub_cache(single: Path, tmp_path: Path) -> Path:
    """A hub cache that holds org/name, its branch main at COMMIT."""
    repo = tmp_path / "hub" / "models--org--name"
    shutil.copytree(single, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return tmp_path / "hub"


UNREACHED = "not in the local hub cache, and the hub can't be reached; connect, unset HF_HUB_OFFLINE, or give a local"


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "no network"])
def test_nothing_cached(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(CheckpointError, match=rf"^org/name: {UNREACHED} folder$"):
        locate("org/name")


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "no network"])
@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_local_hub_cache(offline: bool, revision: str, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    folder = hub_cache / "models--org--name" / "snapshots" / COMMIT
    assert locate("org/name", revision=revision) == Location(folder, {"repo_id": "org/name", "commit": COMMIT})


def test_revision_that_is_not_cached(hub_cache: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"^org/name@v2: {UNREACHED}"):
        locate("org/name", revision="v2")


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs; ``folder`` holds the files, ``failure`` says what goes wrong."""

    folder: Path
    failure: str

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        names = sorted(file.name for file in self.folder.iterdir() if file.is_file())
        if self.failure.isdigit():
            code = {"401": "RepoNotFound", "403": "GatedRepo", "404": "RevisionNotFound"}.get(self.failure, "")
            self._send(int(self.failure), b"{}", {"X-Error-Code": code, "X-Error-Message": "refused\nby the test"})
        elif path.startswith("/api/models/org/name/tree/"):
            tree = [{"type": "file", "path": n, "size": (self.folder / n).stat().st_size, "oid": n} for n in names]
            self._send(200, json.dumps(tree).encode())
        elif path.startswith("/api/models/org/name"):
            info = {"id": "org/name", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
            self._send(200, json.dumps(info).encode())
        elif path.startswith("/org/name/resolve/") and path.split("/")[-1] in names:
            data = (self.folder / path.split("/")[-1]).read_bytes()
            self._send(200, data, {"ETag": f'"{path.split("/")[-1]}"', "X-Repo-Commit": COMMIT})
        else:
            self._send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value.replace("\n", " "))
        self.end_headers()
        if self.command == "GET":
            cut = self.failure == "cut" and "/resolve/" in self.path
            self.wfile.write(body[: len(body) // 2] if cut else body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub_server(mine: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub that serves the files of ``mine``."""
    handler = type("Handler", (Hub,), {"folder": mine, "failure": ""})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield handler
    server.shutdown()
    server.server_close()


def test_download(hub_server: type[Hub], mine: Path, tmp_path: Path) -> None:
    (mine / "pytorch_model.bin").write_bytes(b"a pickle that nobody asked for")
    location = locate("org/name")
    assert location.folder == tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT
    assert location.source == {"repo_id": "org/name", "commit": COMMIT}
    files = sorted(path.name for path in location.folder.iterdir())
    assert files == ["config.json", "generation_config.json", "model.safetensors"]
    for name in files:
        assert (location.folder / name).read_bytes() == (mine / name).read_bytes()


def test_a_lora_adapter_on_the_hub_is_told(hub_server: type[Hub], mine: Path) -> None:
    (mine / "adapter_config.json").write_text("{}")
    (mine / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"a LoRA adapter \(adapter_config\.json\), not a model; build the model that"
    ):
        locate("org/name", weights=False)


@pytest.mark.parametrize("status", ["401", "403", "404"])
def test_a_hub_that_refuses(status: str, hub_server: type[Hub]) -> None:
    hub_server.failure = status
    with pytest.raises(CheckpointError, match=r"^org/name: .+; check the id, --revision and --token$") as caught:
        locate("org/name")
    assert "\n" not in str(caught.value)


def test_a_download_that_breaks_off(hub_server: type[Hub]) -> None:
    hub_server.failure = "cut"
    with pytest.raises(CheckpointError, match=r"^org/name: download failed \(.+\); run again to go on from there$"):
        locate("org/name")
