"""Fuzzing of weight files, of arguments of models, and of the headers of own checkpoints.

Each case ends well or with one error for the user, and needs less than a gigabyte. The number of
cases is that of the profile: seconds in the suite, minutes with ``make fuzz``.
"""

import argparse
import contextlib
import io
import json
import resource
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import weight_files as made
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

from fimaq_core.documents import Strict
from fimaq_core.errors import FimaqError
from fimaq_core.progress import silent
from fimaq_core.recipe import make_recipe
from tasks.classification.models import load_model as load_classifier
from tasks.common.cell import stages
from tasks.common.models.timm_models import TimmArguments
from tasks.common.models.weights import load_state, read_weights
from tasks.common.request import CellRequest, DataRequest, ModelRequest
from tasks.detection.configs import DetectorArguments
from tasks.detection.models import load_model as load_detector
from tasks.retrieval.models import ClipArguments, TextArguments, VisionArguments
from tasks.retrieval.models import load_model as load_clip

FEW = max(5, settings.default.max_examples // 20)  # for cases of a tenth of a second
MODELS = settings(max_examples=FEW)
GIGABYTE = 2**30


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Fail a test that takes a gigabyte more than before, or asks for it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    limit = pages * resource.getpagesize() + GIGABYTE
    if before[1] != resource.RLIM_INFINITY:
        limit = min(limit, before[1])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * 1024 < GIGABYTE


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Accept errors for the user: short, printable, and not for lack of memory."""
    try:
        yield
    except FimaqError as error:
        said = str(error)
        assert len(said) < 5000
        assert said.replace("\n", " ").isprintable()
        assert "MemoryError" not in said
        assert "allocate" not in said


# Files


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def saved(content: Any, new: bool) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def seeds() -> list[bytes]:
    state = network().state_dict()
    beside = {"args": argparse.Namespace(lr=0.1), "best": np.float64(1), "classes": ["a", "b"]}
    content = {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3, **beside}
    files = [saved(content, new) for new in (True, False)]
    return [*files, saved(dict(state), True), save(state)]


SEEDS = seeds()


def check(path: Path, content: bytes) -> None:
    """Read a file and load it into a model."""
    path.write_bytes(content)
    with clear_errors():
        stored = read_weights(path)
        assert all(one.numel() <= len(content) for one in stored.state.values())
        stored.notes()
        load_state(network(), stored.state, str(path))


#: Sizes and counts at the borders of types, and small ones.
INTEGERS = st.one_of(
    st.integers(-3, 20),
    st.sampled_from([2**k + d for k in (7, 8, 16, 31, 32, 63, 64) for d in (-1, 0)]),
)
BYTES = st.one_of(
    st.binary(min_size=1, max_size=8),
    INTEGERS.map(lambda value: struct.pack("<Q", value % 2**64)),
    INTEGERS.map(lambda value: struct.pack("<I", value % 2**32)),
    st.sampled_from([b"(" * 50, b"." , b"\x80\x02", b"ctorch\nload\n", b"R", b"b", b"PK\x05\x06"]),
)  # fmt: skip


@given(st.data())
def test_bytes_of_real_files_are_changed(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 6))):
        # The beginning and the end have the headers, directories and pickles.
        near = st.one_of(st.integers(0, 300), st.integers(-300, -1), st.integers(0, 10**6))
        at = data.draw(near) % max(1, len(content))
        part, removed = data.draw(BYTES), data.draw(st.integers(0, 40))
        content[at : at + (len(part) if data.draw(st.booleans()) else removed)] = part
    check(tmp_path / "weights.pth", bytes(content))


NAMES = st.sampled_from([
    ("torch._utils", "_rebuild_tensor"), ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"), ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_parameter_with_state"), ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._utils", "_rebuild_qtensor"), ("torch._utils", "_rebuild_nested_tensor"),
    ("torch._utils", "_rebuild_meta_tensor_no_storage"),
    ("torch._utils", "_rebuild_wrapper_subclass"), ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch", "FloatStorage"), ("torch", "float32"), ("torch", "float8_e4m3fn"), ("torch", "Size"),
    ("torch", "Tensor"), ("torch.nn.parameter", "Parameter"), ("torch", "load"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"), ("collections", "defaultdict"), ("collections", "deque"),
    ("__builtin__", "set"), ("__builtin__", "bytearray"), ("__builtin__", "getattr"),
    ("_codecs", "encode"), ("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"),
    ("argparse", "Namespace"), ("os", "system"),
]).map(lambda pair: made.name(*pair))  # fmt: skip
KEYS = st.sampled_from([
    "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "model",
    "state_dict", "module.0.weight", "optimizer", "classes", "class_to_idx", "meta", "é\x1b",
    "x" * 600,
]).map(made.text)  # fmt: skip
STORAGES = st.builds(
    made.storage,
    st.sampled_from(["0", "1", "2", "../0"]),
    INTEGERS.filter(lambda value: value < 2**63),
    st.sampled_from([*made.WIDTHS, "QInt8Storage", "UntypedStorage", "NoStorage"]),
)
SHAPES = st.lists(INTEGERS, max_size=4).map(tuple)
TENSORS = st.builds(made.tensor, SHAPES, SHAPES, INTEGERS, st.none() | STORAGES)
PLAIN = st.one_of(
    INTEGERS.map(made.number), KEYS, TENSORS, STORAGES, NAMES,
    st.sampled_from([b"N", b"\x88", b"\x89", b"}", b"]", b")", b"G" + struct.pack(">d", 0.5)]),
)  # fmt: skip


def nested(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    def mapped(pairs: list[tuple[bytes, bytes]]) -> bytes:
        return made.mapping(*pairs)

    return st.one_of(
        st.lists(st.tuples(KEYS | inner, inner), max_size=5).map(mapped),
        st.lists(inner, max_size=4).map(lambda parts: made.tuple_of(*parts)),
        st.lists(inner, max_size=4).map(lambda parts: b"](" + b"".join(parts) + b"e"),
        st.builds(
            lambda name, parts: made.called(name, *parts), NAMES, st.lists(inner, max_size=8)
        ),
        st.builds(lambda value, number: value + b"q" + bytes([number]), inner, st.integers(0, 3)),
        st.integers(0, 3).map(lambda number: b"h" + bytes([number])),
        st.builds(lambda value, state: value + state + b"b", inner, inner),
        inner.map(lambda value: value + b"q\x00" + b"h\x00\x86q\x00" * 60),
    )


SINGLE = st.sampled_from([bytes([one]) for one in b"()t\x85\x86\x87RQbsaue.q\x00h\x00\x81"])
INSTRUCTIONS = st.lists(PLAIN | st.binary(min_size=1, max_size=2) | SINGLE, max_size=30).map(
    b"".join
)
PROGRAMS = (st.recursive(PLAIN, nested, max_leaves=12) | INSTRUCTIONS).map(made.pickled)
VALUES = {"0": bytes(16), "1": struct.pack("<4f", 1, float("nan"), 3, 4), "2": bytes(8)}


@given(PROGRAMS, st.sampled_from(["zip", "old format", "plain"]))
def test_pickles_of_any_instructions(tmp_path: Path, program: bytes, form: str) -> None:
    content = {
        "zip": lambda: made.archive(program, VALUES),
        "old format": lambda: made.legacy(program, VALUES),
        "plain": lambda: program,
    }[form]()
    check(tmp_path / "weights.pth", content)


MEMBERS = st.lists(
    st.tuples(
        st.sampled_from([
            "archive/data.pkl", "data.pkl", "archive/data/0", "archive/data/1", "x/data.pkl",
            "archive/byteorder", "archive/constants.pkl", "archive/", "../data.pkl",
        ]),
        PROGRAMS | st.binary(max_size=20) | st.sampled_from([b"little", b"big"])
        | st.just(10**6).map(bytes),
        st.sampled_from([zipfile.ZIP_STORED] * 4 + [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]),
    ),
    max_size=5,
)  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@given(MEMBERS, PROGRAMS, BYTES, st.integers(-400, -1))
def test_archives_of_any_members(
    tmp_path: Path, members: list[tuple[str, bytes, int]], program: bytes, part: bytes, at: int
) -> None:
    file = io.BytesIO(made.archive(program, VALUES))
    with zipfile.ZipFile(file, "a") as writer:
        for name, content, packed in members:
            writer.writestr(name, content, packed)
    content = file.getvalue()
    check(tmp_path / "a.pth", content)
    check(tmp_path / "b.pth", content[:at] + part + content[at + len(part) :])


TEXTS = st.text(max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats() | st.text(max_size=5),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E8M0", "F4", "I64", "U8",
                              "BOOL", "C64", "X"]),
    "shape": st.sampled_from([[4], [2, 2], [8], [2], [0], []]) | st.lists(INTEGERS, max_size=3),
    "data_offsets": st.sampled_from([[0, 16], [0, 0], [0, 8], [0, 32], [8, 16], [16, 32], [16, 0]]),
})  # fmt: skip
HEADERS = st.dictionaries(
    st.sampled_from(["0.weight", "0.bias", "a", "module.a", "x" * 600, "\x1b"])
    | st.text(max_size=5),
    st.one_of(*[ENTRIES] * 9, JSON),
    max_size=4,
)


@given(HEADERS, st.none() | st.dictionaries(TEXTS, TEXTS, max_size=2) | JSON, INTEGERS)
def test_headers_of_safetensors(
    tmp_path: Path, header: dict[str, Any], metadata: Any, added: int
) -> None:
    if metadata is not None:
        header = {**header, "__metadata__": metadata}
    content = made.safetensors(json.dumps(header).encode(), bytes(32))
    check(tmp_path / "a.safetensors", content)
    (length,) = struct.unpack("<Q", content[:8])
    check(tmp_path / "b.safetensors", struct.pack("<Q", (length + added) % 2**64) + content[8:])


# Arguments of models


NUMBERS = st.one_of(
    st.integers(1, 8), st.sampled_from([16, 64, 200, 1024, 8192, 2**17, 2**20]), INTEGERS
)
WORDS = st.sampled_from(["avg", "token", "learn", "gelu", "", "hf-hub:a/b", "os.system", "../x"])
#: Values by the type of an argument; other values come for each type too.
FITTING = {bool: st.booleans(), int: NUMBERS, float: st.floats(0, 1)}
LISTS = NUMBERS | st.lists(NUMBERS, min_size=1, max_size=4)
MORE = ("pretrained", "pretrained_cfg", "cache_dir", "init_cfg", "hf_tokenizer_name", "device")


def arguments(model: type[Strict], **inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Arguments with known names, and values that fit in most cases."""
    values = {
        name: FITTING.get(field.annotation, LISTS | WORDS)
        for name, field in model.model_fields.items()
        if name not in inner
    }
    pair = st.one_of(*(st.tuples(st.just(name), value) for name, value in values.items()))
    odd = st.tuples(st.sampled_from([*values, *MORE]), JSON | WORDS)
    pairs = st.lists(st.one_of(*[pair] * 9, odd), max_size=4).map(dict)
    parts = st.tuples(pairs, st.fixed_dictionaries({}, optional=inner))
    return parts.map(lambda both: both[0] | both[1])


CLIP = arguments(
    ClipArguments, vision_cfg=arguments(VisionArguments), text_cfg=arguments(TextArguments)
)
CASES = st.one_of(
    st.tuples(
        st.just(load_classifier),
        st.sampled_from(["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]),
        arguments(TimmArguments),
    ),
    st.tuples(st.just(load_clip), st.sampled_from(["ViT-B-32-quickgelu", "laion_vit_b32"]), CLIP),
    st.tuples(st.just(load_detector), st.just("mask_rcnn_swin_tiny"), arguments(DetectorArguments)),
)


@MODELS
@given(CASES)
def test_arguments_of_models(tmp_path: Path, case: tuple[Any, str, dict[str, Any]]) -> None:
    load, name, given_arguments = case
    path = tmp_path / "weights.safetensors"
    path.write_bytes(save(network().state_dict()))
    with clear_errors():
        load(ModelRequest(name, given_arguments, weights=path, from_file=True))
        raise AssertionError("weights of another model were loaded")


# Headers of own checkpoints


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("calibrated") / "calibrated.safetensors"
    quick = {"calibration_images": 8, "range_images": 4, "range_candidates": 16, "range_rounds": 1}
    request = CellRequest(
        "classification", ModelRequest("demo_vit"), DataRequest(limit=8), make_recipe("rtn", quick)
    )
    stages.calibrate_stage(request, path, silent)
    return path.read_bytes()


FACTS = st.fixed_dictionaries(
    {},
    optional={
        "task": st.sampled_from(["classification", "retrieval", "x"]) | JSON,
        "model": st.sampled_from(
            ["demo_vit", "demo_swin", "vit_small", "vit_tiny_patch16_224", "hf-hub:a/b", "../x"]
        )
        | JSON,
        "model_args": arguments(TimmArguments) | JSON,
        "stage": st.sampled_from(["mlp", "calibrated", "reconstructed"]) | JSON,
        "weights_entry": JSON,
        "preprocessing": st.dictionaries(
            st.sampled_from(["input_size", "mean", "std", "crop_pct", "interpolation"]), JSON
        ),
        "surprise": JSON,
    },
)
FIELDS = st.sampled_from(["weights", "calibration", "numerics", "model", "recipe"])
RECIPES = st.dictionaries(
    st.sampled_from(["w_bits", "a_bits", "scope", "method", "steps", "seed", "run"]), JSON
)


@MODELS
@given(FACTS, st.dictionaries(FIELDS, JSON, max_size=2), RECIPES)
def test_headers_of_checkpoints(
    tmp_path: Path,
    calibrated: bytes,
    facts: dict[str, Any],
    fingerprint: dict[str, Any],
    recipe: dict[str, Any],
) -> None:
    (length,) = struct.unpack("<Q", calibrated[:8])
    header = json.loads(calibrated[8 : 8 + length])
    # Without a sha256 the checkpoint is one of an older version, whose header can be edited.
    texts = header["__metadata__"]
    held = {name: json.loads(texts[name]) for name in ("facts", "fingerprint")}
    held["facts"] |= facts
    held["fingerprint"]["recipe"] |= recipe
    held["fingerprint"] |= fingerprint
    header["__metadata__"] = {name: json.dumps(value) for name, value in held.items()}
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(made.safetensors(json.dumps(header).encode(), calibrated[8 + length :]))
    request = CellRequest("classification", ModelRequest(), DataRequest(limit=8), None)
    with clear_errors():
        stages.inspect_stage(request, path)
