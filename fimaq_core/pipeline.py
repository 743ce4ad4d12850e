"""The whole of a quantization: calibrate, reconstruct, with checkpoints to go on from."""

import contextlib
import copy
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.checkpoint import Fingerprint, load_checkpoint, read_header, save_checkpoint
from fimaq_core.errors import CheckpointError
from fimaq_core.files import remove
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.layers import QuantLinear, decide_roundings, fold_shift, quant_layers, set_quantized
from fimaq_core.progress import Report, silent
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.engines import Engine, EngineChoice
from fimaq_core.reconstruction.kept import add_block, block_facts, log_facts, read_log
from fimaq_core.reconstruction.mlp import mlps, reconstruct_mlps, use_relu
from fimaq_core.reconstruction.reconstruct import ReconstructionLog, reconstruct
from fimaq_core.reconstruction.tape import Placement
from fimaq_core.samples import Samples


@dataclass(frozen=True)
class Resources:
    """How to run, as far as it does not belong to the recipe.

    Attributes:
        report: receives progress.
        placement: where the tape lives.
        batch_size: images a forward pass of calibration, tape and Fisher passes.
        engine: how optimisation steps run, see :mod:`fimaq_core.reconstruction.engines`.
    """

    report: Report = silent
    placement: Placement = "device"
    batch_size: int = 32
    engine: EngineChoice = "auto"


def reconstruct_mlps_or_load(
    chain: BlockChain,
    images: Samples,
    recipe: Recipe,
    divergence: Divergence,
    resources: Resources = Resources(),
    path: Path | None = None,
    fingerprint: Fingerprint | None = None,
    facts: dict[str, Any] | None = None,
) -> tuple[BlockChain, bool]:
    """Reconstruct the MLPs of an uncalibrated ``chain`` with ReLU, or load them from ``path`` if they are there.

    Each finished MLP is kept beside ``path`` until the last one is, and not done twice.

    Args:
        path: checkpoint of the reconstructed MLPs, read or written; None keeps nothing.
        fingerprint: what the checkpoint must belong to; needed with ``path``.
        facts: JSON values kept in it.

    Returns:
        The model as it was, and whether the MLPs were loaded.
    """
    if path is not None and path.is_file():
        teacher = copy.deepcopy(chain)
        load_mlps(chain, path, fingerprint)
        return teacher, True
    folder = None if path is None else mlps_beside(path)

    def file(index: int) -> Path | None:
        return None if folder is None else folder / f"mlp-{index:03d}.safetensors"

    def restore(index: int, mlp: nn.Module) -> bool:
        kept = file(index)
        if kept is None or not kept.is_file():
            return False
        load_checkpoint(kept, mlp, fingerprint, "mlp")
        return True

    def save(index: int, mlp: nn.Module) -> None:
        kept = file(index)
        if kept is not None:
            assert fingerprint is not None
            save_checkpoint(kept, mlp.state_dict(), fingerprint, {"stage": "mlp", "index": index})

    teacher = reconstruct_mlps(
        chain,
        images,
        recipe,
        divergence,
        report=resources.report,
        placement=resources.placement,
        batch_size=resources.batch_size,
        restore=restore,
        save=save,
    )
    if path is not None:
        assert fingerprint is not None
        save_checkpoint(path, mlps(chain).state_dict(), fingerprint, {**(facts or {}), "stage": "mlp"})
    if folder is not None:
        remove_mlps(folder)
    return teacher, False


def load_mlps(segments: Iterable[Segment], path: Path, fingerprint: Fingerprint | None) -> None:
    """Give uncalibrated ``segments`` (a chain, or all of several) the reconstructed MLPs of a checkpoint, with ReLU.

    Args:
        fingerprint: what the checkpoint must belong to; None takes any.

    Raises:
        CheckpointError: it belongs to another run, is damaged, or holds something else.
    """
    _, facts = read_header(path)
    if facts.get("stage") != "mlp":
        raise CheckpointError(f"{path} holds no reconstructed MLPs but a checkpoint of stage {facts.get('stage')!r}.")
    segments = list(segments)
    use_relu(segments)
    load_checkpoint(path, mlps(segments), fingerprint, "mlp")
    for segment in segments:
        set_quantized(segment, False)


def calibrate_or_load(
    chain: BlockChain,
    images: Samples,
    recipe: Recipe,
    resources: Resources = Resources(),
    path: Path | None = None,
    fingerprint: Fingerprint | None = None,
    facts: dict[str, Any] | None = None,
) -> bool:
    """Calibrate ``chain``, or load its calibration from ``path`` if it is there; return whether it was loaded.

    Args:
        path: checkpoint of the calibrated chain, read or written; None keeps nothing.
        fingerprint: what the checkpoint must belong to; needed with ``path``.
        facts: JSON values kept in it.
    """
    if path is not None and path.is_file():
        load_checkpoint(path, chain, fingerprint, "ranges")
        set_quantized(chain, True)
        return True
    calibrate(chain, images, recipe, resources.report, resources.batch_size)
    if path is not None:
        assert fingerprint is not None
        save_checkpoint(path, chain.state_dict(), fingerprint, {"stage": "calibrated", **(facts or {})})
    return False


