"""Weight files that were made to hurt: one clear line for each, and no work or memory for it."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import weight_files as made
from torch import Tensor, nn

from fimaq_core.errors import DataError, FimaqError, ModelError, NumericsError
from tasks.common.hashing import file_sha256
from tasks.common.models import pickles
from tasks.common.models.building import build_bounded, check_resizable
from tasks.common.models.weights import load_state, read_weights

A = made.text("a.weight")
DEEP = b"]" * 50_000 + b"a" * 49_999
#: Instructions for a tuple of two equal tuples of two equal tuples ...: 2^60 values, 300 bytes.
DOUBLED = b"(K\x01K\x02t" + b"".join(b"q\x01h\x01\x86" for _ in range(60))


def refused(path: Path, content: bytes | None = None) -> str:
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FimaqError) as caught:
        read_weights(path)
    said = str(caught.value)
    assert str(path) in said
    assert said.isprintable()
    assert len(said) < 1000
    return said


# Other files


def saved() -> bytes:
    file = io.BytesIO()
    torch.save({"a.weight": torch.ones(4)}, file)
    return file.getvalue()


def packed_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as writer:
        entry = tarfile.TarInfo("weights.pth")
        entry.size = len(saved())
        writer.addfile(entry, io.BytesIO(saved()))
    return file.getvalue()


def numpy_file(write: Callable[..., None]) -> bytes:
    file = io.BytesIO()
    write(file, np.ones(3))
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html><body>Not found", "an HTML or XML page (the download failed"),
        (b"\xef\xbb\xbf\n  <html>", "an HTML or XML page (the download failed"),
        (b'{"error": "Repository not found"}', "JSON text (the download failed"),
        (b'[{"error":{"code": 404}}]', "JSON text (the download failed"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "a pointer of Git LFS (run `git lfs pull`",
        ),
        (gzip.compress(saved()), "packed with gzip (unpack it"),
        (lzma.compress(saved()), "packed with xz (unpack it"),
        (bz2.compress(saved()), "packed with bzip2 (unpack it"),
        (packed_tar(), "a tar archive (unpack it"),
        (numpy_file(np.save), "a NumPy array (convert it"),
        (numpy_file(np.savez), "a zip archive without data.pkl"),
        (b"", "it is empty"),
        (b"hello", "give a file that ends in .safetensors"),
        (saved()[:200], "not a zip file"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_other_files_are_called_by_their_kind(
    tmp_path: Path, content: bytes, message: str, suffix: str
) -> None:
    assert message in refused(tmp_path / f"weights{suffix}", content)


def test_folders_pipes_and_missing_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "folder.pth").mkdir()
    (tmp_path / "link.pth").symlink_to(tmp_path / "link.pth")
    for name, message in (
        ("pipe.pth", "are no regular file"),
        ("folder.pth", "are a folder"),
        ("link.pth", "Cannot read the weights"),
        ("none.pth", "There is no weights file"),
        ("x" * 300, "Cannot read the weights"),
    ):
        assert message in refused(tmp_path / name)
        with pytest.raises(DataError, match="Cannot read"):
            file_sha256(tmp_path / name)


# Pickles

PICKLES: dict[str, tuple[bytes, str]] = {
    "nothing on the stack": (b"0", "instruction POP"),
    "a tuple of nothing": (b"\x86", "takes more values than it has"),
    "a mark that is not there": (b"t", ""),
    "memo that is not there": (b"h\x07", "does not make sense (KeyError)"),
    "a text without end": (b"X\xff\xff\xff\xffabc", ""),
    "a text that is not UTF-8": (b"X\x02\x00\x00\x00\xff\xfe", ""),
    "a long number": (b"\x8b\xff\xff\xff\x7f", ""),
    "an unknown byte": (b"\xff", ""),
    "bytes of a given size": (b"\x8e" + struct.pack("<Q", 2**40), ""),
    "an array of bytes of a given size": (b"\x96" + struct.pack("<Q", 2**40), ""),
    "an extension": (b"\x82\x01", "instruction EXT1"),
    "an old instance": (b"(ios\nsystem\n", "instruction INST"),
    "a name that is no name": (b"c\xff\xff\n\n", ""),
    "a call of a number": (b"K\x01)R", "hold more than tensors"),
    "a call of an object": (
        made.called(made.name("builtins", "getattr"), b"N", b"N") + b")R",
        "hold more than tensors",
    ),
    "attributes of a number": (b"K\x01}b", "sets attributes of a plain value"),
    "items of a number": (b"K\x01K\x01a", "appends to what is no list"),
    "keys of a number": (b"K\x01K\x01K\x01s", "puts a key into what is no dictionary"),
    "a key twice": (made.mapping((A, b"K\x01"), (A, b"K\x02")), "has the key 'a.weight' twice"),
    "a storage of another kind": (made.tuple_of(*[b"K\x01"] * 5) + b"Q", "without class or key"),
    "a storage that is not there": (
        made.tensor(of=made.storage("7")),
        "its storage '7' is missing",
    ),
    "a storage of another size": (made.tensor(of=made.storage(count=3)), "has 16 bytes for 3"),
    "a storage of negative size": (made.tensor(of=made.storage(count=-4)), "no number of values"),
    "a storage outside": (made.tensor(of=made.storage("../../data.pkl")), "is missing"),
    "a tensor of a number": (made.tensor(of=b"K\x01"), ""),
    "a tensor behind its storage": (made.tensor(offset=2), "out of bounds"),
    "a tensor with a long step": (made.tensor(stride=(2**40,)), ""),
    "a negative size": (made.tensor(size=(-4,)), "impossible shape"),
    "an endless size": (made.tensor(size=(2**2000,)), ""),
    "too many dimensions": (made.tensor((1,) * 20, (1,) * 20), "impossible shape"),
    "another protocol": (b"\x80\x04N", "protocol 4"),
    "code": (made.called(made.name("os", "mkdir"), made.text("x")), "os.mkdir"),
    "letters for a terminal": (made.name("a\x1b[2J", "b"), "hold more than tensors"),
    "a name of torch": (made.called(made.name("torch", "load"), made.text("x")), "torch.load"),
    "a nested name": (made.name("torch", "serialization.load"), "torch.serialization.load"),
}


@pytest.mark.parametrize("case", PICKLES)
@pytest.mark.parametrize("form", [made.archive, lambda content: made.legacy(content, {})])
def test_malformed_pickles(tmp_path: Path, case: str, form: Callable[[bytes], bytes]) -> None:
    content, message = PICKLES[case]
    said = refused(tmp_path / "weights.pth", form(made.pickled(content)))
    if form is made.archive:
        assert message in said


BULKY: dict[str, bytes] = {
    "bytes": made.called(made.name("builtins", "bytearray"), made.number(2**40)),
    "a tensor": made.called(made.name("torch", "Tensor"), made.number(2**40)),
    "a long encoding": made.called(
        made.name("_codecs", "encode"), made.text("é" * 100_000), made.text("punycode")
    ),
    "lists in lists": DEEP,
    "tuples of equal tuples": DOUBLED,
    "a key that takes years": b"}" + DOUBLED + b"K\x01s",
    "keys of one hash": made.mapping(
        *((made.number(count * (2**61 - 1)), b"N") for count in range(1, 50_000))
    ),
    "a key without hash": b"}]K\x01s",
    "a text": made.text("x" * 1_000_000),
}


@pytest.mark.parametrize("case", BULKY)
def test_objects_that_would_be_large_are_not_made(tmp_path: Path, case: str) -> None:
    content = made.mapping((A, made.tensor()), (made.text("extra"), BULKY[case]))
    path = tmp_path / "weights.pth"
    path.write_bytes(made.archive(made.pickled(content)))
    assert read_weights(path).state["a.weight"].tolist() == [1, 2, 3, 4]


def test_one_dictionary_at_many_places(tmp_path: Path) -> None:
    """A small file names 400^4 state dicts."""
    many = b"".join(
        b"}(" + b"".join(made.text(f"k{i}") + b"h" + bytes([level]) for i in range(400)) + b"u"
        b"q" + bytes([level + 1])
        for level in range(4)
    )
    content = made.mapping((A, made.tensor())) + b"q\x00" + many
    assert "more than 1000 entries" in refused(
        tmp_path / "weights.pth", made.archive(made.pickled(content))
    )


def test_one_list_that_becomes_many_dictionaries(tmp_path: Path) -> None:
    """A small file names 10^8 copied values."""
    pairs = [made.tuple_of(made.text(f"k{i}"), b"N") for i in range(10_000)]
    listed = b"](" + b"".join(pairs) + b"eq\x00"
    copies = b"](" + (made.name("collections", "OrderedDict") + b"(h\x00tR") * 10_000 + b"e"
    content = made.mapping((made.text("one"), listed), (made.text("many"), copies))
    content = made.archive(made.pickled(content))
    assert "copies too many values" in refused(tmp_path / "weights.pth", content)


def test_more_instructions_than_any_checkpoint_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickles, "MOST_INSTRUCTIONS", 1000)
    content = made.archive(made.pickled(b"(" * 1001))
    assert "more than 1000 instructions" in refused(tmp_path / "weights.pth", content)


def test_names_for_people(tmp_path: Path) -> None:
    for name, message in (("x" * 5000, "of 5000 letters"), ("a\x1b[2J.\u202eb", "more than once")):
        content = made.mapping(
            (made.text(name), made.tensor()), (made.text(f"module.{name}"), made.tensor())
        )
        path = tmp_path / "weights.pth"
        assert message in refused(path, made.archive(made.pickled(content)))


# Archives


def test_archives_that_unpack_to_more_than_they_are(tmp_path: Path) -> None:
    path, content = tmp_path / "weights.pth", made.pickled(made.mapping((A, made.tensor())))
    bomb = made.archive(content, {"0": bytes(10**8)}, packed=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 200_000
    assert "members are packed" in refused(path, bomb)
    larger = bytearray(made.archive(content))
    at = larger.index(b"PK\x01\x02")
    larger[at + 20 : at + 24] = struct.pack("<I", 2**31)  # as if 2 GB were packed into a few bytes
    assert "members are packed" in refused(path, bytes(larger))
    assert "big-endian" in refused(path, made.archive(content, byteorder=b"big"))
    twice = io.BytesIO(made.archive(content))
    with zipfile.ZipFile(twice, "a") as writer, pytest.warns(UserWarning, match="Duplicate"):
        writer.writestr("archive/data/0", b"other")
    assert "two members of the archive have one name" in refused(path, twice.getvalue())
    flipped = bytearray(made.archive(content))
    flipped[flipped.index(struct.pack("<4f", 1, 2, 3, 4))] ^= 1
    assert "CRC" in refused(path, bytes(flipped))
    long = made.archive(content)
    at = long.rindex(b"PK\x05\x06")
    long = long[: at + 12] + struct.pack("<I", 2**30) + long[at + 16 :]
    assert "directory has 1073741824 bytes" in refused(path, long)
    at, real = len(long) - 22, made.archive(content)
    for zeros in (0, 22):  # the end that counts is the last one, or one before a comment
        end = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 5, 5, 2**32 - 2, 0, zeros)
        assert "directory has" in refused(path, real[:at] + end + bytes(zeros))


def test_files_of_the_old_format(tmp_path: Path) -> None:
    path, content = tmp_path / "weights.pth", made.pickled(made.mapping((A, made.tensor())))
    values = struct.pack("<4f", 1, 2, 3, 4)
    path.write_bytes(made.legacy(content, {"0": values}))
    assert read_weights(path).state["a.weight"].tolist() == [1, 2, 3, 4]
    assert "cut off" in refused(path, made.legacy(content, {"0": values[:12]}))
    assert "cut off" in refused(path, made.legacy(content, {"0": values})[:-2])
    assert "lacks the values" in refused(path, made.legacy(content, {}))
    large = made.pickled(made.mapping((A, made.tensor(of=made.storage(count=2**40)))))
    assert "its tensors need more" in refused(path, made.legacy(large, {"0": values}))


# Safetensors


def header(**tensors: object) -> bytes:
    return json.dumps(tensors).encode()


def test_headers_of_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    path.write_bytes(made.safetensors(header(**{"a.weight": entry}), bytes(16)))
    assert read_weights(path).state["a.weight"].shape == (4,)
    for change in (
        {"shape": [2**40]},
        {"shape": [-4]},
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [16, 0]},
        {"dtype": "F1"},
        {"dtype": ["F32"]},
        {"shape": [2**63, 2**63]},
    ):
        content = made.safetensors(header(**{"a.weight": {**entry, **change}}), bytes(16))
        assert "damaged or no weights file" in refused(path, content)
    twice = header(**{"a.weight": entry})[:-1] + b"," + header(**{"a.weight": entry})[1:]
    assert "'a.weight' stands twice" in refused(path, made.safetensors(twice, bytes(16)))
    four = {"dtype": "F4", "shape": [32], "data_offsets": [0, 16]}
    said = refused(path, made.safetensors(header(**{"a.weight": four}), bytes(16)))
    assert "'a.weight' as " in said
    long = made.safetensors(header(x="y" * 2**22) + b" " * 100)
    assert "its header has" in refused(path, long)


# Tensors


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: one[:1, :1].expand(2**20, 2**10), "as 1073741824 values of which only"),
        (lambda one: one.to_sparse_csr(), "in the layout sparse_csr"),
        (lambda one: torch.quantize_per_tensor(one, 0.1, 0, torch.qint8), "as a quantized tensor"),
        (
            lambda one: torch.quantize_per_channel(
                one, torch.ones(2), torch.zeros(2), 0, torch.quint8
            ),
            "as a quantized tensor",
        ),
        (lambda one: torch.nested.nested_tensor([one, one]), "as a nested tensor"),
        (lambda one: one.to(torch.float8_e5m2), "as float8_e5m2"),
        (lambda one: one.to(torch.uint16), "as uint16"),
        (lambda one: torch.ones(2, 2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2), "as float4"),
        (lambda one: torch.complex(one, one).conj().imag, "with values that are stored negated"),
        (lambda one: torch.complex(one, one).conj(), "with values that are stored negated"),
    ],
)
@pytest.mark.parametrize("new", [True, False], ids=["zip", "old format"])
def test_tensors_that_are_no_dense_floats(
    tmp_path: Path, change: Callable[[Tensor], Tensor], said: str, new: bool
) -> None:
    path = tmp_path / "weights.pth"
    content = {"a.weight": change(torch.ones(2, 2)), "a.bias": torch.ones(2)}
    torch.save({"state_dict": content}, path, _use_new_zipfile_serialization=new)
    assert path.stat().st_size < 10_000
    assert f"'a.weight' {said}" in refused(path)


@pytest.mark.parametrize(
    "kind", [name for name, value in vars(torch).items() if isinstance(value, torch.dtype)]
)
def test_every_type_that_a_pickle_can_name(tmp_path: Path, kind: str) -> None:
    """Types of 4 bits, of 8 bits and quantized ones are refused; the others fit or do not."""
    untyped = made.storage(count=16, kind="UntypedStorage")
    shape = (made.tuple_of(made.number(2)), made.tuple_of(made.number(1)))
    function = made.name("torch._utils", "_rebuild_tensor_v3")
    dtype = made.name("torch", kind)
    weight = made.called(function, untyped, b"K\x00", *shape, b"\x89", b"N", dtype)
    path = tmp_path / "weights.pth"
    path.write_bytes(made.archive(made.pickled(made.mapping((A, weight)))))
    with contextlib.suppress(FimaqError):
        stored = read_weights(path)
        assert stored.state["a.weight"].shape == (2,)
        load_state(nn.ModuleDict({"a": nn.BatchNorm1d(2)}), stored.state, "a.pth")


def test_views_and_shared_values_are_read(tmp_path: Path) -> None:
    """A transposed tensor, a slice, tied weights, an empty tensor, and a parameter."""
    base = torch.arange(12.0).reshape(3, 4)
    content = {
        "a.t": base.t(), "a.slice": base[1:, 2], "a.tied": base, "a.one": torch.tensor(3.0),
        "a.none": torch.empty(0, 3), "a.own": nn.Parameter(base + 1),
    }  # fmt: skip
    for new in (True, False):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
        found = read_weights(tmp_path / "a.pth").state
        assert all(torch.equal(found[name], value) for name, value in content.items())


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("index", torch.arange(4, dtype=torch.int32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.num_batches_tracked": torch.tensor(1.5)}, "integers: 1 .*tracked is float32"),
        ({"norm.num_batches_tracked": torch.tensor(2 + 1j)}, "tracked is complex64"),
        ({"index": torch.tensor([0, 1, 2, 2**40])}, "integers: 1 .*index is int64"),
        ({"norm.weight": torch.ones(2, dtype=torch.complex64)}, "weight is complex64"),
        ({"norm.weight": torch.ones(2, dtype=torch.int32)}, "weight is int32"),
        ({"norm.weight": torch.ones(2, dtype=torch.bool)}, "weight is bool"),
    ],
)
def test_values_that_another_type_would_change(change: dict[str, Tensor], message: str) -> None:
    model = Buffers()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        load_state(model, {**kept, **change}, "a.pth")
    small = kept["norm.num_batches_tracked"].to(torch.int16) + 3
    load_state(model, {**kept, "norm.num_batches_tracked": small}, "a.pth")
    assert model.norm.num_batches_tracked == 3
    large = {**kept, "norm.bias": torch.tensor([1e300, 0], dtype=torch.float64)}
    with pytest.raises(NumericsError, match=r"too large for float32 in 'norm.bias'"):
        load_state(model, large, "a.pth")


def test_other_floats_are_converted_visibly(tmp_path: Path) -> None:
    content = {"a.w": torch.ones(2).half(), "a.b": torch.ones(2).double(), "a.c": torch.ones(2)}
    torch.save(content, tmp_path / "a.pth")
    (note,) = read_weights(tmp_path / "a.pth").notes()
    assert note == "weights: converted to float32, stored 1 as float16, 1 as float64"
    torch.save({"a.c": torch.ones(2)}, tmp_path / "b.pth")
    assert read_weights(tmp_path / "b.pth").notes() == []


def test_a_key_twice_is_named_with_both_prefixes(tmp_path: Path) -> None:
    for first, second in (("module.a", "a"), ("model.a", "module.model.a"), ("_orig_mod.a", "a")):
        for same in (True, False):
            torch.save({first: torch.ones(2), second: torch.ones(2) * same}, tmp_path / "a.pth")
            said = refused(tmp_path / "a.pth")
            assert f"have 'a' more than once, as '{first}' and as '{second}'" in said


# Models


def test_models_larger_than_their_file_are_not_built(tmp_path: Path) -> None:
    """10^12 values: the model is only sketched. Smaller ones are built with their values."""
    path, devices = tmp_path / "a.pth", []
    path.write_bytes(b"0" * 100)

    def build(width: int) -> nn.Module:
        def on(device: str) -> nn.Module:
            devices.append(device)
            return nn.Sequential(nn.Linear(width, width), nn.Linear(width, 10**6))

        return build_bounded(on, path)

    with pytest.raises(ModelError, match=r"would have 2[\d,]+ values.* have 100 bytes"):
        build(10**6)
    assert devices == ["meta"]
    model = build(2)
    assert {one.device.type for one in model.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("pos_embed", (1, 5, 10**4)),
        ("visual.trunk.pos_embed", (1, 5, 10**4)),
        ("patch_embed.proj.weight", (1, 1, 1000, 1000)),
        ("pos_embed", (1, 20_000, 8)),
    ],
)
def test_tensors_that_timm_would_resize_to_any_size(name: str, shape: tuple[int, ...]) -> None:
    model = nn.Module()
    model.pos_embed = nn.Parameter(torch.zeros(1, 17, 8))
    model.patch_embed = nn.Module()
    model.patch_embed.proj = nn.Conv2d(3, 8, 4)
    check_resizable({"pos_embed": torch.zeros(1, 50, 8)}, model)
    check_resizable({"patch_embed.proj.weight": torch.zeros(8, 3, 6, 6)}, model)
    with pytest.raises(ModelError, match="cannot be resized"):
        check_resizable({name: torch.zeros(shape)}, model)
