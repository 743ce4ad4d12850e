"""Checkpoints with changed bits, foreign content or values that no run gives; unreadable files."""

import json
import logging
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import chain_of, images, quick, vit
from staged import run_stage
from torch import Tensor

from fimaq_core.chain import BlockChain
from fimaq_core.checkpoint import Fingerprint, Pieces, load_checkpoint, read_header, save_checkpoint
from fimaq_core.errors import CheckpointError
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.pipeline import CALIBRATE, RECONSTRUCT, load_mlps
from fimaq_core.recipe import Recipe
from fimaq_core.store import Part

KL = ClassifierDivergence(20.0)
#: One recipe of each kind of quantizer; `repq` has ranges that need not hold zero.
RECIPES = {
    "rtn": quick("rtn"),
    "repq": quick("repq"),
    "adalog": quick("adalog"),
    "ptq4vit": quick("ptq4vit"),
}


def mark_of(recipe: Recipe) -> Fingerprint:
    return Fingerprint(weights="w" * 64, calibration="c" * 64, recipe=recipe)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Bytes of a calibrated checkpoint of each recipe."""
    found = {}
    for name, recipe in RECIPES.items():
        path = tmp_path_factory.mktemp(name) / "ranges.safetensors"
        run_stage(
            CALIBRATE, Part(chain_of(vit(), recipe), images(8), recipe, KL, mark_of(recipe)), path
        )
        found[name] = path.read_bytes()
    return found


@pytest.fixture
def saved(originals: dict[str, bytes], tmp_path: Path) -> Path:
    path = tmp_path / "ranges.safetensors"
    path.write_bytes(originals["rtn"])
    return path


def loaded(path: Path, name: str = "rtn", **options: Any) -> tuple[BlockChain, str]:
    chain = chain_of(vit(), RECIPES[name])
    return chain, load_checkpoint(path, chain, mark_of(RECIPES[name]), **options).sha256


def refusal(path: Path, name: str = "rtn", **options: Any) -> str:
    """The one line with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        loaded(path, name, **options)
    line = str(caught.value)
    assert line.isprintable()
    assert len(line) < 1000
    assert str(path) in line
    return line


