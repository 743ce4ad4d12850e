"""Checkpoints of trainers: entries, wrappers of names, and objects beside the weights."""

import argparse
import collections
import datetime
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fimaq_core.errors import ModelError
from tasks.common.hashing import file_sha256
from tasks.common.models.weights import load_state, read_weights


def read_state(path: Path, entry: str | None = None) -> dict[str, torch.Tensor]:
    return read_weights(path, entry).state


def network() -> nn.Module:
    return nn.Sequential(collections.OrderedDict(first=nn.Linear(3, 4), second=nn.Linear(4, 2)))


def state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator)
        for name, value in network().state_dict().items()
    }


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def extras(folder: Path) -> dict[str, Any]:
    """Objects that trainers keep beside the weights, from a real optimizer, scheduler and NumPy."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    return {
        "epoch": 3,
        "best": np.float64(0.75),
        "count": np.int64(7),
        "history": np.array([1.0, 2.0]),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "args": argparse.Namespace(lr=0.1, output=folder, betas=(0.9, 0.999), seed=np.int32(1)),
        "settings": types.SimpleNamespace(a=[1, {"b": None}]),
        "losses": collections.defaultdict(list, {"train": [0.5]}),
        "counts": collections.defaultdict(int, {"train": 3}),
        "milestones": collections.Counter([30, 60]),
        "types": [int, float, str, bool],
        "last": collections.deque([1, 2], maxlen=5),
        "when": datetime.datetime(2024, 5, 6),
        "rng": {"torch": torch.get_rng_state(), "numpy": np.random.get_state()},
        "tags": {"a", "b"},
    }


# Entries


@pytest.mark.parametrize(
    ("entries", "taken"),
    [
        (("state_dict", "state_dict_ema"), "state_dict_ema"),
        (("state_dict_ema", "state_dict"), "state_dict_ema"),
        (("model", "model_ema"), "model_ema"),
        (("state_dict_ema", "model_ema", "state_dict", "model"), "state_dict_ema"),
        (("model", "state_dict"), "state_dict"),
        (("model", "net"), "model"),
    ],
)
def test_entries_are_chosen_as_timm_chooses_them(
    tmp_path: Path, entries: tuple[str, ...], taken: str
) -> None:
    content = {name: state(seed) for seed, name in enumerate(entries)}
    path = saved({**content, "epoch": 1}, tmp_path / "weights.pth")
    found = read_weights(path)
    assert (found.entry, set(found.entries)) == (taken, set(entries))
    assert equal(found.state, content[taken])
    assert equal(found.state, load_state_dict(str(path)))
    for name in entries:
        assert equal(read_state(path, name), content[name])


@pytest.mark.parametrize(
    "name",
    [
        "model_state_dict",
        "net",
        "ema",
        "params",
        "weights",
        "module",
        "teacher",
        "my_own_name",
        "model.state_dict",
        "ema.module",
        "checkpoint.model.state_dict",
    ],
)
def test_one_entry_of_any_name_is_found(tmp_path: Path, name: str) -> None:
    content: Any = state()
    for part in reversed(name.split(".")):
        content = {part: content, "decay": torch.tensor(0.99), "step": 3}
    found = read_weights(saved({**content, **extras(tmp_path)}, tmp_path / "weights.pth"))
    assert equal(found.state, state())
    assert (found.entry, found.entries) == (name, (name,))


@pytest.mark.parametrize(
    "names",
    [
        ("net", "ema_net"), ("student", "teacher"), ("params", "params_ema"), ("model", "ema"),
        ("net", "ema.module"), ("model", "swa_state"), ("model", "averaged_model"),
        ("state_dict", "callbacks.EMA.ema_state_dict"),
        ("state_dict", "callbacks.EMACallback.weights"),
    ],
)  # fmt: skip
def test_entries_of_no_known_preference_are_asked_for(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    contents: dict[str, Any] = {}
    for seed, name in enumerate(names):
        head, *rest = name.split(".")
        content: Any = state(seed)
        for part in reversed(rest):
            content = {part: content}
        contents[head] = content
    path = saved(contents, tmp_path / "weights.pth")
    with pytest.raises(
        ModelError, match=r"several entries with weights.*--weights-entry"
    ) as caught:
        read_weights(path)
    assert all(repr(name) in str(caught.value) for name in names)
    for seed, name in enumerate(names):
        assert equal(read_state(path, name), state(seed))


def test_entries_that_are_not_there(tmp_path: Path) -> None:
    path = saved({"state_dict": state(), "state_dict_ema": state(1)}, tmp_path / "a.pth")
    with pytest.raises(
        ModelError, match=r"no entry 'state_dikt' \(--weights-entry\). Did you mean 'state_dict'\?"
    ):
        read_weights(path, "state_dikt")
    save_file(state(), tmp_path / "b.safetensors")
    for plain in (saved(state(), tmp_path / "b.pth"), tmp_path / "b.safetensors"):
        assert (read_weights(plain).entry, read_weights(plain).entries) == (None, ())
        with pytest.raises(
            ModelError, match=r"no entry 'model' .*The file is one state dict: leave the option out"
        ):
            read_weights(plain, "model")


def test_tensors_beside_a_state_dict(tmp_path: Path) -> None:
    """Tensors without a dot in their names are no weights; others are the entry '.'."""
    path = saved({"vit": state(), "class_weights": torch.ones(3)}, tmp_path / "a.pth")
    for wanted in (None, "vit"):
        found = read_weights(path, wanted)
        assert equal(found.state, state())
        assert (found.entry, found.entries) == ("vit", ("vit",))
    path = saved({**state(), "vit": state(1)}, tmp_path / "b.pth")
    for wanted, seed in ((None, 0), (".", 0), ("vit", 1)):
        found = read_weights(path, wanted)
        assert equal(found.state, state(seed))
        assert found.entries == (".", "vit")


def test_optimizers_by_name_are_no_entries(tmp_path: Path) -> None:
    kept = {name: {"step": torch.tensor(1.0), "exp_avg": value} for name, value in state(1).items()}
    path = saved({"net": state(), "opt": {"state": kept}}, tmp_path / "a.pth")
    assert read_weights(path).entries == ("net",)


def test_mmengine_keeps_averages_as_the_state_dict(tmp_path: Path) -> None:
    """EMAHook of mmengine swaps both entries before it saves; ``steps`` shows that it did."""
    plain = {f"module.{name}": value for name, value in state(1).items()}
    content = {"state_dict": state(), "ema_state_dict": {"steps": torch.tensor(5), **plain}}
    path = saved(content, tmp_path / "a.pth")
    found = read_weights(path)
    assert equal(found.state, state())
    assert found.entry == "state_dict"
    assert found.entries == (
        "state_dict (averaged: mmengine swaps them)",
        "ema_state_dict (not averaged)",
    )
    assert equal(read_state(path, "ema_state_dict"), state(1))
    saved({**content, "ema_state_dict": plain}, path)
    with pytest.raises(ModelError, match="several entries"):
        read_weights(path)


def test_the_identity_of_weights_is_of_the_entry(tmp_path: Path) -> None:
    """Two entries of one file are two sets of weights; one entry is its file."""
    path = saved({"state_dict": state(), "state_dict_ema": state(1)}, tmp_path / "a.pth")
    found = {}
    for name in ("state_dict", "state_dict_ema"):
        model, stored = network(), read_weights(path, name)
        load_state(model, stored.state, "a.pth")
        found[name] = stored.sha256(model, altered=False)
    assert found["state_dict"] != found["state_dict_ema"]
    alone = read_weights(saved({"state_dict": state()}, tmp_path / "b.pth"))
    assert alone.sha256(network(), altered=False) == file_sha256(tmp_path / "b.pth")


# Objects beside the weights


@pytest.mark.parametrize(
    "ending", [".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".tar", ".weights", ""]
)
@pytest.mark.parametrize("new", [True, False], ids=["zip", "old format"])
def test_what_trainers_keep_beside_the_weights_is_passed_over(
    tmp_path: Path, ending: str, new: bool
) -> None:
    path = tmp_path / f"checkpoint{ending}"
    torch.save(
        {**extras(tmp_path), "state_dict": state()}, path, _use_new_zipfile_serialization=new
    )
    before = set(torch.serialization.get_safe_globals())
    assert equal(read_state(path), state())
    assert set(torch.serialization.get_safe_globals()) == before


def test_objects_beside_the_tensors_of_one_mapping_are_passed_over(tmp_path: Path) -> None:
    content = {
        **state(),
        "epoch": 3,
        "args": argparse.Namespace(lr=1),
        "best": np.float32(1),
        "optimizer": {"state": {}},
    }
    assert equal(read_state(saved(content, tmp_path / "a.pth")), state())


def test_safetensors_are_known_by_their_content(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "a.ckpt")
    assert equal(read_state(tmp_path / "a.ckpt"), state())


def test_lightnings_checkpoints(tmp_path: Path) -> None:
    content = {
        "epoch": 1,
        "pytorch-lightning_version": "2.2.0",
        "state_dict": {f"model.{name}": value for name, value in state().items()},
        "optimizer_states": [
            {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
        ],
        "callbacks": {
            "ModelCheckpoint{'monitor': None}": {
                "best_model_score": torch.tensor(0.5),
                "dirpath": "/x",
            }
        },
        "hyper_parameters": {"lr": 0.1, "folder": tmp_path, "args": argparse.Namespace(a=1)},
        "hparams_name": "kwargs",
    }
    found = read_weights(saved(content, tmp_path / "last.ckpt"))
    assert equal(found.state, state())
    assert found.entries == ("state_dict",)


class Trap:
    """An object that records each change of its state or attributes."""

    touched: ClassVar[list[Any]] = []

    def __setattr__(self, name: str, value: Any) -> None:
        Trap.touched.append(name)

    def __setstate__(self, value: Any) -> None:
        Trap.touched.append(value)


def test_allowed_names_neither_import_nor_run_what_they_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins replace a Namespace, a path and NumPy objects: nothing of them is called."""
    content = {
        "args": argparse.Namespace(a=1),
        "path": tmp_path,
        "best": np.float64(1),
        "state_dict": state(),
    }
    path = saved(content, tmp_path / "a.pth")
    monkeypatch.setattr(argparse, "Namespace", Trap)
    monkeypatch.setattr(np, "dtype", Trap)
    assert equal(read_state(path), state())
    assert Trap.touched == []


