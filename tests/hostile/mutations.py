"""Random damage to files: to the bytes, to the words of a text, to the values of JSON."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    2,
    -1,
    7,
    2**31,
    2**63,
    2**70,
    10**30,
    0.5,
    -0.5,
    1e20,
    1e-300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1e-05",
    "auto",
    "../../x",
    "/etc/passwd",
    "\x1b[31mred\x1b[0m\r\n",
    "\u202egpj.exe\u2066",
    "\ud800",
    "long " * 2000,
    [],
    {},
    [[]],
    [None],
    ["global"] * 3,
    {"": None},
    [[["local"], 10**9]],
)
"""What a value may become: other types, extremes, text that controls terminals, names that lead elsewhere."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to every value inside, the whole included."""
    found = [path]
    if isinstance(value, dict):
        for key, inner in value.items():
            found += places(inner, (*path, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value[:20]):  # of a long list the beginning stands for all
            found += places(inner, (*path, number))
    return found


def mutated_value(value: Any, chance: random.Random) -> Any:
    """JSON with one or two values replaced, removed, doubled or nested."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 2))):
        path = chance.choice(places(value))
        if not path:
            value = value if chance.random() < 0.9 else chance.choice(VALUES)
            continue
        holder = value
        for step in path[:-1]:
            holder = holder[step]
        _change(holder, path[-1], chance)
    return value


def _change(holder: Any, key: Any, chance: random.Random) -> None:
    what = chance.choice(("replace", "replace", "replace", "remove", "rename", "nest", "scale"))
    old = holder[key]
    if what == "remove":
        del holder[key]
    elif what == "rename" and isinstance(holder, dict):
        holder[chance.choice(("x", "\x1b]0;title\x07", "../x", f"{key}x", ""))] = holder.pop(key)
    elif what == "nest":
        holder[key] = [old] if chance.random() < 0.5 else {"x": old}
    elif what == "scale" and isinstance(old, int | float):
        holder[key] = old * chance.choice((-1, 0, 2, 10, 10**6, 10**12, 0.5))
    else:
        holder[key] = chance.choice(VALUES)


def mutated_json(content: bytes, chance: random.Random) -> bytes:
    """A JSON file with other values, or other bytes."""
    if chance.random() < 0.25:
        return mutated_bytes(content, chance)
    return json.dumps(mutated_value(json.loads(content), chance)).encode()


def mutated_bytes(content: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, cut off, inserted, repeated, or moved."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 4))):
        place = chance.randrange(len(data) + 1)
        length = chance.choice((1, 4, 100))
        what = chance.choice(("flip", "flip", "cut", "insert", "repeat", "remove"))
        if what == "flip" and place < len(data):
            data[place] ^= 1 << chance.randrange(8)
        elif what == "cut":
            del data[place:]
        elif what == "insert":
            data[place:place] = chance.choice((b"\0", b"\xff", b"\xef\xbb\xbf", b"[" * 3000, b"\x1b[2J", b'"', b"\n"))
        elif what == "repeat":
            data[place:place] = data[place : place + length]
        else:
            del data[place : place + length]
    return bytes(data)


def mutated_toml(content: bytes, chance: random.Random) -> bytes:
    """A TOML file with other values, lines left out or doubled, or other bytes."""
    if chance.random() < 0.2:
        return mutated_bytes(content, chance)
    lines = content.decode().splitlines()
    for _ in range(chance.choice((1, 1, 2))):
        number = chance.randrange(len(lines))
        what = chance.choice(("value", "value", "value", "remove", "repeat", "key"))
        if what == "remove":
            lines[number] = ""
        elif what == "repeat":
            lines.insert(number, lines[number])
        elif what == "key":
            lines[number] = re.sub(r"^\w+", lambda found: f'"{found[0]}/../x"', lines[number])
        elif "=" in lines[number]:
            lines[number] = f"{lines[number].partition('=')[0]}= {_toml(chance.choice(VALUES))}"
    return "\n".join(lines).encode("utf-8", "replace")


def _toml(value: Any) -> str:
    if value is None or isinstance(value, dict):
        return "{}"
    if isinstance(value, float):
        return str(value)
    return json.dumps(value).replace("null", "0")


def mutated_safetensors(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header says something else, or with other bytes."""
    if chance.random() < 0.3:
        return mutated_bytes(content, chance)
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(mutated_value(json.loads(content[8 : 8 + length]), chance)).encode()
    said = len(header) if chance.random() < 0.9 else chance.choice((0, 7, len(header) + 1, 2**40, 2**63))
    return said.to_bytes(8, "little") + header + content[8 + length :]


Mutator = Callable[[bytes, random.Random], bytes]
