"""
Damaged files for the fuzz tests: damage to the bytes of any file, and damage that keeps a safetensors file
readable but changes what it says.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random


def how_many(default: int) -> int:
    """Files that a fuzz test damages: STEER_FUZZ where it is set (100,000 take minutes)."""
    return int(os.environ.get("STEER_FUZZ", default))


# JSON values that a reader may stumble over, as text: some are no JSON, some mean what Python cannot hold.
ODD = [
    *("null", "true", "0", "1", "-1", "2", "3", "4", "5", "9999", "10001", "0.5", "-0.0", "1e3", "1.5e308"),
    *("1e999", "-1e999", "NaN", "-Infinity", "Infinity", "9" * 30, "9" * 400, "-" + "9" * 400, "9" * 5000),
    *("9223372036854775807", "18446744073709551615", "18446744073709551616", "00", "0x10", "1_0", ""),
    *('""', '"all"', '"last"', '"-1"', '"0-2"', '"2-0"', '"1,1,0-1"', '" 0 , 2 "', '"-3--1"', '"0-99999999"'),
    *('"' + "0-9998," * 500 + '0"', '"' + "all," * 500 + 'all"', '"\u0663"', '"\u00b2"', '"1\\n"', '"0-"'),
    *('"constant"', '"adaptive"', '"shared"', '"float64"', '"bfloat16"', '"float16"', '"float32"', '"int8"'),
    *('"resid_pre"', '"mlp_out"', '"completion"', '"F32"', '"BF16"', '"F64"', '"U8"', '"F8_E4M3"', '"C64"'),
    *(
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"\\u0000"',
        '"\\u0007"',
        '"a\\nb"',
        '"\\u202e"',
        '"\\u2028"',
        '"é\U0001f600"',
    ),
    *(
        '"../../x"',
        '"' + "x" * 5000 + '"',
        "[]",
        "[0,1,2]",
        "[[0],[1,[2]]]",
        '["0-1","2"]',
        "[true]",
        "[null]",
    ),
    *("{}", '{"a":{"b":[1]}}', '{"a":1,"a":2}', '{"":NaN}', "[1,]", "{a:1}", "'x'", "\\u0030"),
    *("[" * d + "]" * d for d in (40, 150, 300, 900, 5000, 50_000)),
    *('{"a":' * d + "1" + "}" * d for d in (40, 150, 300, 900, 5000)),
]
# Values of the config that are right by themselves, and wrong beside the others.
LIKELY = {
    '"kind"': ['"constant"', '"adaptive"', '"shared"'],
    '"dtype"': ['"float64"', '"float32"', '"bfloat16"', '"float16"'],
    '"layers"': ['"all"', '"last"', '"0"', '"0-1"', "2", "[0,2]", "[0,1,2]", '"-3--1"', '"0,1,2,2"'],
    '"rank"': ["1", "2", "3"],
    '"hidden_size"': ["2", "3", "4", "8"],
    '"num_hidden_layers"': ["2", "3", "4"],
    '"scale"': ["0", "-1", "2.5", "1e-320"],
    '"format_version"': ["1", "2", "3"],
}
NAMES = [
    *("model.layers.0.steering.vector", "model.layers.00.steering.vector", "model.layers.3.steering.vector"),
    *("model.layers.1.steering.mix", "model.layers.1.steering.readout", "model.steering.directions"),
    *(
        "other.layers.1.steering.vector",
        "model.layers.99999.steering.vector",
        "model.layers.-1.steering.vector",
    ),
    *(
        "steering.directions",
        "..0.steering.vector",
        "model.layers.\u0661.steering.vector",
        "lm_head.weight",
        "",
    ),
    *("__metadata__", "a\nb", "a\x00b", "\U0001f600" * 200, "../../etc/passwd", "x" * 5000),
]


def mutations(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` damaged copies of the safetensors file `content`, the same ones for the same `seed`."""
    random = Random(seed)
    for _ in range(count):
        damaged = content
        if random.random() < 0.75:
            parts = _take_apart(content)
            for _ in range(random.choice((1, 1, 1, 2, 3))):
                random.choice(STRUCTURE)(parts, random)
            damaged = _put_together(parts, random)
            if random.random() < 0.85:
                yield damaged
                continue
        for _ in range(random.choice((1, 1, 2, 4))):
            damaged = random.choice(BYTES)(damaged, random)
        yield damaged