class Settings(dict[str, Any]):
    """A dictionary with attributes, as CfgNode and EasyDict are."""

    def __init__(self, *content: Any) -> None:
        super().__init__(*content)
        self.__dict__["frozen"] = True


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("yacs.config", "CfgNode"),
        ("easydict", "EasyDict"),
        ("omegaconf.dictconfig", "DictConfig"),
        ("builtins", "frozenset"),
    ],
)
def test_configurations_beside_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str
) -> None:
    """Stand-ins have the names of classes whose libraries need not be installed."""
    config: Any = frozenset({1})
    if module != "builtins":
        form = type(
            name, (object,) if name == "DictConfig" else (Settings,), {"__module__": module}
        )
        for part in {module.partition(".")[0], module}:
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        monkeypatch.setattr(sys.modules[module], name, form, raising=False)
        config = form()
        config.__dict__["_content"] = {"lr": 0.1}
    path = saved({"model": state(), "config": config}, tmp_path / "a.pth")
    found = read_weights(path)
    assert equal(found.state, state())
    assert found.entries == ("model",)


def test_other_classes_are_named_and_refused(tmp_path: Path) -> None:
    path = saved({"state_dict": state(), "trainer": Trap()}, tmp_path / "a.pth")
    with pytest.raises(
        ModelError, match=rf"hold more than tensors .*{__name__}.Trap.*Convert them to safetensors"
    ):
        read_state(path)
    path = saved({"model": network()}, tmp_path / "b.pth")  # a whole module
    with pytest.raises(
        ModelError, match=r"torch.nn.modules.container.Sequential.*save model.state_dict\(\) alone"
    ):
        read_state(path)
    assert Trap.touched == []


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("protocol", [4, 5])
def test_a_newer_pickle_is_refused_with_the_reason(
    tmp_path: Path, protocol: int, new: bool
) -> None:
    torch.save(
        {"state_dict": state()},
        tmp_path / "a.pth",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=new,
    )
    with pytest.raises(
        ModelError, match=rf"pickle protocol {protocol}, .*default protocol, or as safetensors"
    ):
        read_state(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises(ModelError, match="damaged or no weights file"):
        read_state(tmp_path / "b.pth")


# Names


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.module._orig_mod.",
        "net.",
        "module.model.",
    ],
)
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, prefix: str) -> None:
    content = {f"{prefix}{name}": value for name, value in state().items()}
    assert equal(read_state(saved(content, tmp_path / "a.pth")), state())
    save_file(content, tmp_path / "a.safetensors")
    assert equal(read_state(tmp_path / "a.safetensors"), state())


