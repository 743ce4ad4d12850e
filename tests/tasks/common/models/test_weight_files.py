"""Weight files: nothing in them runs, and weights that do not fit are refused."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fimaq_core.checkpoint import state_sha256
from fimaq_core.errors import FimaqError, ModelError, NumericsError
from tasks.common.hashing import file_sha256
from tasks.common.models.safe_reader import is_torchscript
from tasks.common.models.weights import load_state, read_weights


class Payload:
    """Unpickling it would make a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".pt"])
@pytest.mark.parametrize("writer", ["torch", "torch, old format", "pickle"])
def test_code_in_a_pickle_is_refused_and_never_run(
    tmp_path: Path, suffix: str, writer: str
) -> None:
    trace, path = tmp_path / "it ran", tmp_path / f"weights{suffix}"
    content = {"weight": torch.ones(2), "extra": Payload(trace)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(ModelError, match=r"hold more than tensors \(code.*safetensors") as caught:
        read_weights(path)
    assert str(path) in str(caught.value)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(trace)))  # noqa: S301 - the payload itself works
    assert trace.exists()


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [(".pth", wrap) for wrap in (None, "state_dict", "model", "model_ema", "module.")]
    + [(".safetensors", wrap) for wrap in (None, "module.")],
)
def test_state_dicts_are_read(tmp_path: Path, suffix: str, wrap: str | None) -> None:
    state = {"a.weight": torch.randn(3, 2), "b": torch.arange(3)}
    content: dict[str, Any] = dict(state)
    if wrap == "module.":
        content = {f"module.{name}": value for name, value in state.items()}
    elif wrap is not None:
        content = {wrap: state, "epoch": 3, "arch": "vit"}
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    found = read_weights(path).state
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"", r"it is empty \(download or save it again\)"),
        ("a.pth", b"not a checkpoint", "give a file that ends in .safetensors, .pth"),
        ("a.safetensors", b"", "it is empty"),
        (
            "a.safetensors",
            b"\x10\x00\x00\x00\x00\x00\x00\x00 not json at all",
            "damaged or no weights file",
        ),
        ("a.onnx", b"\x08\x07", r"give a file that ends in .safetensors"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        read_weights(path)
    assert str(path) in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_torchscript_archives_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))
    assert is_torchscript(path)
    with pytest.raises(ModelError, match=r"program.pt are a TorchScript archive.*safetensors"):
        read_weights(path)
    for suffix, writer in ((".pth", torch.save), (".safetensors", save_file)):
        writer({"a": torch.ones(2)}, tmp_path / f"weights{suffix}")
        assert not is_torchscript(tmp_path / f"weights{suffix}")


def test_cut_files(tmp_path: Path) -> None:
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"weights{suffix}"
        (torch.save if suffix == ".pth" else save_file)({"a": torch.randn(500)}, path)
        path.write_bytes(path.read_bytes()[:-300])
        with pytest.raises(ModelError, match="damaged"):
            read_weights(path)


def test_missing_file_and_other_contents(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="There is no weights file"):
        read_weights(tmp_path / "none.pth")
    for content in ([torch.ones(2)], {"a": 3}, torch.ones(2)):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(ModelError, match="hold no state dict"):
            read_weights(tmp_path / "other.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["1.bias"][1] = value
    with pytest.raises(NumericsError, match=r"some.pth have NaN or infinite values in '1.bias'"):
        load_state(model, state, "some.pth")
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_weights_that_do_not_fit_are_refused() -> None:
    model = nn.Linear(3, 2)
    for state in (
        {"weight": torch.ones(2, 3)},
        {"weight": torch.ones(2, 4), "bias": torch.ones(2)},
        {"weight": torch.ones(2, 3), "bias": torch.ones(2), "more": torch.ones(1)},
    ):
        with pytest.raises(
            ModelError, match=r"some.pth do not fit the model: .*(Missing|mismatch|Unexpected)"
        ):
            load_state(model, state, "some.pth")


def test_hashes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    first = file_sha256(path)
    path.write_bytes(b"other")
    assert file_sha256(path) != first
    with pytest.raises(FimaqError, match="Cannot read"):
        file_sha256(tmp_path / "none.bin")
    a, b = nn.Linear(2, 2), nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    assert state_sha256(a) == state_sha256(b)
    with torch.no_grad():
        b.bias[0] += 1e-6
    assert state_sha256(a) != state_sha256(b)
