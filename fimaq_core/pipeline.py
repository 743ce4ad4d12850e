"""A whole quantization: its stages in order."""

import copy
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.checkpoint import Fingerprint, Pieces, load_checkpoint, read_header
from fimaq_core.errors import CheckpointError
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.layers import QuantLinear, decide_roundings, fold_shift, quant_layers, set_quantized
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.finish import Finishing, finish, finishable, read_finishing
from fimaq_core.reconstruction.log import ReconstructionLog, read_log
from fimaq_core.reconstruction.mlp import mlps, reconstruct_mlps, use_relu
from fimaq_core.reconstruction.reconstruct import reconstruct
from fimaq_core.reconstruction.starts import round_closed_form
from fimaq_core.resources import Resources
from fimaq_core.samples import Samples
from fimaq_core.store import CheckpointStore, Part, Stage


class ReconstructMlps(Stage):
    """Train the MLPs of an uncalibrated chain with ReLU; `teacher` becomes a copy with GELU."""

    name, kind, mark, piece = "reconstruct MLPs", "mlp", "mlp", "mlp"
    fields = "mlp"

    def wanted(self, part: Part) -> bool:
        # One part of several may have no MLP; a whole model without an MLP is an error.
        possible = not part.name or len(mlps(part.chain)) > 0
        return part.recipe.reconstruct_mlp and part.teacher is None and possible

    def title(self, part: Part) -> str:
        return self.name

    def make(self, part: Part, resources: Resources, pieces: Pieces) -> None:
        run = part.chain, part.inputs, part.recipe, part.divergence
        part.teacher = reconstruct_mlps(*run, resources=resources, pieces=pieces)

    def load(self, part: Part, path: Path) -> str:
        teacher = copy.deepcopy(part.chain)
        sha256 = load_mlps(part.chain, path, part.fingerprint)
        part.teacher = teacher
        return sha256

    def kept(self, part: Part) -> nn.Module:
        return mlps(part.chain)


class Calibrate(Stage):
    """Find the ranges; without reconstruction, also round the weights by the recipe's start."""

    name, kind, mark = "calibrate", "calibration", "calibrated"
    fields = "ranges"

    def make(self, part: Part, resources: Resources, pieces: Pieces) -> None:
        calibrate(part.chain, part.inputs, part.recipe, resources.on_progress, resources.batch_size)
        if part.recipe.start != "nearest" and not part.recipe.reconstruct:
            run = part.chain, part.inputs, part.recipe
            round_closed_form(*run, resources=resources, notes=part.log.notes)

    def load(self, part: Part, path: Path) -> str:
        holds = {"stage": self.mark}
        found = load_checkpoint(path, part.chain, part.fingerprint, self.fields, holds)
        set_quantized(part.chain, True)
        return found.sha256


class Reconstruct(Stage):
    """Reconstruct the blocks of a calibrated chain; `log` holds the facts about it."""

    name, kind, mark, piece = "reconstruct", "reconstruction", "reconstructed", "block"

    def wanted(self, part: Part) -> bool:
        return part.recipe.reconstruct

    def make(self, part: Part, resources: Resources, pieces: Pieces) -> None:
        run = part.chain, part.inputs, part.recipe, part.divergence
        part.log = reconstruct(*run, resources=resources, teacher=part.teacher, pieces=pieces)
        freeze(part.chain)

    def load(self, part: Part, path: Path) -> str:
        holds = {"stage": self.mark}
        found = load_checkpoint(path, part.chain, part.fingerprint, self.fields, holds)
        set_quantized(part.chain, True)
        part.log = read_log(found.facts.get("log"), path)
        return found.sha256

    def facts(self, part: Part) -> dict[str, Any]:
        return {"stage": self.mark, "log": asdict(part.log)}


class Freeze(Stage):
    """Leave a chain in its quantized form; this stage keeps no file."""

    def make(self, part: Part, resources: Resources, pieces: Pieces) -> None:
        freeze(part.chain)


class Finish(Stage):
    """Train norms, biases and scales of a frozen chain through the whole model."""

    name, kind, mark = "finish", "finish", "finished"

    def wanted(self, part: Part) -> bool:
        return part.recipe.finish_steps > 0 and finishable(part.chain)

    def make(self, part: Part, resources: Resources, pieces: Pieces) -> None:
        run = part.chain, part.inputs, part.recipe, part.divergence
        self._keep(part, finish(*run, resources=resources, teacher=part.teacher))

    def load(self, part: Part, path: Path) -> str:
        holds = {"stage": self.mark}
        found = load_checkpoint(path, part.chain, part.fingerprint, self.fields, holds)
        set_quantized(part.chain, True)
        self._keep(part, read_finishing(found.facts.get("finishing"), path))
        return found.sha256

    def facts(self, part: Part) -> dict[str, Any]:
        assert part.finishing is not None
        return {**super().facts(part), "finishing": part.finishing.model_dump()}

    @staticmethod
    def _keep(part: Part, finishing: Finishing) -> None:
        part.finishing = finishing
        part.log.notes.append(finishing.sentence())


MLPS, CALIBRATE, RECONSTRUCT = ReconstructMlps(), Calibrate(), Reconstruct()
FREEZE, FINISH = Freeze(), Finish()

#: All stages in order.
STAGES: list[Stage] = [MLPS, CALIBRATE, RECONSTRUCT, FREEZE, FINISH]


def load_mlps(segments: Iterable[Segment], path: Path, fingerprint: Fingerprint | None) -> str:
    """Load the reconstructed MLPs of a checkpoint into uncalibrated `segments`, of any chains.

    Returns the sha256 of the file's content.

    Raises:
        CheckpointError: the file belongs to another run than ``fingerprint`` (None accepts any
            run), is damaged, or holds something else.
    """
    _, facts = read_header(path)
    if facts.get("stage") != "mlp":
        raise CheckpointError(
            f"{path} holds no reconstructed MLPs but a checkpoint of stage {facts.get('stage')!r}."
        )
    segments = list(segments)
    use_relu(segments)
    found = load_checkpoint(path, mlps(segments), fingerprint, "mlp", {"stage": "mlp"})
    for segment in segments:
        set_quantized(segment, False)
    return found.sha256


def freeze(chain: BlockChain) -> None:
    """Round undecided weights to nearest, fold shifts, and switch to the quantized form."""
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
    """Run all stages that the recipe asks for on `chain`, in place and without files.

    Example::

        log = quantize_chain(chain, Samples(images), recipe, ClassifierDivergence(20.0))

    ``images`` (n, ...) are inputs of the chain; the first ``recipe.range_images`` of them determine
    the ranges. Everything runs on the chain's device.
    """
    part, store = Part(chain, images, recipe, divergence), CheckpointStore(resources)
    for stage in STAGES:
        if stage.wanted(part):
            store.run(stage, part)
    return part.log