@pytest.mark.filterwarnings("ignore")
def test_names_of_real_wrappers(tmp_path: Path) -> None:
    model = network()
    model.load_state_dict(state())
    compiled = network()
    compiled.load_state_dict(state())
    compiled.first = torch.compile(compiled.first)  # type: ignore[assignment]
    for wrapped in (nn.DataParallel(model), torch.compile(model), AveragedModel(model), compiled):
        path = saved({"model": wrapped.state_dict()}, tmp_path / "a.pth")
        assert equal(read_state(path), state())


def test_names_that_differ_in_their_prefix_only_are_refused(tmp_path: Path) -> None:
    content = {**state(), **{f"module.{name}": value for name, value in state(1).items()}}
    with pytest.raises(ModelError, match=r"'first.weight' more than once"):
        read_state(saved(content, tmp_path / "a.pth"))


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ({"class_to_idx": {"dog": 1, "cat": 0}}, ("cat", "dog")),
        ({"classes": ["b", "a"]}, ("b", "a")),
        ({"class_names": ("x",)}, ("x",)),
        ({"meta": {"CLASSES": ("p", "q")}}, ("p", "q")),
        ({"class_to_idx": {"dog": 1, "cat": 3}}, ()),
        ({"class_to_idx": {"dog": [1], "cat": [0]}}, ()),
        ({"class_to_idx": {"dog": np.int64(1), "cat": np.int64(0)}}, ()),
        ({"class_names": np.array(["a", "b"])}, ()),
        ({"class_to_idx": {"dog": np.int64(0)}, "classes": ["dog"]}, ("dog",)),
        ({"class_to_idx": {"1": "0", "0": "1"}}, ("1", "0")),
        ({"class_to_idx": {7: 1, 8: 0}}, ("8", "7")),
        ({"idx_to_class": {0: "dog", 1: "cat"}}, ("dog", "cat")),
        ({"idx_to_class": {"1": "0", "0": "1"}}, ("1", "0")),
        ({"idx_to_class": ["dog", "cat"]}, ("dog", "cat")),
        ({"classes": {"dog": 1, "cat": 0}}, ("cat", "dog")),
        ({"class_names": {0: "dog", 1: "cat"}}, ("dog", "cat")),
        ({"classes": []}, None),
        ({"classes": 10}, None),
    ],
)
def test_names_of_classes(
    tmp_path: Path, content: dict[str, Any], names: tuple[str, ...] | None
) -> None:
    assert (
        read_weights(saved({"model": state(), **content}, tmp_path / "a.pth")).class_names == names
    )


