"""What a build may replace: files that a manifest of ours lists, as it lists them. All else is named and stays."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from glm4export import cli
from glm4export.bundle import folder as bundle_folder
from glm4export.bundle import swap
from glm4export.bundle.folder import changed_bundle, check_output, new_bundle
from glm4export.bundle.swap import OutputError
from glm4runtime.contract import MANIFEST, WEIGHTS
from glm4runtime.folder import layout
from tests.helpers.small_bundles import bundle_names, contents, fill, names


@pytest.fixture
def out(tmp_path: Path) -> Path:
    fill(tmp_path / "bundle", "chat_template.jinja")
    return tmp_path / "bundle"


def put(folder: Path, *files: str) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


def refusal(out: Path) -> str:
    """Why a build into ``out`` is refused; it is before any work, and nothing changes."""
    before = contents(out.parent)
    for refused in (new_bundle, check_output):
        with pytest.raises(OutputError) as caught, refused(out):  # type: ignore[union-attr]
            pytest.fail("not reached")
        assert contents(out.parent) == before
    return str(caught.value)


NOT_AS_LEFT = "refusing to replace what is not as a build left it: "


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (["NOTES.md"], "NOTES.md;"),
        (["results/a.csv", "results/b.csv"], "results/;"),
        ([".git/HEAD"], ".git/;"),
        (["prefill.onnx.bak", "NOTES.md", "a", "b", "c"], "NOTES.md, a, b and 2 more;"),
        (["engines/mine.engine"], "engines/mine.engine;"),
        (["prepared/mine.bin"], "prepared/;"),
        ([".bundle.build-x/mine"], ".bundle.build-x/;"),
        (["lost+found/mine"], "lost+found/;"),
        (["chat_template.jinja"], "chat_template.jinja (changed);"),
    ],
)
def test_what_is_not_ours_is_named(files: list[str], named: str, out: Path) -> None:
    put(out, *files)
    assert refusal(out) == (f"{out}: {NOT_AS_LEFT}{named} move it elsewhere, or choose another folder with -o")


def test_an_edit_of_the_same_size_is_seen(out: Path) -> None:
    text = (out / "chat_template.jinja").read_text()
    (out / "chat_template.jinja").write_text(text.swapcase())
    assert f"{NOT_AS_LEFT}chat_template.jinja (changed);" in refusal(out)


@pytest.mark.parametrize("name", [WEIGHTS, "prefill.onnx"])
def test_a_damaged_bundle_can_be_built_again(name: str, out: Path) -> None:
    """Where a copy broke off, messages say to build again; nobody edits weights and graphs."""
    os.truncate(out / name, 3)
    check_output(out)


def test_a_file_where_a_folder_is_listed_and_the_reverse(out: Path) -> None:
    (out / "chat_template.jinja").unlink()
    (out / "chat_template.jinja").mkdir()
    (out / "results").symlink_to(out.parent)
    assert f"{NOT_AS_LEFT}chat_template.jinja/, results;" in refusal(out)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"name": "my web app", "icons": []}', r"a bundle of ours \(manifest.json: key 'format_version' is missing\)"),
        ("[]", r"a bundle of ours \(manifest.json: expected an object, found list\)"),
        ('{"format_version": 3}', r"a bundle of ours \(manifest.json: bundle format 3, this version reads format 2\)"),
        ("\udcff", r"a bundle of ours \('utf-8' codec can't decode byte .*\)"),
    ],
)
def test_a_manifest_of_somebody_else(text: str, reason: str, tmp_path: Path) -> None:
    out = tmp_path / "app"
    put(out, WEIGHTS)
    (out / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(OutputError, match=rf"{out}: exists and is not {reason}; refusing to replace it"):
        check_output(out)
    assert names(out) == [MANIFEST, WEIGHTS]


def test_a_bundle_by_another_producer(tmp_path: Path) -> None:
    fill(tmp_path / "bundle", producer="another")
    assert refusal(tmp_path / "bundle").endswith("is a bundle by 'another'; refusing to replace it")


def test_what_our_tools_make_is_ours(out: Path) -> None:
    """A prepared folder, caches of ONNX Runtime's providers, an empty engines folder; a file that's missing."""
    put(out, *(f"prepared/{name}/{file}" for name in ("prefill", "decode") for file in (f"{name}.onnx", WEIGHTS)))
    (out / "prepared" / "prepared.json").write_text(json.dumps({"machine": "x", "weights": "y"}))
    put(out, *(f"{folder}/cache.bin" for folder in layout.ORT_CACHES.values()))
    (out / "chat_template.jinja").unlink()
    with new_bundle(out) as folder:
        fill(folder, "new")
    assert names(out) == bundle_names("new") and names(out.parent) == ["bundle"]
    put(out, "prepared/prefill/mine")
    (out / "prepared" / "prepared.json").write_text(json.dumps({"machine": "x", "weights": "y"}))
    assert f"{NOT_AS_LEFT}prepared/prefill/mine;" in refusal(out)


@pytest.mark.parametrize("when", ["before the swap", "amid the swap"])
@pytest.mark.parametrize("atomic", [True, False], ids=["renameat2", "no renameat2"])
def test_a_file_that_appears_meanwhile_stays(
    when: str, atomic: bool, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Amid the swap: after the last look at the folder, and before it is moved."""
    before = contents(out)
    if not atomic:
        monkeypatch.setattr(swap, "exchange", lambda first, second: False)

    def late(*arguments: Path) -> None:
        put(out, "NOTES.md")
        swap.swap(*arguments)  # type: ignore[arg-type]

    if when == "amid the swap":
        monkeypatch.setattr(bundle_folder, "swap", late)
    with pytest.raises(OutputError, match=rf"{out}: {NOT_AS_LEFT}NOTES.md;"), new_bundle(out) as folder:
        fill(folder, "new")
        if when == "before the swap":
            put(out, "NOTES.md")
    assert contents(out) == {**before, "NOTES.md": b"mine"} and names(out.parent) == ["bundle"]


