"""Builders of weight files byte by byte: pickles, archives and headers that no library writes."""

import io
import pickle
import struct
import zipfile
from collections.abc import Mapping

#: Sizes in bytes of the values of the storages that the tests use.
WIDTHS = {"FloatStorage": 4, "LongStorage": 8, "DoubleStorage": 8, "ByteStorage": 1}


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def name(module: str, part: str) -> bytes:
    return f"c{module}\n{part}\n".encode()


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + tuple_of(*arguments) + b"R"


def storage(key: str = "0", count: int = 4, kind: str = "FloatStorage") -> bytes:
    """A persistent id as torch.save writes it."""
    return (
        tuple_of(text("storage"), name("torch", kind), text(key), text("cpu"), number(count)) + b"Q"
    )


def tensor(
    size: tuple[int, ...] = (4,),
    stride: tuple[int, ...] = (1,),
    offset: int = 0,
    of: bytes | None = None,
) -> bytes:
    shape = (tuple_of(*map(number, part)) for part in (size, stride))
    hooks = called(name("collections", "OrderedDict"))
    function = name("torch._utils", "_rebuild_tensor_v2")
    return called(function, storage() if of is None else of, number(offset), *shape, b"\x89", hooks)


def mapping(*pairs: tuple[bytes, bytes]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


def pickled(content: bytes) -> bytes:
    return b"\x80\x02" + content + b"."


def archive(
    content: bytes,
    storages: Mapping[str, bytes] | None = None,
    packed: int = zipfile.ZIP_STORED,
    byteorder: bytes = b"little",
) -> bytes:
    """A zip file as torch.save writes it; ``content`` is the whole of data.pkl."""
    held = {"0": struct.pack("<4f", 1, 2, 3, 4)} if storages is None else storages
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", packed) as writer:
        writer.writestr("archive/data.pkl", content)
        writer.writestr("archive/byteorder", byteorder)
        for key, values in held.items():
            writer.writestr(f"archive/data/{key}", values)
    return file.getvalue()


def legacy(content: bytes, storages: Mapping[str, bytes], width: int = 4) -> bytes:
    """A file of torch.save before PyTorch 1.6."""
    start = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    keys = pickle.dumps(list(storages), protocol=2)
    values = (struct.pack("<q", len(one) // width) + one for one in storages.values())
    return b"".join((*(pickle.dumps(one, protocol=2) for one in start), content, keys, *values))


def safetensors(header: bytes, values: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + values