# Weights that do not fit


def test_missing_and_surplus_names_come_with_the_nearest_pairs() -> None:
    renamed = {name.replace("second", "secnd"): value for name, value in state().items()}
    wrong = {**renamed, "first.bias": torch.ones(5), "zzz": torch.ones(1)}
    with pytest.raises(ModelError) as caught:
        load_state(network(), wrong, "a.pth")
    lines = str(caught.value).splitlines()
    assert len(lines) <= 10
    assert "Missing names: 2 ('second.weight', 'second.bias')" in lines[0]
    assert "Unexpected names: 3 ('secnd.weight', 'secnd.bias', 'zzz')" in lines[0]
    assert "Shape mismatch: 1 ('first.bias')" in lines[0]
    assert "  similar: the model has 'second.weight', the file 'secnd.weight'" in lines[1:]
    assert "  'first.bias' is (5,) in the file, (4,) in the model" in lines


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda value: value.to(torch.float8_e4m3fn), "as float8_e4m3fn"),
        (lambda value: value.to_sparse(), "in the layout sparse_coo"),
        (lambda value: value.to("meta"), "on the device 'meta', without values"),
    ],
)
def test_tensors_that_cannot_be_copied_are_refused(
    tmp_path: Path, change: Callable[[Tensor], Tensor], said: str
) -> None:
    path = saved({name: change(value) for name, value in state().items()}, tmp_path / "a.pth")
    with pytest.raises(
        ModelError, match=rf"'first.weight' {said}: save it as a dense tensor of float32"
    ):
        read_state(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64])
def test_integers_do_not_fit_floats(dtype: torch.dtype) -> None:
    wrong = {**state(), "first.weight": torch.ones(4, 3, dtype=dtype)}
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(
        ModelError,
        match=rf"Not floating point, as quantized weights are: 1 \('first.weight is {kind}'\)",
    ):
        load_state(network(), wrong, "a.pth")
    half = {name: value.half() for name, value in state().items()}
    load_state(network(), half, "a.pth")


def test_the_message_stays_short_for_large_models() -> None:
    large = nn.ModuleDict({f"block{i}": nn.Linear(2, 2) for i in range(300)})
    other = {name.replace("block", "layers."): value for name, value in large.state_dict().items()}
    with pytest.raises(ModelError, match=r"Missing names: 600 .*Unexpected names: 600 ") as caught:
        load_state(large, other, "a.pth")
    assert len(str(caught.value).splitlines()) <= 10
    assert len(str(caught.value)) < 1000
