"""The whole of a quantization: its stages in order."""

import copy
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.checkpoint import Fingerprint, load_checkpoint, read_header
from fimaq_core.errors import CheckpointError
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.layers import QuantLinear, decide_roundings, fold_shift, quant_layers, set_quantized
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.engines import Engine
from fimaq_core.reconstruction.kept import add_block, block_facts, log_facts, read_log
from fimaq_core.reconstruction.mlp import mlps, reconstruct_mlps, use_relu
from fimaq_core.reconstruction.reconstruct import ReconstructionLog, reconstruct
from fimaq_core.samples import Samples
from fimaq_core.store import CheckpointStore, Part, Pieces, Resources, Stage


class ReconstructMlps(Stage):
    """Train the MLPs of an uncalibrated chain with ReLU; `teacher` becomes the chain as it was."""

    name, kind, mark, piece = "reconstruct MLPs", "mlp", "mlp", "mlp"
    scope = "mlp"

    def wanted(self, part: Part) -> bool:
        # A model without any MLP is an error; of a model of several parts, some may have none.
        return (
            part.recipe.reconstruct_mlp
            and part.teacher is None
            and (not part.name or len(mlps(part.chain)) > 0)
        )

    def title(self, part: Part) -> str:
        return self.name

    def make(self, part: Part, resources: Resources, pieces: Pieces) -> None:
        part.teacher = reconstruct_mlps(
            part.chain,
            part.inputs,
            part.recipe,
            part.divergence,
            on_progress=resources.on_progress,
            placement=resources.placement,
            batch_size=resources.batch_size,
            restore=lambda index, mlp: pieces.load(index, mlp) is not None,
            save=pieces.save,
        )

    def load(self, part: Part, path: Path) -> None:
        teacher = copy.deepcopy(part.chain)
        load_mlps(part.chain, path, part.fingerprint)
        part.teacher = teacher

    def kept(self, part: Part) -> nn.Module:
        return mlps(part.chain)


class Calibrate(Stage):
    """Find the ranges."""

    name, kind, mark = "calibrate", "calibration", "calibrated"
    scope = "ranges"

    def make(self, part: Part, resources: Resources, pieces: Pieces) -> None:
        calibrate(part.chain, part.inputs, part.recipe, resources.on_progress, resources.batch_size)

    def load(self, part: Part, path: Path) -> None:
        load_checkpoint(path, part.chain, part.fingerprint, "ranges")
        set_quantized(part.chain, True)


class Reconstruct(Stage):
    """Reconstruct the blocks of a calibrated chain; `log` says what was done."""

    name, kind, mark, piece = "reconstruct", "reconstruction", "reconstructed", "block"

    def wanted(self, part: Part) -> bool:
        return part.recipe.reconstruct

    def make(self, part: Part, resources: Resources, pieces: Pieces) -> None:
        earlier = ReconstructionLog()
        engines: dict[str, Engine] = {}

        def restore(index: int, segment: Segment) -> bool:
            found = pieces.load(index, segment.block)
            if found is None:
                return False
            engines[segment.label] = add_block(earlier, segment.label, found[0], str(found[1]))
            return True

        def save(index: int, segment: Segment, log: ReconstructionLog) -> None:
            pieces.save(index, segment.block, block_facts(log, segment.label))

        log = part.log = reconstruct(
            part.chain,
            part.inputs,
            part.recipe,
            part.divergence,
            on_progress=resources.on_progress,
            placement=resources.placement,
            batch_size=resources.batch_size,
            engine=resources.engine,
            teacher=part.teacher,
            restore=restore,
            save=save,
        )
        # Engines agree within rounding, but the record names one.
        earlier.notes += [
            f"{label}: reconstructed earlier by the engine '{own}'"
            for label, own in engines.items()
            if own != log.engine
        ]
        for one in fields(log):
            if one.name != "engine":  # dictionaries by block, and notes
                before, after = getattr(earlier, one.name), getattr(log, one.name)
                setattr(
                    log, one.name, before | after if isinstance(after, dict) else before + after
                )
        finish(part.chain)

    def load(self, part: Part, path: Path) -> None:
        facts = load_checkpoint(path, part.chain, part.fingerprint)
        set_quantized(part.chain, True)
        part.log = read_log(facts.get("log"), str(path))

    def facts(self, part: Part) -> dict[str, Any]:
        return {"stage": self.mark, "log": log_facts(part.log)}


class Finish(Stage):
    """Leave a chain in its quantized form; nothing is kept."""

    def make(self, part: Part, resources: Resources, pieces: Pieces) -> None:
        finish(part.chain)


MLPS, CALIBRATE, RECONSTRUCT, FINISH = ReconstructMlps(), Calibrate(), Reconstruct(), Finish()

#: All stages in order.
STAGES: list[Stage] = [MLPS, CALIBRATE, RECONSTRUCT, FINISH]


def load_mlps(segments: Iterable[Segment], path: Path, fingerprint: Fingerprint | None) -> None:
    """Give uncalibrated `segments` (of one or more chains) the reconstructed MLPs of a checkpoint.

    Args:
        fingerprint: what the checkpoint must belong to; None takes any.

    Raises:
        CheckpointError: it belongs to another run, is damaged, or holds something else.
    """
    _, facts = read_header(path)
    if facts.get("stage") != "mlp":
        raise CheckpointError(
            f"{path} holds no reconstructed MLPs but a checkpoint of stage {facts.get('stage')!r}."
        )
    segments = list(segments)
    use_relu(segments)
    load_checkpoint(path, mlps(segments), fingerprint, "mlp")
    for segment in segments:
        set_quantized(segment, False)


def finish(chain: BlockChain) -> None:
    """Round to nearest what is still open, fold shifts, and switch the chain to its quantized form."""
    decide_roundings(chain)
    for _, layer in quant_layers(chain):
        if isinstance(layer, QuantLinear):
            fold_shift(layer)
    set_quantized(chain, True)


def quantize_chain(
    chain: BlockChain,
    images: Samples,
    recipe: Recipe,
    divergence: Divergence,
    resources: Resources = Resources(),
) -> ReconstructionLog:
    """Quantize `chain` in place by all stages that the recipe asks for, without files.

    Args:
        chain: the model on the device to use.
        images: (n, ...) inputs of the chain, the calibration images; the first
            ``recipe.range_images`` set the ranges.
        recipe: all settings.
        divergence: of the task.
        resources: how to run.
    """
    part, store = Part(chain, images, recipe, divergence), CheckpointStore(resources)
    for stage in STAGES:
        if stage.wanted(part):
            store.run(stage, part)
    return part.log
