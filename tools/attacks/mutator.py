"""What mutated JSON is made of."""

from __future__ import annotations

import json
import random
from typing import Any

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
ESCAPE = "\x1b[2J\x1b]0;owned\x07\r\n  forged: line"
NUMBERS = (
    *("0", "-1", "1", "2", "3", "7", "-0.0", "0.5", "1e-30", "1e-46", "5e-324", "1e30", "1e39", "1e308", "1e400"),
    *("NaN", "Infinity", "-Infinity", "2147483647", "2147483648", str(2**60), str(2**63), str(2**64), "100000000"),
    *("1" + "0" * 400, "1" + "0" * 5000, "1.0", "64.0", "16777216", "16777217", "1E5", "1.0000000000000002"),
)
OTHERS = (
    *("null", "true", "false", '""', '"x"', '"64"', "[]", "{}", "[1]", "[[]]", '{"a": 1}', '[null, 1, "x"]'),
    *('"yarn"', '"linear"', '"default"', '"dynamic"', '"gelu"', '"模型"', '"\\ud800"', '"\\u0000"', '"\\u202e"'),
    *(json.dumps(ESCAPE), json.dumps("x" * 100_000), "[" * 100_000, "[" * 500 + "]" * 500, "[" * 990 + "]" * 990),
    *('{"a":' * 300 + "1" + "}" * 300, "[" + "1," * 50_000 + "1]", json.dumps(["\x1b[31m"] * 20)),
)


class Mutator:
    """JSON with values that json.dumps wouldn't write, and texts that aren't JSON."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self._raw: list[str] = []

    def value(self) -> str:
        """A marker that :meth:`text` replaces by some JSON text."""
        self._raw.append(self.random.choice(self.random.choice((NUMBERS, OTHERS))))
        return f"@raw{len(self._raw) - 1}@"

    def text(self, data: Any) -> str:
        """The JSON, now and then with a key twice."""
        text = json.dumps(data, ensure_ascii=self.random.random() < 0.5)
        for index, raw in enumerate(self._raw):
            text = text.replace(f'"@raw{index}@"', raw)
        if self.random.random() < 0.03 and text.startswith('{"'):
            text = f'{{"{self.random.choice(list(data))}": {self.random.choice(NUMBERS)}, {text[1:]}'
        return text

    def change(self, data: Any) -> None:
        """One change somewhere in nested objects and lists."""
        places = [data]
        for place in places:
            children = place.values() if isinstance(place, dict) else place
            places += [child for child in children if isinstance(child, dict | list) and child]
        place = self.random.choice(places)
        key = self.random.choice(list(place)) if isinstance(place, dict) else self.random.randrange(len(place))
        kind, old = self.random.random(), place[key]
        if kind < 0.1:
            del place[key]
        elif kind < 0.2 and isinstance(place, dict):
            place[self.random.choice((ESCAPE, key + " ", key.upper(), "模型", "type", "x" * 10_000))] = place.pop(key)
        elif kind < 0.5 and type(old) in (int, float):
            factor = 10.0 ** self.random.uniform(-12, 12)
            place[key] = old + self.random.choice((-1, 1)) if kind < 0.3 else type(old)(old * factor)
        else:
            place[key] = self.value()

    def bytes(self, data: bytes) -> bytes:
        """Now and then the file is damaged as a whole."""
        kind, at = self.random.random(), self.random.randrange(len(data) + 1)
        if kind < 0.02:
            return data[:at]
        if kind < 0.04:
            return data[:at] + self.random.randbytes(self.random.randrange(1, 9)) + data[at + 1 :]
        if kind < 0.05:
            start = (b"", b"\xef\xbb\xbf" + data, POINTER.encode(), b"\0" * 100, data.decode("latin1").encode("utf-16"))
            return self.random.choice(start)
        return data
