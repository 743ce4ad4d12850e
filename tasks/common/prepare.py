"""From a float model to a calibrated chain: what ``run`` and the stages have in common."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fimaq_core.chain import BlockChain
from fimaq_core.checkpoint import Fingerprint
from fimaq_core.errors import RecipeError
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.quantize import Resources, load_mlps, reconstruct_mlps_or_load
from fimaq_core.recipe import Recipe
from tasks.common.request import CellRequest
from tasks.common.task import CalibrationSet, LoadedModel, Task


@dataclass(frozen=True)
class Start:
    """Where calibration starts.

    Attributes:
        chain: the model on its device, its MLPs reconstructed if the recipe says so.
        teacher: the model as it was, if they were; else None.
        reused: whether the MLPs came from a checkpoint.
    """

    chain: BlockChain
    teacher: BlockChain | None = None
    reused: bool = False


def fingerprint_of(loaded: LoadedModel, images: CalibrationSet, recipe: Recipe) -> Fingerprint:
    """What a checkpoint of this run belongs to."""
    return Fingerprint(weights=loaded.sha256, calibration=images.fingerprint, recipe=recipe)


def checkpoint_facts(request: CellRequest, loaded: LoadedModel) -> dict[str, object]:
    """What a checkpoint says of itself, so that a later stage can build its model."""
    return {"task": request.task, "model": request.model.name, "model_args": request.model.model_args, "tag": loaded.tag}


def check_mlp_checkpoint(request: CellRequest) -> None:
    """Raise RecipeError if ``request`` has an ``mlp_checkpoint`` that its recipe has no use for."""
    recipe = request.recipe
    if request.mlp_checkpoint is not None and (recipe is None or not recipe.reconstruct_mlp):
        method = "fp" if recipe is None else recipe.method
        raise RecipeError(
            f"The recipe of '{method}' has no MLP reconstruction, so --mlp-checkpoint is not used: "
            "give --reconstruct-mlp too, or take method aphq."
        )


def start(
    request: CellRequest,
    task: Task,
    loaded: LoadedModel,
    images: CalibrationSet,
    divergence: Divergence,
    device: torch.device,
    resources: Resources,
    path: Path | None = None,
) -> Start:
    """Build the chain and reconstruct its MLPs, or load them.

    Args:
        request: with a recipe; its ``mlp_checkpoint``, where given, must be of the same run.
        images: the calibration images.
        divergence: of the task.
        path: where reconstructed MLPs are kept and looked for; None keeps nothing.

    Raises:
        CheckpointError: ``mlp_checkpoint`` is missing or of another run.
        RecipeError: there is one, and the recipe has no use for it.
    """
    recipe = request.recipe
    assert recipe is not None
    check_mlp_checkpoint(request)
    chain = task.build(loaded, recipe).to(device)
    if not recipe.reconstruct_mlp:
        return Start(chain)
    fingerprint = fingerprint_of(loaded, images, recipe)
    if request.mlp_checkpoint is not None:
        teacher = task.build(task.load(request.model), recipe).to(device) if recipe.reconstruct else None
        load_mlps(chain, request.mlp_checkpoint, fingerprint)
        return Start(chain, teacher, True)
    facts = checkpoint_facts(request, loaded)
    teacher, reused = reconstruct_mlps_or_load(chain, images.images, recipe, divergence, resources, path, fingerprint, facts)
    return Start(chain, teacher, reused)
