"""Finding checkpoints: folders, the hub's cache, and the hub."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from glm4export.sources.checkpoint import CheckpointError, Location, locate


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
