"""The page's markdown in Node, where there is one: what it makes of texts that are meant to keep it busy."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from glm4serve import page

NODE = shutil.which("node")
MODULE = Path(page.__file__).with_name("markdown.js")

#: As much of a document as the module uses: nodes are [name, attributes, children].
DOCUMENT = """
class Node {
  constructor(name) { this.nodeName = name.toUpperCase(); this.attributes = {}; this.childNodes = []; }
  setAttribute(key, value) { this.attributes[key] = value; }
  append(...children) { for (const child of children) { if (child !== "") this.childNodes.push(child); } }
  get firstChild() { return this.childNodes[0]; }
  replaceWith() {}
  toJSON() { return [this.nodeName, this.attributes, this.childNodes]; }
}
globalThis.document = { createElement: (name) => new Node(name), createDocumentFragment: () => new Node("fragment") };
const { markdown } = await import(process.argv[1]);
const texts = JSON.parse(await new Promise((done) => {
  let text = "";
  process.stdin.on("data", (piece) => (text += piece)).on("end", () => done(text));
}));
console.log(JSON.stringify(texts.map(markdown)));
"""

#: Each took seconds to hours where a pattern looked on to the text's end from every place in it.
HOSTILE = {
    "bold": "**a " * 20_000,
    "brackets": "[a" * 40_000,
    "struck": "~~a " * 20_000,
    "ticks": "a " + "`" * 50_000 + "x",
    "heading": "# " + "#" * 50_000 + "x",
    "blanks": "# " + " " * 50_000 + "x",
    "cells": "a|b\n" + "|-" * 20_000 + "x",
    "fences": "```\n" * 20_001,
    "quotes": ("> " * 20 + "\n") * 2000,
    "items": "\n".join(" " * (row % 40) + "- a" for row in range(4000)),
}


def shown(*texts: str) -> list[Any]:
    """What the module makes of them: [name, attributes, children] for each node."""
    if NODE is None:
        pytest.skip("no Node on the path")
    command = [NODE, "--input-type=module", "--eval", DOCUMENT, MODULE.as_uri()]
    # The limit is no measure: without bounds these take far longer.
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, timeout=120)
    assert not done.stderr
    return list(json.loads(done.stdout))


def words(node: Any) -> str:
    return node if isinstance(node, str) else "".join(words(child) for child in node[2])


def test_hostile_texts_are_shown_and_nothing_hangs() -> None:
    found = dict(zip(HOSTILE, shown(*HOSTILE.values()), strict=True))
    for name in ("bold", "brackets", "ticks", "heading"):
        assert words(found[name]).strip() == HOSTILE[name].strip(), name  # no markup in them: as they are
    assert len(found["fences"][2]) == 10_001 and {child[0] for child in found["fences"][2]} == {"PRE"}


def test_backticks_are_as_many_at_the_end_as_at_the_beginning() -> None:
    [[_, _, [paragraph]]] = shown("a `` b ` c `` d ``` e `f`")
    assert paragraph[2] == ["a ", ["CODE", {}, ["b ` c"]], " d ``` e ", ["CODE", {}, ["f"]]]
