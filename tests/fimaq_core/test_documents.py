"""Text, JSON and YAML of anyone: one clear error for everything that later code would fail on."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fimaq_core.documents import MOST_BYTES, Strict, parse_json, read_json, read_yaml, validate
from fimaq_core.errors import DataError, FimaqError

JSON = {
    '{"a": 1, "a": 2}': "the key 'a' stands twice",
    "[NaN]": "NaN is not a JSON number",
    "[-Infinity]": "-Infinity is not a JSON number",
    "[1e999]": "a number is not finite",
    "[1" + "0" * 400 + "]": "an integer has more than 64 bits",
    '{"a": [[' + "9" * 5000 + "]]}": "an integer has more than 64 bits",
    f"[{2**63}]": "an integer has more than 64 bits",
    "[" * 100_000: "nested more than 100 deep",
    "[" * 101 + "]" * 101: "nested more than 100 deep",
    '{"a": ' * 101 + "1" + "}" * 101: "nested more than 100 deep",
    r'["\ud800"]': "half a character",
    r'{"\udc00": 1}': "half a character",
    "{broken": "Expecting property name",
    "": "Expecting value",
}


@pytest.mark.parametrize("text", JSON, ids=range(len(JSON)))
def test_json_that_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"\AThe file x is not valid JSON: .*\Z") as caught:
        parse_json(text, "The file x", DataError)
    assert JSON[text] in str(caught.value)
    assert len(str(caught.value)) < 200


def test_json_that_is_read() -> None:
    content: Any = [2**63 - 1, -(2**63), 1e300, 5, "ü", "\U0001f600", True, None, {"a": {"b": []}}]
    assert parse_json(json.dumps(content), "x", DataError) == content
    deep = "[" * 100 + "]" * 100
    assert json.dumps(parse_json(deep, "x", DataError)) == deep
    assert parse_json('{"a": {"b": 1}}', "x", DataError, lambda item: [*item]) == ["a"]


def nested(levels: int) -> str:
    """YAML whose aliases stand for 10 ** levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for level in range(1, levels):
        inside = ", ".join([f"*a{level - 1}"] * 10)
        lines.append(f"a{level}: &a{level} [{inside}]")
    return "\n".join(lines)


YAML = {
    "a: !!timestamp x": "the tag tag:yaml.org,2002:timestamp is not known in line 1, column 4",
    "a: !foo 1": "the tag !foo is not known",
    "a: !!python/object/apply:os.system [x]": "is not known",
    "a: !!set {b}": "is not known",
    "a: !!int ''": "a value does not fit its tag",
    "a: !!bool q": "a value does not fit its tag",
    "a: !!float q": "could not convert",
    "a: &x [*x]": "the alias stands inside its own anchor",
    "a: *x": "undefined alias",
    nested(9): "more than 20,000 values in line 5",
    "a: {"
    + ", ".join(f"k{number}: 1" for number in range(10_001))
    + "}": "more than 20,000 values",
    "a: " + "[" * 5000: "nested more than 100 deep",
    "a: " + "[" * 120 + "]" * 120: "nested more than 100 deep",
    "a: .nan": "not finite",
    "a: -.inf": "not finite",
    "a: 0x" + "f" * 99: "more than 64 bits",
    "a: " + "1" * 5000: "more than 64 bits",
    'a: "\\ud800"': "half a character",
    "a: \0": "special characters are not allowed",
    "? [b]\n: c": "unhashable key",
    "a: 1\na: 2": "the key 'a' stands twice in line 2",
    "yes: 1\ntrue: 2": "the key 'true' stands twice in line 2",
    "1: a\n1.0: b": "the key '1.0' stands twice in line 2",
    "a: 1" + ":1" * 60_000: "more than 64 bits",
    "a: 1" + ":1" * 60_000 + ".5": "more than 64 bits",
    'a: "\\UFFFFFFFF"': "is not YAML: ",
}


@pytest.mark.parametrize("text", YAML, ids=range(len(YAML)))
def test_yaml_that_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=r"\AThe grid .*/a\.yaml is not YAML: .*\.\Z") as caught:
        read_yaml(path, "grid", DataError)
    assert YAML[text] in str(caught.value)


def test_yaml_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "day: 2024-13-45\ntime: 2024-01-02 03:04:05\nsum: =\nx: &x {b: 1}\n"
        "y: {<<: *x, c: 2}\nz: !!str 3\n4: 1e3\n"
    )
    assert read_yaml(path, "grid", DataError) == {
        "day": "2024-13-45",
        "time": "2024-01-02 03:04:05",
        "sum": "=",
        "x": {"b": 1},
        "y": {"b": 1, "c": 2},
        "z": "3",
        4: "1e3",
    }
    path.write_text(nested(4))
    assert len(read_yaml(path, "grid", DataError)["a3"]) == 10


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", MOST_BYTES + 1)  # takes no room on the disk
    (tmp_path / "latin").write_bytes(b"\xe9")
    words = {
        "pipe": "Cannot read {}: it is a pipe or a device instead of a regular file.",
        "large": "Cannot read {}: it has 33,554,433 bytes; at most 33,554,432 are read.",
        "none": "Cannot read {}: No such file or directory.",
        "a\0b": "Cannot read {}: embedded null byte.",
        "latin": "{} is not UTF-8 text: byte 0 (counted from 0) is 0xe9.",
    }
    for name, expected in words.items():
        path = tmp_path / name
        with pytest.raises(DataError) as caught:
            read_json(path, DataError)
        assert str(caught.value) == expected.format(path)
    with pytest.raises(DataError, match=r"Cannot read the grid .*: it has 33"):
        read_yaml(tmp_path / "large", "grid", DataError)
    with pytest.raises(DataError, match="Cannot read the grid /dev/zero: it is a pipe or a device"):
        read_yaml(Path("/dev/zero"), "grid", DataError)


class _Pair(Strict):
    first: int


def test_messages_stay_short() -> None:
    with pytest.raises(FimaqError) as caught:
        validate(_Pair, {"first": "x" * 10**6, **{f"k{n}": 1 for n in range(100)}}, "f", DataError)
    assert len(str(caught.value)) < 2000
    assert str(caught.value).endswith(" There are 81 more.")