def texts_of(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_a_changed_bit_is_noticed_wherever_it_is(saved: Path) -> None:
    content, chance = saved.read_bytes(), random.Random(0)
    whole, sha256 = loaded(saved)
    state, kept, lines = whole.state_dict(), 0, []
    for _ in range(60):
        # Half of the bits in the header, which is much smaller than the rest.
        place = chance.randrange(len(content) if chance.random() < 0.5 else 6000)
        changed = bytearray(content)
        changed[place] ^= 1 << chance.randrange(8)
        saved.write_bytes(changed)
        try:
            chain, found = loaded(saved)
        except CheckpointError as error:
            lines.append(str(error))
            continue
        kept += 1
        assert found == sha256
        assert all(torch.equal(state[name], value) for name, value in chain.state_dict().items())
    assert kept < 6
    assert all(line.isprintable() for line in lines)


def test_changed_values_facts_and_recipes_do_not_have_the_sha256(saved: Path) -> None:
    tensors, texts = load_file(saved), texts_of(saved)
    name = next(key for key in tensors if key.endswith("weight_quantizer.scale"))
    facts = json.dumps({**json.loads(texts["facts"]), "x": 1})
    other = texts["fingerprint"].replace('"steps":', ' "steps":')
    for values, changes in (
        ({name: tensors[name] * 1.5}, {}),
        ({}, {"facts": facts}),
        ({}, {"fingerprint": other}),
    ):
        save_file(tensors | values, saved, metadata=texts | changes)
        assert "damaged (its content does not have the sha256" in refusal(saved)
        assert "delete it" in refusal(saved)


def test_a_checkpoint_without_sha256_loads_and_one_line_says_so(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, sha256 = loaded(saved)
    texts = texts_of(saved)
    del texts["sha256"]
    save_file(load_file(saved), saved, metadata=texts)
    with caplog.at_level(logging.INFO):
        assert loaded(saved)[1] == loaded(saved)[1] == sha256
    assert [record.levelname for record in caplog.records] == ["INFO"]
    # A bit of the name changed: this is no older file.
    save_file(load_file(saved), saved, metadata={**texts, "sha257": sha256})
    assert "damaged" in refusal(saved)


def test_another_stage_part_or_block_in_the_place_of_a_file(saved: Path, tmp_path: Path) -> None:
    recipe = RECIPES["rtn"]
    assert "its stage is 'calibrated', here 'x'" in refusal(saved, holds={"stage": "x"})
    part = Part(chain_of(vit(), recipe), images(8), recipe, KL, mark_of(recipe))
    with pytest.raises(CheckpointError, match="its stage is 'calibrated', here 'reconstructed'"):
        RECONSTRUCT.load(part, saved)
    with pytest.raises(CheckpointError, match="holds no reconstructed MLPs"):
        load_mlps(part.chain, saved, None)
    assert CALIBRATE.load(part, saved) == loaded(saved)[1]
    pieces, block = Pieces(tmp_path, "block", mark_of(recipe)), part.chain.segment(1).block
    pieces.save(1, block, {"last_loss": 0.0})
    (tmp_path / "block-001.safetensors").rename(tmp_path / "block-002.safetensors")
    with pytest.raises(CheckpointError, match="its index is 1, here 2"):
        pieces.load(2, block)


def test_the_store_names_the_files_and_their_sha256(tmp_path: Path) -> None:
    recipe, found = RECIPES["rtn"], []
    for _ in range(2):  # made, and reused
        part = Part(chain_of(vit(), recipe), images(8), recipe, KL, mark_of(recipe))
        run_stage(CALIBRATE, part, tmp_path / "ranges.safetensors")
        found.append(part.artefacts)
    assert (
        found[0] == found[1] == {"ranges.safetensors": loaded(tmp_path / "ranges.safetensors")[1]}
    )


Change = Callable[[Tensor], Tensor]


def first(value: float) -> Change:
    """Set the first element."""

    def change(tensor: Tensor) -> Tensor:
        changed = tensor.clone()
        changed.view(-1)[0] = value
        return changed

    return change


def full(value: float) -> Change:
    return lambda tensor: torch.full_like(tensor, value)


BAD: dict[str, tuple[str, str, Change]] = {
    **{
        f"{kind} scale {value}": ("rtn", f"{kind}_quantizer.scale", first(value))
        for kind in ("weight", "input", "b")
        for value in (0.0, -1.0, float("nan"), float("inf"), -float("inf"), 1e35, 1e-38)
    },
    **{
        f"{kind} zero point {value}": ("rtn", f"{kind}_quantizer.zero_point", first(value))
        for kind in ("weight", "input", "b")
        for value in (255.0, 16.0, -1.0, 3.5, float("nan"), float("inf"))
    },
    **{
        f"{kind} zero point {value} of percentiles": (
            "repq",
            f"{kind}_quantizer.zero_point",
            first(value),
        )
        for kind in ("weight", "input", "b")
        for value in (255.0, 0.5, float("nan"), -float("inf"))
    },
    "weight": ("rtn", "block.attn.qkv.weight", first(float("nan"))),
    "bias": ("rtn", "block.attn.qkv.bias", first(float("inf"))),
    "norm": ("rtn", "block.norm1.weight", first(float("nan"))),
    "base 0": ("adalog", "a_quantizer.step", full(0.0)),
    "base NaN": ("adalog", "a_quantizer.step", full(float("nan"))),
    "base between": ("adalog", "a_quantizer.step", lambda step: step + 0.4 / 37),
    "another base": ("adalog", "a_quantizer.step", lambda step: step + 2 / 37),
    "shifts": ("adalog", "a_quantizer.shifts", first(7.0)),
    "mantissas": ("adalog", "a_quantizer.mantissas", first(float("nan"))),
    "split": ("ptq4vit", "a_quantizer.scale", full(-0.5)),
    "GELU step": ("ptq4vit", "fc2.input_quantizer.scale", full(0.0)),
    "codes": ("rtn", "fc1.weight_quantizer.codes", lambda _: torch.full((64, 32), 16).byte()),
    "number of codes": ("rtn", "fc1.weight_quantizer.codes", lambda _: torch.zeros(3, 3).byte()),
    "no scale": ("rtn", "input_quantizer.scale", lambda scale: scale[:0]),
    "scales per channel": ("rtn", "input_quantizer.scale", lambda _: torch.ones(32)),
    "scales per sample": ("rtn", "b_quantizer.scale", lambda _: torch.ones(8, 2, 1, 1)),
    "scales of few rows": ("rtn", "weight_quantizer.scale", lambda scale: scale[:2]),
    "zero points of few rows": ("rtn", "weight_quantizer.zero_point", lambda zero: zero[:2]),
    "zero points of tokens": ("rtn", "input_quantizer.zero_point", lambda _: torch.zeros(9)),
    "bias of another size": ("rtn", "quantized_bias", lambda _: torch.zeros(5)),
    "bias that is not finite": (
        "rtn",
        "qkv.quantized_bias",
        lambda _: torch.full((96,), torch.nan),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_values_that_no_run_gives_are_refused(
    case: str, originals: dict[str, bytes], tmp_path: Path
) -> None:
    name, end, change = BAD[case]
    path = tmp_path / "ranges.safetensors"
    path.write_bytes(originals[name])
    loaded(path, name)
    tensors, (mark, facts) = load_file(path), read_header(path)
    key = [key for key in tensors if key.endswith(end) and tensors[key].numel()][-1:] or [
        key for key in tensors if key.endswith(end)
    ][-1:]
    save_checkpoint(path, tensors | {key[0]: change(tensors[key[0]])}, mark, facts)
    line = refusal(path, name)
    assert key[0].rpartition(".")[0] in line
    assert "delete it" in line


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.int64, torch.complex64])
def test_tensors_of_another_type_are_not_cast(saved: Path, dtype: torch.dtype) -> None:
    tensors, (mark, facts) = load_file(saved), read_header(saved)
    name = next(key for key in tensors if key.endswith("qkv.weight"))
    save_checkpoint(saved, tensors | {name: tensors[name].to(dtype)}, mark, facts)
    assert f"{name} is {dtype}, not torch.float32" in refusal(saved)


def test_names_in_a_file_do_not_reach_the_terminal(saved: Path) -> None:
    tensors, (mark, facts) = load_file(saved), read_header(saved)
    save_checkpoint(saved, tensors | {"\x1b[2J\u202e\n" * 200: torch.ones(1)}, mark, facts)
    assert "does not fit the model" in refusal(saved)
    save_checkpoint(saved, tensors, mark, {"stage": "\x1b[2J" * 1000})
    assert "its stage is" in refusal(saved, holds={"stage": "calibrated"})


@pytest.mark.parametrize(
    "facts", ["[" * 10**6, "9" * 5000, '{"x": ' + "9" * 5000 + "}", '{"x": NaN}', "x" * (10**6 + 1)]
)
def test_headers_that_no_parser_should_take(saved: Path, facts: str) -> None:
    save_file(load_file(saved), saved, metadata=texts_of(saved) | {"facts": facts})
    with pytest.raises(CheckpointError, match=r"not a checkpoint of this project|damaged"):
        loaded(saved)


def test_a_file_larger_than_the_model_is_not_read(saved: Path) -> None:
    """The file takes no space on the disk, but its tensor would take 2 GB of memory."""
    texts, size = texts_of(saved), 2**31
    tensor = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": texts, "x": tensor}).encode()
    with saved.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    assert "bytes; at most" in refusal(saved)
    chain = chain_of(vit(width=64), RECIPES["rtn"])
    with pytest.raises(CheckpointError, match="other weights"):  # before its size counts
        load_checkpoint(saved, chain, mark_of(RECIPES["rtn"]).model_copy(update={"weights": "x"}))


# Files that cannot be read


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    os.mkfifo(path)
    assert "a pipe or a device instead of a regular file" in refusal(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "a pipe or a device instead of a regular file" in refusal(path)
    path.unlink()
    path.mkdir()
    assert "it is a folder" in refusal(path)
    long = tmp_path / ("x" * 300)
    assert "its name is too long" in refusal(long)
    path.rmdir()
    path.symlink_to(path.name)
    assert "a link that leads to itself" in refusal(path)
    path.unlink()
    path.symlink_to("nowhere")
    assert "There is no checkpoint" in refusal(path)


def test_too_many_open_files_are_not_a_damage(saved: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.open(saved, os.O_RDONLY)
    os.close(lowest)
    chain = chain_of(vit(), RECIPES["rtn"])
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))
        with pytest.raises(CheckpointError, match=r"too many files are open.*ulimit -n") as caught:
            load_checkpoint(saved, chain, None)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "damaged" not in str(caught.value)


#: Reads and writes as a user without rights; root gives its rights away first.
STRANGER = """
import os, sys
from pathlib import Path
import torch
from fimaq_core.checkpoint import Fingerprint, read_header, save_checkpoint
from fimaq_core.errors import CheckpointError
from fimaq_core.files import is_there
from fimaq_core.recipe import make_recipe
os.chdir(sys.argv[1])  # pytest's folders above are private
folder = Path()
if os.getuid() == 0:
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
mark = Fingerprint(weights="w", calibration="c", recipe=make_recipe("rtn"))
for action in (
    lambda: read_header(folder / "private.safetensors"),
    lambda: read_header(folder / "closed" / "x.safetensors"),
    lambda: is_there(folder / "closed" / "x.safetensors"),
    lambda: save_checkpoint(folder / "x.safetensors", {"x": torch.ones(1)}, mark, {}),
):
    try:
        action()
        print("no error")
    except CheckpointError as error:
        print(error)
"""


def test_a_lack_of_permission_is_called_so(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    closed = folder / "closed"
    closed.mkdir(parents=True)
    (folder / "private.safetensors").write_bytes(saved.read_bytes())
    (folder / "private.safetensors").chmod(0)
    closed.chmod(0)
    folder.chmod(0o555)
    command = [sys.executable, "-c", STRANGER, str(folder)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=variables)
    finally:
        folder.chmod(0o755)
        closed.chmod(0o755)
    assert done.returncode == 0, done.stderr
    private, hidden, unseen, written = done.stdout.splitlines()
    assert f"no permission: ask {saved.owner()}" in private
    assert "`chmod a+r private.safetensors`" in private
    for line in (hidden, unseen):
        assert "no permission" in line
        assert "`chmod a+rx closed`" in line
    assert "Cannot write" in written
    assert "Permission denied" in written
    assert f"Ask {saved.owner()} for permission" in written
    assert "damaged" not in done.stdout


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027])
def test_a_checkpoint_has_the_permissions_of_other_files(tmp_path: Path, mask: int) -> None:
    path, plain = tmp_path / "x.safetensors", tmp_path / "plain"
    before = os.umask(mask)
    try:
        save_checkpoint(path, {"x": torch.ones(3)}, mark_of(RECIPES["rtn"]), {})
        plain.write_text("")
    finally:
        os.umask(before)
    assert path.stat().st_mode == plain.stat().st_mode
