"""A resumed run gives the bits of the undisturbed run; foreign and damaged files are refused."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_models import chain_of, images, quick, swin, vit
from staged import run_stage
from torch import Tensor, nn

from fimaq_core import NUMERICS_VERSION
from fimaq_core.chain import BlockChain
from fimaq_core.checkpoint import Fingerprint, load_checkpoint, read_header, save_checkpoint
from fimaq_core.errors import CheckpointError
from fimaq_core.fisher.divergence import ClassifierDivergence
from fimaq_core.layers import set_quantized
from fimaq_core.pipeline import CALIBRATE, RECONSTRUCT, freeze, quantize_chain
from fimaq_core.progress import Progress
from fimaq_core.recipe import Fields, Recipe
from fimaq_core.reconstruction.reconstruct import ReconstructionLog
from fimaq_core.store import Part, Resources

pytestmark = pytest.mark.slow

KL = ClassifierDivergence(20.0)


def fingerprint(
    recipe: Recipe, weights: str = "w" * 64, calibration: str = "c" * 64
) -> Fingerprint:
    return Fingerprint(
        weights=weights, calibration=calibration, recipe=recipe.model_dump(mode="json")
    )


@torch.no_grad()
def logits(chain: BlockChain, x: Tensor) -> Tensor:
    return chain(x)


class Broken(Exception):
    """Stands for a run that was stopped."""


def run(
    recipe: Recipe,
    folder: Path | None,
    build: Callable[[], nn.Module],
    size: int,
    stop_in: str | None = None,
) -> tuple[BlockChain, ReconstructionLog]:
    """A whole run with checkpoints; ``stop_in`` names the block in which it is interrupted."""

    def on_progress(progress: Progress) -> None:
        if stop_in is not None and progress.stage == "reconstruct" and progress.block == stop_in:
            raise Broken

    chain, x = chain_of(build(), recipe), images(24, size)
    resources = Resources(on_progress, batch_size=8)
    ranges = None if folder is None else folder / "ranges.safetensors"
    part = Part(chain, x, recipe, KL, fingerprint(recipe))
    run_stage(CALIBRATE, part, ranges, resources=resources)
    run_stage(RECONSTRUCT, part, pieces=folder, resources=resources)
    return chain, part.log


CASES: dict[str, tuple[Callable[[], nn.Module], int, dict[str, object]]] = {
    "vit, fimaq": (vit, 32, {}),
    "swin, fimaq": (lambda: swin(40), 40, {}),
    "vit, brecq": (vit, 32, {"method": "brecq"}),
    "vit, glfq": (vit, 32, {"loss": "glf", "weight_learning": "straight-through"}),
    "vit, gradients a sample": (vit, 32, {"loss": "fisher_brecq"}),
    "vit, closed-form start": (vit, 32, {"method": "qdrop", "start": "gptaq"}),
    "vit, singular passes": (
        vit,
        32,
        {"fisher_mode": "qf", "activation_prob": 1.0, "lr_alpha": 1e-9, "lr_scale": 1e-9},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_equals_the_undisturbed_one(case: str, tmp_path: Path) -> None:
    build, size, changes = CASES[case]
    recipe = quick(**changes)
    undisturbed, expected = run(recipe, None, build, size)
    labels = list(expected.last_loss)
    for stop_in in (labels[0], labels[2], labels[-1]):
        folder = tmp_path / stop_in
        with pytest.raises(Broken):
            run(recipe, folder, build, size, stop_in)
        kept = sorted(path.name for path in folder.glob("block-*"))
        assert kept == [f"block-{index:03d}.safetensors" for index in range(labels.index(stop_in))]
        resumed, log = run(recipe, folder, build, size)
        x = images(6, size, seed=8)
        assert torch.equal(logits(resumed, x), logits(undisturbed, x))
        assert log.last_loss == expected.last_loss
        assert log.fisher_passes == expected.fisher_passes
        assert sorted(log.notes) == sorted(expected.notes)
    if "singular" in case or "sample" in case:
        assert expected.notes


def test_blocks_of_another_engine_are_named(tmp_path: Path) -> None:
    recipe, x, notes, labels = quick(), images(24), {}, []
    for turn, engine in enumerate(("fused", "fused", "eager")):
        part = Part(chain_of(vit(), recipe), x, recipe, KL, fingerprint(recipe))
        run_stage(CALIBRATE, part)
        run_stage(
            RECONSTRUCT, part, pieces=tmp_path, resources=Resources(batch_size=8, engine=engine)
        )
        log = part.log
        assert log.engine == engine
        labels = list(log.last_loss)
        notes[turn] = [note for note in log.notes if "engine" in note]
    assert notes[0] == notes[1] == []
    assert notes[2] == [
        f"{label}: reconstructed earlier by the step engine 'fused'" for label in labels
    ]


def test_finished_blocks_are_not_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fimaq_core.reconstruction import reconstruct as module

    recipe = quick()
    run(recipe, tmp_path, vit, 32)
    monkeypatch.setattr(
        module, "optimise_block", lambda *_: pytest.fail("a finished block was optimised again")
    )
    monkeypatch.setattr("fimaq_core.pipeline.calibrate", lambda *_: pytest.fail("calibrated again"))
    run(recipe, tmp_path, vit, 32)


@pytest.mark.parametrize("name", ["vit", "swin", "no biases"])
def test_saved_and_loaded_at_every_stage(name: str, tmp_path: Path) -> None:
    """Calibrated, each block, and the finished model: the same logits from a new model."""
    build: Callable[[], nn.Module] = {
        "vit": vit,
        "swin": lambda: swin(40),
        "no biases": lambda: vit(qkv_bias=False),
    }[name]
    size = 40 if name == "swin" else 32
    recipe, x, probe = quick(), images(24, size), images(6, size, seed=8)
    mark = fingerprint(recipe)
    chain, loaded = chain_of(build(), recipe), chain_of(build(), recipe)
    part = Part(chain, x, recipe, KL, mark)
    assert not run_stage(CALIBRATE, part, tmp_path / "ranges.safetensors")
    assert run_stage(CALIBRATE, replace(part, chain=loaded), tmp_path / "ranges.safetensors")
    for on in (True, False):
        set_quantized(chain, on)
        set_quantized(loaded, on)
        assert torch.equal(logits(loaded, probe), logits(chain, probe))
    run_stage(RECONSTRUCT, part, pieces=tmp_path)
    for index, segment in enumerate(loaded):
        load_checkpoint(tmp_path / f"block-{index:03d}.safetensors", segment.block, mark)
    freeze(chain)
    freeze(loaded)
    assert torch.equal(logits(loaded, probe), logits(chain, probe))
    save_checkpoint(
        tmp_path / "final.safetensors", chain.state_dict(), mark, {"stage": "reconstructed"}
    )
    final = chain_of(build(), recipe)
    assert load_checkpoint(tmp_path / "final.safetensors", final, mark).facts == {
        "stage": "reconstructed"
    }
    set_quantized(final, True)
    assert torch.equal(logits(final, probe), logits(chain, probe))
    set_quantized(chain, False)
    set_quantized(final, False)
    assert torch.equal(logits(final, probe), logits(chain, probe))


def test_quantize_does_all_stages() -> None:
    recipe, x = quick(), images(24)
    staged, _ = run(recipe, None, vit, 32)
    whole = chain_of(vit(), recipe)
    quantize_chain(whole, x, recipe, KL, Resources(batch_size=8))
    assert torch.equal(logits(whole, x), logits(staged, x))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a calibrated model."""
    recipe = quick()
    calibrated(recipe, tmp_path / "ranges.safetensors")
    return tmp_path / "ranges.safetensors"