# Inputs


@pytest.mark.parametrize(
    ("out", "given", "how"),
    [
        ("a", "a", "is the input {given} itself"),
        ("a/sub", "a", "lies in the input {given}"),
        ("a/sub/deep", "a", "lies in the input {given}"),
        ("a", "a/checkpoint", "holds the input {given}"),
        ("link", "a", "is the input {given} itself"),
        ("a", "link", "is the input {given} itself"),
        ("link/sub", "a", "lies in the input {given}"),
        ("a", "link/checkpoint", "holds the input {given}"),
        ("a/../a/./", "a", "is the input {given} itself"),
        ("a", "a/text.txt", "holds the input {given}"),
        ("a", "a/not/there/yet.cache", "holds the input {given}"),
        ("a/text.txt", "a/text.txt", "is the input {given} itself"),
        ("b", "c", "holds the input {given}/model.safetensors"),  # a link into b
    ],
)
def test_output_and_input_lie_apart(out: str, given: str, how: str, tmp_path: Path) -> None:
    for folder in ("a/checkpoint", "b", "c"):
        (tmp_path / folder).mkdir(parents=True)
    put(tmp_path, "a/text.txt", "b/model.safetensors")
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "c" / "model.safetensors").symlink_to("../b/model.safetensors")
    before = contents(tmp_path)
    path, place = tmp_path / given, Path(os.path.realpath(tmp_path / out))
    for refused in (new_bundle, check_output):
        with pytest.raises(OutputError) as caught, refused(tmp_path / out, [path]):  # type: ignore[union-attr]
            pytest.fail("not reached")
        told = f"{place}: {how.format(given=path)}; the output must lie apart from it, choose another folder"
        assert str(caught.value) == told
    assert contents(tmp_path) == before


def test_output_beside_inputs(tmp_path: Path) -> None:
    put(tmp_path, "a/config.json", "text.txt")
    with new_bundle(tmp_path / "ab", [tmp_path / "a", tmp_path / "text.txt", tmp_path / "none"]) as folder:
        fill(folder)
    assert names(tmp_path) == ["a", "ab", "text.txt"]


@pytest.mark.parametrize(
    ("argv", "how"),
    [
        (["{out}/checkpoint", "-o", "{out}"], "{out}: holds the input {out}/checkpoint;"),
        (["{out}", "-o", "{out}"], "{out}: is the input {out} itself;"),
        (["{out}", "-o", "{out}/sub"], "{out}/sub: lies in the input {out};"),
        (["--calibrate", "{out}/text.txt", "-o", "{out}"], "{out}: holds the input {out}/text.txt;"),
        (["--timing-cache", "{out}/cache", "-o", "{out}", "--target", "tensorrt"], "{out}: holds the input {out}/ca"),
    ],
)
def test_build_refuses_at_once(
    argv: list[str], how: str, out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before torch is imported, or anything downloaded."""
    monkeypatch.setattr("glm4export.commands.build.require_flavour", lambda arguments: None)
    monkeypatch.setattr("glm4export.sources.checkpoint.locate", lambda *given, **named: pytest.fail("not reached"))
    put(out, "checkpoint/config.json", "text.txt")
    before = contents(out.parent)
    assert cli.main(["build", *(argument.format(out=out) for argument in argv)]) == 2
    assert capsys.readouterr().err.startswith(f"glm4export: error: {how.format(out=out)}")
    assert contents(out.parent) == before


# A bundle that is changed, as `glm4export engine` does


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "none"])
def test_what_is_changed_keeps_the_users_files(links: bool, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **named: object) -> None:
        raise PermissionError

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    put(out, "NOTES.md", "results/a.csv", "chat_template.jinja")
    (out / "results" / "latest").symlink_to("a.csv")
    (out / "elsewhere").symlink_to("/nowhere")
    before = contents(out)
    with changed_bundle(out) as folder:
        assert contents(folder) == before
        assert ((folder / WEIGHTS).stat().st_ino == (out / WEIGHTS).stat().st_ino) is links
        put(folder, "engines/new.engine")
    assert contents(out) == {**before, "engines/new.engine": b"mine"} and names(out.parent) == ["bundle"]
    assert (out / "elsewhere").readlink() == Path("/nowhere")
    assert (out / "results" / "latest").readlink() == Path("a.csv")


@pytest.mark.parametrize("change", ["new", "written", "replaced", "gone"])
def test_what_changes_meanwhile_is_kept(change: str, out: Path) -> None:
    put(out, "NOTES.md")
    notes = out / "NOTES.md"
    with (
        pytest.raises(OutputError, match=rf"{out}: was changed meanwhile \((new|NOTES)\.md\); run the command again"),
        changed_bundle(out) as folder,
    ):
        put(folder, "engines/new.engine")
        if change == "new":
            put(out, "new.md")
        elif change == "written":
            notes.write_text("mine, and longer")
        elif change == "replaced":
            put(out.parent, "other")
            (out.parent / "other").rename(notes)
        else:
            notes.unlink()
        before = contents(out)
    assert contents(out) == before and names(out.parent) == ["bundle"]