# --- damage to bytes: (content, random) -> content


def _flip(data: bytes, random: Random) -> bytes:
    if not data:
        return b"\x01"
    changed = bytearray(data)
    changed[random.randrange(len(data))] ^= 1 << random.randrange(8)
    return bytes(changed)


def _overwrite(data: bytes, random: Random) -> bytes:
    at, new = random.randint(0, len(data)), random.randbytes(random.choice((1, 1, 2, 4, 8)))
    return data[:at] + new + data[at + len(new) :]


def _insert(data: bytes, random: Random) -> bytes:
    at = random.randint(0, len(data))
    return data[:at] + random.choice((b'"', b"{", b"}", b"\0", b",", b"\\", random.randbytes(3))) + data[at:]


def _truncate(data: bytes, random: Random) -> bytes:
    return data[: random.randint(0, len(data))]


def _remove(data: bytes, random: Random) -> bytes:
    at = random.randint(0, len(data))
    return data[:at] + data[at + random.choice((1, 1, 4, 16)) :]


def _repeat(data: bytes, random: Random) -> bytes:
    start, length = random.randint(0, len(data)), random.choice((1, 8, 40, 200))
    return data[: start + length] + data[start:]


def _append(data: bytes, random: Random) -> bytes:
    return data + random.choice((b"\0", b"\0" * 16, data[:100], random.randbytes(5)))


def _length(data: bytes, random: Random) -> bytes:
    """Another length of the header, which the first eight bytes tell."""
    told = int.from_bytes(data[:8].ljust(8, b"\0"), "little")
    new = random.choice(
        (0, 1, 2, told - 1, told + 1, told * 2, len(data), 100_000_001, 1 << 40, (1 << 64) - 1)
    )
    return struct.pack("<Q", max(0, min(new, (1 << 64) - 1))) + data[8:]


def _blank(data: bytes, random: Random) -> bytes:
    at, length = random.randint(0, len(data)), random.choice((1, 4, 32))
    return (
        data[:at] + random.choice((b"\0", b"\xff", b" ")) * len(data[at : at + length]) + data[at + length :]
    )


BYTES: list[Callable[[bytes, Random], bytes]] = [
    *(_flip, _flip, _overwrite, _insert, _truncate, _remove, _repeat, _append, _length, _blank)
]


# --- damage to what the file says: keys and values are JSON text, so that they can be any text at all


@dataclass
class _Parts:
    header: list[tuple[str, str]]
    metadata: list[tuple[str, str]]
    config: list[tuple[str, str]]
    data: bytes


def _pairs(values: dict) -> list[tuple[str, str]]:
    return [(json.dumps(k), json.dumps(v)) for k, v in values.items()]