def calibrated(recipe: Recipe, path: Path) -> bool:
    """Calibrate a new model, or load that; return True if it was loaded."""
    part = Part(chain_of(vit(), recipe), images(8), recipe, KL, fingerprint(recipe))
    return run_stage(CALIBRATE, part, path)


def test_another_run_is_refused_with_the_reason(saved: Path) -> None:
    recipe, later = quick(), NUMERICS_VERSION + 1
    chain = chain_of(vit(), recipe)
    cases = {
        r"another recipe: w_bits \(4, here 3\)": fingerprint(quick(w_bits=3)),
        r"seed \(3407, here 5\), lr_alpha \(0.05, here 0.1\)|lr_alpha .*seed": fingerprint(
            quick(seed=5, lr_alpha=0.1)
        ),
        r"other weights \(sha256 wwwwwwwwwwww, here xxxxxxxxxxxx\)": fingerprint(
            recipe, weights="x" * 64
        ),
        "other calibration images": fingerprint(recipe, calibration="d" * 64),
        f"numerics version {NUMERICS_VERSION}, this is version {later}": fingerprint(
            recipe
        ).model_copy(update={"numerics": later}),
    }
    for message, expected in cases.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            load_checkpoint(saved, chain, expected)
        assert str(saved) in str(caught.value)
    assert load_checkpoint(saved, chain, fingerprint(recipe)).facts["stage"] == "calibrated"
    assert load_checkpoint(saved, chain, None).facts["stage"] == "calibrated"


