"""Archives of arrays: sizes and kinds are checked before anything is unpacked."""

import io
import resource
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks.common.arrays import read_arrays

MOST = 2**20


def member(shape: tuple[int, ...], kind: str, content: bytes) -> bytes:
    header: Any = {"descr": kind, "fortran_order": False, "shape": shape}
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue() + content


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def test_arrays_are_read_as_written(tmp_path: Path) -> None:
    arrays = {
        "sample": np.array(["a", "ü\U0001f600", ""]),
        "big": np.array(["a"]).astype(">U3"),
        "right": np.array([True, False]),
        "score": np.linspace(0, 1, 7),
        "columns": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
        "none": np.zeros((0, 3), np.float16),
        "scalar": np.array(3),
    }
    np.savez_compressed(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    found = read_arrays(tmp_path / "a.npz", MOST)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert np.array_equal(found[name], array)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """3 MB that stand for 3 GB are refused in a process that has no 3 GB."""
    size = 3 * 2**30
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file,
        file.open("x.npy", "w", force_zip64=True) as entry,
    ):
        entry.write(member((2**24,), "<u1", bytes(2**24)))
    content = bytearray((tmp_path / "a.npz").read_bytes())
    place = content.index(b"PK\x01\x02")
    content[place + 24 : place + 28] = size.to_bytes(4, "little")  # the size in the directory
    (tmp_path / "a.npz").write_bytes(content)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from tasks.common.arrays import read_arrays\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))\n"
        "try: read_arrays(Path(sys.argv[1]), 2**28)\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "unpacks to 3,221,225,472 bytes; at most 268,435,456 are read" in done.stdout


WRONG = {
    "object": ({"x": member((1,), "|O", b"N.")}, "neither numbers nor text"),
    "time": ({"x": member((1,), "<M8[s]", bytes(8))}, "neither numbers nor text"),
    "complex": ({"x": member((1,), "<c8", bytes(8))}, "neither numbers nor text"),
    "records": ({"x": member((1,), "|V4", bytes(4))}, "neither numbers nor text"),
    "empty": ({"x": member((10**12,), "<U0", b"")}, "neither numbers nor text"),
    "huge": ({"x": member((10**15,), "<f8", bytes(8))}, "size that its header says"),
    "vast": ({"x": member((0, 10**30), "<f8", b"")}, r"\w"),
    "negative": ({"x": member((-1, -1), "<f8", bytes(8))}, r"\w"),
    "short": ({"x": member((2,), "<f8", bytes(8))}, "size that its header says"),
    "long": ({"x": member((1,), "<f8", bytes(9))}, "size that its header says"),
    "halves": ({"x": member((1,), "<U1", b"\0\xd8\0\0")}, "no Unicode"),
    "codes": ({"x": member((1,), "<U1", b"\0\0\x11\0")}, "no Unicode"),
    "truths": ({"x": member((2,), "|b1", b"\1\2")}, "neither 0 nor 1"),
    "parentheses": ({"x": b"\x93NUMPY\1\0\x00\x20" + b"(" * 8192}, r"\w"),
    "minus": ({"x": b"\x93NUMPY\1\0\x00\x20" + b"-" * 8192}, r"\w"),
    "version": ({"x": b"\x93NUMPY\3\0" + bytes(100)}, "unknown version"),
    "text": ({"x": b"hello"}, r"\w"),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_content_is_refused(tmp_path: Path, name: str) -> None:
    members, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        read_arrays(archive(tmp_path / "a.npz", **members), MOST)


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", x=member((4,), "<f8", bytes(range(32))))
    whole = path.read_bytes()
    for content in (b"", whole[:40], whole[:-30], b"PK" + bytes(50)):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"\w"):
            read_arrays(path, MOST)
    for compression in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        with zipfile.ZipFile(path, "w", compression) as file:
            file.writestr("x.npy", member((1,), "<f8", bytes(8)))
        with pytest.raises(ValueError, match="a compression that NumPy does not use"):
            read_arrays(path, MOST)
    path.write_bytes(archive(path, x=b"", y=b"").read_bytes().replace(b"y.npy", b"x.npy"))
    with pytest.raises(ValueError, match="two of the same name"):
        read_arrays(path, MOST)
    with pytest.raises(OSError, match="No such file"):
        read_arrays(tmp_path / "none.npz", MOST)


def test_memory_stays_near_the_size_of_the_arrays(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(2**22, np.uint8))
    assert read_arrays(tmp_path / "a.npz", 2**23)["x"].sum() == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KB