def reconstruct_with_checkpoints(
    chain: BlockChain,
    images: Samples,
    recipe: Recipe,
    divergence: Divergence,
    resources: Resources = Resources(),
    folder: Path | None = None,
    fingerprint: Fingerprint | None = None,
    teacher: BlockChain | None = None,
) -> ReconstructionLog:
    """Reconstruct a calibrated chain; with ``folder``, each finished block is kept there and not done twice.

    Args:
        teacher: see :func:`fimaq_core.reconstruction.reconstruct.reconstruct`.
        folder: for ``block-NNN.safetensors`` files.
        fingerprint: what they must belong to; needed with ``folder``.
    """
    earlier = ReconstructionLog()
    engines: dict[str, Engine] = {}

    def path(index: int) -> Path | None:
        return None if folder is None else folder / f"block-{index:03d}.safetensors"

    def restore(index: int, segment: Segment) -> bool:
        file = path(index)
        if file is None or not file.is_file():
            return False
        facts = load_checkpoint(file, segment.block, fingerprint)
        engines[segment.label] = add_block(earlier, segment.label, facts, str(file))
        return True

    def save(index: int, segment: Segment, log: ReconstructionLog) -> None:
        file = path(index)
        if file is not None:
            assert fingerprint is not None
            facts = {"stage": "block", "index": index, **block_facts(log, segment.label)}
            save_checkpoint(file, segment.block.state_dict(), fingerprint, facts)

    log = reconstruct(
        chain,
        images,
        recipe,
        divergence,
        report=resources.report,
        placement=resources.placement,
        batch_size=resources.batch_size,
        engine=resources.engine,
        teacher=teacher,
        restore=restore,
        save=save,
    )
    # Engines agree within rounding, but the record names one.
    earlier.notes += [
        f"{name}: reconstructed earlier by the engine '{own}'" for name, own in engines.items() if own != log.engine
    ]
    return ReconstructionLog(
        {**earlier.last_loss, **log.last_loss},
        {**earlier.fisher_passes, **log.fisher_passes},
        earlier.notes + log.notes,
        log.engine,
        {**earlier.error, **log.error},
        {**earlier.fisher, **log.fisher},
        {**earlier.near_floor, **log.near_floor},
    )


def reconstruct_or_load(
    chain: BlockChain,
    images: Samples,
    recipe: Recipe,
    divergence: Divergence,
    resources: Resources,
    path: Path,
    fingerprint: Fingerprint,
    teacher: BlockChain | None = None,
) -> tuple[ReconstructionLog, bool]:
    """Reconstruct a calibrated ``chain``, or load what an earlier run with all the same settings made of it.

    Args:
        path: checkpoint of the reconstructed chain, read or written; finished blocks are kept beside it until it is whole.
        fingerprint: what it must belong to.
        chain, images, recipe, divergence, resources, teacher: as in :func:`reconstruct_with_checkpoints`.

    Returns:
        What was done, and whether it was loaded.
    """
    if path.is_file():
        facts = load_checkpoint(path, chain, fingerprint)
        set_quantized(chain, True)
        remove_blocks(blocks_beside(path))  # what a run left that was stopped just there
        return read_log(facts.get("log"), str(path)), True
    blocks = blocks_beside(path)
    log = reconstruct_with_checkpoints(chain, images, recipe, divergence, resources, blocks, fingerprint, teacher)
    finish(chain)
    save_checkpoint(path, chain.state_dict(), fingerprint, {"stage": "reconstructed", "log": log_facts(log)})
    remove_blocks(blocks)
    return log, False


def blocks_beside(path: Path) -> Path:
    """The folder of finished blocks of a reconstruction whose whole is going to be the checkpoint ``path``."""
    return path.with_name(f"{path.stem}.blocks")


def mlps_beside(path: Path) -> Path:
    """The folder of finished MLPs of a reconstruction whose whole is going to be the checkpoint ``path``."""
    return path.with_name(f"{path.stem}.mlps")


def remove_blocks(folder: Path) -> None:
    """Remove the checkpoints of finished blocks, and their folder if it holds nothing else."""
    _remove(folder, "block-*.safetensors")


def remove_mlps(folder: Path) -> None:
    """Remove the checkpoints of finished MLPs, and their folder if it holds nothing else."""
    _remove(folder, "mlp-*.safetensors")


def _remove(folder: Path, pattern: str) -> None:
    # Cells may share what is in there: another process may be at this too, or just have written there.
    for file in folder.glob(pattern):
        remove(file)
    with contextlib.suppress(OSError):
        folder.rmdir()


def finish(chain: BlockChain) -> None:
    """Decide all roundings that are still open (to nearest), fold shifts, and leave the chain in its quantized form."""
    decide_roundings(chain)
    for _, layer in quant_layers(chain):
        if isinstance(layer, QuantLinear):
            fold_shift(layer)
    set_quantized(chain, True)


def quantize_chain(
    chain: BlockChain, images: Samples, recipe: Recipe, divergence: Divergence, resources: Resources = Resources()
) -> ReconstructionLog:
    """Quantize ``chain`` in place: reconstruct MLPs, calibrate, reconstruct, decide the roundings, as the recipe says.

    Args:
        chain: the model on the device to use.
        images: (n, ...) inputs of the chain, the calibration images; the first ``recipe.range_images`` set the ranges.
        recipe: all settings.
        divergence: of the task.
        resources: how to run.
    """
    teacher = None
    if recipe.reconstruct_mlp:
        teacher, _ = reconstruct_mlps_or_load(chain, images, recipe, divergence, resources)
    calibrate_or_load(chain, images, recipe, resources)
    log = ReconstructionLog()
    if recipe.reconstruct:
        log = reconstruct_with_checkpoints(chain, images, recipe, divergence, resources, teacher=teacher)
    finish(chain)
    return log
