"""The documents: what they show runs, what they name exists, and the map has every module."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from glm4export import cli
from glm4export.sources.checkpoint import locate

ROOT = Path(__file__).resolve().parent
while not (ROOT / "pyproject.toml").exists():
    ROOT = ROOT.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("glm4export", "graphs/glm4graphs", "runtime/glm4runtime", "runtime/glm4serve")
HUB_ID = "zai-org/GLM-4-9B-0414"
NOT_RUN, FILE = "not run: ", "file: "  # comments in front of a block of code
FOREIGN = {  # options of other people's programs
    *("--check", "--preload", "--model_args", "--tasks"),
    *("--workers", "--membind", "--cpunodebind", "--exit-timeout-secs", "--model-repository"),
    *("--cap-drop", "--read-only", "--stop-timeout", "--tmpfs"),
}


@dataclass(frozen=True)
class Block:
    """One fenced block of code, and the HTML comment right in front of it."""

    language: str
    text: str
    comment: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"(?:^<!-- (.*?) -->\n)?^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield Block(match[2], match[3], match[1] or "", text.count("\n", 0, match.start(2)) + 1)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def name_of(page: Path) -> str:
    return page.name


def options_of(command: str) -> set[str]:
    parser = argparse.ArgumentParser()
    import_module(f"glm4export.commands.{command}").configure(parser)
    return set(parser._option_string_actions)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "guide.md"], ids=name_of)
def test_what_is_shown_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the embedded model in the place of the hub's, in the page's order, in one folder."""
    monkeypatch.chdir(tmp_path)
    ran = 0
    for block in blocks(page):
        if block.comment.startswith(NOT_RUN) or block.language not in ("sh", "python"):
            continue
        ran += 1
        if block.comment.startswith(FILE):
            text = (locate(None).folder / "heldout.txt").read_text(encoding="utf-8")
            Path(block.comment.removeprefix(FILE)).write_text(text[:3000], encoding="utf-8")
        if block.language == "python":
            exec(compile(block.text, f"{page.name}:{block.line}", "exec"), {})
            continue
        for line in block.text.splitlines():
            program, *argv = shlex.split(line, comments=True)
            assert program == "glm4export", f"{page.name}: no test runs {line}"
            if argv[0] == "build" and "--target" not in argv:  # the fastest where the test runs
                argv += ["--target", "cpu"]
            assert cli.main([word for word in argv if word != HUB_ID]) == 0, line
    assert ran > 1


def test_the_readme_shows_what_the_demo_prints(
    demo_bundles: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """But for figures that differ between machines."""
    bundle = str(demo_bundles["fp16"])
    commands = [line for line in (ROOT / "tools" / "demo.sh").read_text().splitlines() if line.startswith("glm4export")]
    assert [shlex.split(line)[1] for line in commands] == ["build", "verify", "generate"]
    assert cli.main(["verify", bundle]) == 0
    assert cli.main(["generate", bundle, *shlex.split(commands[2])[3:]]) == 0
    printed = capsys.readouterr().out.splitlines()
    (shown,) = (block.text.splitlines() for block in blocks(ROOT / "README.md") if block.language == "text")
    size = sum(path.stat().st_size for path in demo_bundles["fp16"].iterdir()) / 1e6
    assert f"out/demo-fp16: fp16 for cpu, {size:.1f} MB, 2048 positions" in shown
    rows = re.compile(r"^(phase|prefill|decode|continuation|chat|chunks|all) +(\S+)")
    tables = [[match.groups() for line in lines if (match := rows.match(line))] for lines in (shown, printed)]
    assert tables[0] == tables[1] and len(tables[0]) == 7
    assert shown[-1] == printed[-1] == "The capital of France is Paris." and "passed" in printed and "passed" in shown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: no {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(file), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name}: no heading for {target}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page: Path) -> None:
    """Those of the repository: by their path, by their path in a package, or by a module's name alone."""
    text = page.read_text(encoding="utf-8")
    modules = {path.name for root in (*PACKAGES, "tests", "tools") for path in (ROOT / root).rglob("*.py")}
    tops = ("docs", "graphs", "glm4export", "runtime", "tests", "tools")
    for name in re.findall(r"[\w.-]+(?:/[\w.-]+)*/?(?:\.\w+)?", " ".join(re.findall(r"`([^`\n]+)`", text))):
        if name.split("/")[0] in tops and "/" in name:
            assert (ROOT / name).exists(), f"{page.name}: no {name}"
        elif name.endswith(".py") and "/" in name:
            assert any((ROOT / package / name).exists() for package in PACKAGES), f"{page.name}: no {name}"
        elif name.endswith(".py"):
            assert name in modules, f"{page.name}: no {name}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_that_are_named_exist(page: Path) -> None:
    """Each in the command that it's shown with; alone, in any command or in a tool."""
    text = page.read_text(encoding="utf-8")
    of_tools = {
        option
        for tool in (ROOT / "tools").rglob("*.py")
        for option in re.findall(r'"(--[a-z][\w-]*)"', tool.read_text(encoding="utf-8"))
    }
    of_all = set().union(*(options_of(command) for command in cli.COMMANDS))
    for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text):
        assert option in of_all | of_tools | FOREIGN, f"{page.name}: no option {option}"
    shown = [line for block in blocks(page) for line in block.text.splitlines()]
    shown += re.findall(r"`([^`\n]+)`", prose(page))
    for line in shown:
        if match := re.match(rf"(?:glm4export )?({'|'.join(cli.COMMANDS)}) (.*)", line):
            wrong = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", match[2].split("#")[0])) - options_of(match[1])
            assert not wrong, f"{page.name}: {match[1]} has no {', '.join(wrong)}"


def test_nobody_is_told_to_install_the_package_from_an_index() -> None:
    """It is on none: whoever takes its name there could give what they like."""
    sources = [path for root in (*PACKAGES, "tools") for path in (ROOT / root).rglob("*.py")]
    for path in [*PAGES, *sources]:
        found = re.search(r"install (?:-\S+ )*['\"]?glm4export\b", path.read_text(encoding="utf-8"))
        assert found is None, f"{path}: {found and found[0]}"


@pytest.mark.parametrize("command", [command for command in cli.COMMANDS if command != "chat"])  # for people
def test_every_command_has_json(command: str) -> None:
    assert "--json" in options_of(command)


def test_the_map_has_every_module_once() -> None:
    """By room: the headings of docs/architecture.md are folders, the tables below them their modules."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms: dict[str, list[str]] = {}
    for part in re.split(r"^### ", text.split("## The passes\n")[0], flags=re.MULTILINE)[1:]:
        rooms[part.split("\n")[0]] = re.findall(r"^\| `(\w+\.py)` \|", part, re.MULTILINE)
    there: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name != "__init__.py":
                there.setdefault(path.parent.relative_to(ROOT).as_posix(), []).append(path.name)
    named = {room: sorted(name for name in names if name != "__init__.py") for room, names in rooms.items()}
    assert named == {room: sorted(names) for room, names in there.items()}