def _object(pairs: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"


def _take_apart(content: bytes) -> _Parts:
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    metadata = header.pop("__metadata__")
    config = json.loads(metadata.pop("steering_config"))
    return _Parts(_pairs(header), _pairs(metadata), _pairs(config), content[end:])


def _put_together(parts: _Parts, random: Random) -> bytes:
    metadata = [*parts.metadata, ('"steering_config"', json.dumps(_object(parts.config)))]
    header = [('"__metadata__"', _object(metadata)), *parts.header]
    if random.random() < 0.1:
        random.shuffle(header)
    text = _object(header).encode(errors="surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + parts.data


def _config_value(parts: _Parts, random: Random) -> None:
    at = random.randrange(len(parts.config))
    key = parts.config[at][0]
    parts.config[at] = (key, random.choice(random.choice((ODD, LIKELY.get(key, ODD)))))


def _config_key(parts: _Parts, random: Random) -> None:
    at = random.randrange(len(parts.config))
    key, value = parts.config[at]
    change = random.choice(("drop", "twice", "other twice", "rename", "move"))
    if change in ("drop", "move") and len(parts.config) > 1:
        del parts.config[at]
    if change in ("twice", "move"):
        parts.config.insert(random.randint(0, len(parts.config)), (key, value))
    elif change == "other twice":
        escaped = f'"\\u{ord(key[1]):04x}{key[2:]}'  # the same key in other letters
        parts.config.append((random.choice((key, escaped)), random.choice(ODD)))
    elif change == "rename":
        other = random.choice(parts.config)[0]
        parts.config[at] = (random.choice((other, '"alpha"', '""', '"\\ud800"', '"a\\nb"', "1")), value)


def _entry_field(parts: _Parts, random: Random) -> None:
    at = random.randrange(len(parts.header))
    key, value = parts.header[at]
    fields = [(k, v) for k, v in _pairs(_loads(value))] or [('"shape"', "[4]")]
    which = random.randrange(len(fields))
    name, old = fields[which]
    sizes = [str(random.choice((0, 1, 2, 3, 4, 8, 16, 31, 32, 64, -1, 1 << 31, 1 << 62))) for _ in range(3)]
    new = random.choice(
        (
            random.choice(ODD),
            f"[{sizes[0]}]",
            f"[{sizes[0]},{sizes[1]}]",
            f"[{','.join(sizes)}]",
            '"F32"',
            '"BF16"',
            '"I64"',
        )
    )
    change = random.choice(("value", "value", "value", "drop", "twice", "extra"))
    if change == "value":
        fields[which] = (name, new)
    elif change == "drop":
        del fields[which]
    else:
        fields.append((name, old) if change == "twice" else ('"x"', random.choice(ODD)))
    parts.header[at] = (key, _object(fields))


def _loads(value: str) -> dict:
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _offsets(parts: _Parts, random: Random) -> None:
    """Two tensors change places, in part or whole; all else stays."""
    one, two = random.randrange(len(parts.header)), random.randrange(len(parts.header))
    left, right = _loads(parts.header[one][1]), _loads(parts.header[two][1])
    for name in random.choice((["data_offsets"], ["shape"], ["data_offsets", "shape"])):
        left[name], right[name] = right.get(name), left.get(name)
    parts.header[one] = (parts.header[one][0], json.dumps(left))
    if one != two:
        parts.header[two] = (parts.header[two][0], json.dumps(right))


def _entries(parts: _Parts, random: Random) -> None:
    at = random.randrange(len(parts.header))
    key, value = parts.header[at]
    change = random.choice(("drop", "twice", "rename", "rename", "replace", "add", "move"))
    if change in ("drop", "move") and len(parts.header) > 1:
        del parts.header[at]
    if change in ("twice", "move"):
        parts.header.insert(random.randint(0, len(parts.header)), (key, value))
    elif change == "rename":
        name = json.dumps(random.choice(NAMES), ensure_ascii=random.random() < 0.5)
        parts.header[at] = (random.choice((name, random.choice(parts.header)[0], '"\\ud800"')), value)
    elif change == "replace":
        parts.header[at] = (key, random.choice(ODD))
    elif change == "add":  # a further tensor, whole and in its place
        dtype, size = random.choice((("F32", 4), ("F64", 8), ("BF16", 2), ("F16", 2), ("U8", 1)))
        count, start = random.choice((0, 1, 4, 8)), len(parts.data)
        entry = {"dtype": dtype, "shape": [count], "data_offsets": [start, start + size * count]}
        parts.header.append((json.dumps(random.choice(NAMES)), json.dumps(entry)))
        parts.data += b"\0" * (size * count)


def _metadata(parts: _Parts, random: Random) -> None:
    key = random.choice(('"format"', '"steering_config"', '"\\u0073teering_config"', '"x"', '"a\\nb"'))
    parts.metadata.append((key, random.choice(('"pt"', '"{}"', *ODD))))


def _numbers(parts: _Parts, random: Random) -> None:
    """NaN, Inf, the largest and the smallest numbers among the values."""
    words = (
        ("<d", float("nan")),
        ("<d", float("inf")),
        ("<f", float("nan")),
        ("<f", float("-inf")),
        ("<e", float("inf")),
    )
    more = ("<d", 1.7e308), ("<f", 3e38), ("<d", 5e-324), ("<f", 1e-45), ("<e", 65504.0), ("<I", 0x7FC07F80)
    form, value = random.choice(words + more)
    new = struct.pack(form, value)
    at = random.randrange(len(parts.data) // len(new) + 1) * len(new)
    parts.data = (parts.data[:at] + new + parts.data[at + len(new) :])[: len(parts.data)]


STRUCTURE: list[Callable[[_Parts, Random], None]] = [
    *(_config_value, _config_value, _config_value, _config_key, _entry_field, _entry_field, _offsets),
    *(_entries, _entries, _metadata, _numbers, _numbers),
]