def test_ranges_serve_every_method_with_the_same_range_settings(saved: Path) -> None:
    for method in ("qdrop", "brecq", "fimaq"):
        recipe = quick(method, steps=99)
        assert calibrated(recipe, saved)
    for recipe in (quick("rtn"), quick(a_bits=8), quick(seed=4), quick(range_candidates=64)):
        with pytest.raises(CheckpointError, match="another recipe"):
            calibrated(recipe, saved)


def test_another_structure_is_refused(saved: Path) -> None:
    recipe = quick()
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_checkpoint(saved, chain_of(vit(3), recipe), fingerprint(recipe))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_checkpoint(saved, chain_of(vit(width=64), recipe), fingerprint(recipe))


def test_a_block_of_another_recipe_is_not_silently_used(tmp_path: Path) -> None:
    run(quick(), tmp_path, vit, 32)
    (tmp_path / "ranges.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"steps \(6, here 7\)"):
        run(quick(steps=7), tmp_path, vit, 32)


def cut(content: bytes) -> bytes:
    return content[:-100]


def cut_header(content: bytes) -> bytes:
    return content[:40]


def scramble(content: bytes) -> bytes:
    return content[:8] + b"\xff" * 60 + content[68:]


@pytest.mark.parametrize(
    "damage", [cut, cut_header, scramble, lambda _: b"", lambda _: b"not a checkpoint at all" * 9]
)
def test_damaged_files_are_refused(saved: Path, damage: Callable[[bytes], bytes]) -> None:
    saved.write_bytes(damage(saved.read_bytes()))
    recipe = quick()
    with pytest.raises(CheckpointError, match=r"damaged|not a checkpoint") as caught:
        load_checkpoint(saved, chain_of(vit(), recipe), fingerprint(recipe))
    assert str(saved) in str(caught.value)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    chain = chain_of(vit(), quick())
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors", chain, None)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.ones(2)}, foreign)
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        read_header(foreign)


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the fingerprint inside a checkpoint's header."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    mark = json.loads(header["__metadata__"]["fingerprint"])
    change(mark)
    header["__metadata__"]["fingerprint"] = json.dumps(mark)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + length :])


@pytest.mark.parametrize("fields", ["all", "ranges", "mlp"])
def test_a_recipe_of_another_version_is_refused_and_not_a_crash(
    saved: Path, fields: Fields
) -> None:
    """A field that this version does not know, or a value it does not take."""
    recipe = quick()
    rewrite_header(saved, lambda mark: mark["recipe"].update({"adaptive_base": 37}))
    with pytest.raises(CheckpointError, match="recipe"):
        load_checkpoint(saved, chain_of(vit(), recipe), fingerprint(recipe), fields)


def test_header_without_fingerprint_fields(saved: Path) -> None:
    rewrite_header(saved, lambda mark: mark.pop("weights"))
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        read_header(saved)
