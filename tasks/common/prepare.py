"""From a float model to chains that are ready for calibration: what ``run`` and the stages have in common."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from fimaq_core.chain import BlockChain, Segment
from fimaq_core.checkpoint import Fingerprint
from fimaq_core.errors import RecipeError
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.pipeline import Resources, load_mlps, reconstruct_mlps_or_load
from fimaq_core.recipe import Recipe
from fimaq_core.reconstruction.mlp import mlps
from fimaq_core.samples import Samples
from tasks.common.plan import part_address, resolved
from tasks.common.request import CellRequest, ModelRequest
from tasks.common.task import CalibrationSet, Chains, LoadedModel, Task


@dataclass(frozen=True)
class Part:
    """One chain of a model, and all that it is calibrated and reconstructed with. Most models have one part.

    Attributes:
        name: of the part; empty where the model is one chain.
        chain: on its device, its MLPs reconstructed if the recipe says so.
        inputs: (n, ...) calibration inputs of the chain.
        recipe: the run's, its scope this part alone: what it does to others does not bear on it, so runs with other scopes share
            the part.
        divergence: behind its Fisher passes.
        fingerprint: what its checkpoints belong to.
        teacher: the chain as it was before its MLPs were reconstructed; else None.
        reused: whether its reconstructed MLPs came from a checkpoint.
    """

    name: str
    chain: BlockChain
    inputs: Samples
    recipe: Recipe
    divergence: Divergence
    fingerprint: Fingerprint
    teacher: BlockChain | None = None
    reused: bool = False

    @property
    def address(self) -> str:
        """What tells its checkpoints from those of other parts, and of other scopes within it."""
        return part_address(self.name, self.recipe.scope)

    def stage(self, name: str) -> str:
        """Name of a stage of this part, for people and records."""
        return f"{name} {self.name}" if self.name else name


def fingerprint_of(model: ModelRequest, loaded: LoadedModel, images: CalibrationSet, recipe: Recipe) -> Fingerprint:
    """What a checkpoint of this run belongs to."""
    return Fingerprint(model=built_model(model, loaded), weights=loaded.sha256, calibration=images.fingerprint, recipe=recipe)


def built_model(model: ModelRequest, loaded: LoadedModel) -> str:
    """The architecture and its arguments: weights of one file may fit several, which compute different things."""
    arguments = json.dumps(model.model_args, sort_keys=True) if model.model_args else ""
    return f"{loaded.tag}{arguments}"


def checkpoint_facts(task: str, model: ModelRequest, loaded: LoadedModel) -> dict[str, object]:
    """What a checkpoint says of itself, so that a later stage can build its model."""
    given = {"weights_entry": model.weights_entry, "preprocessing": model.preprocessing}
    return {
        **{"task": task, "model": model.name, "model_args": model.model_args, "tag": loaded.tag},
        **{name: value for name, value in given.items() if value},
    }


def check_request(request: CellRequest) -> CellRequest:
    """The request with its scope spelled out.

    Raises:
        RecipeError: the task has no such scope or evaluation, or an ``mlp_checkpoint`` is given that the recipe has no use for.
    """
    request = resolved(request)
    recipe = request.recipe
    if request.mlp_checkpoint is not None and (recipe is None or not recipe.reconstruct_mlp):
        method = "fp" if recipe is None else recipe.method
        raise RecipeError(
            f"The recipe of '{method}' has no MLP reconstruction, so --mlp-checkpoint is not used: "
            "give --reconstruct-mlp too, or take method aphq."
        )
    return request


def whole(chains: Chains) -> nn.Module:
    """What a checkpoint of a whole model holds: its one chain, or all of them by name."""
    return chains[""] if list(chains) == [""] else nn.ModuleDict(chains)


def all_segments(chains: Chains) -> list[Segment]:
    """The segments of all chains in order."""
    return [segment for chain in chains.values() for segment in chain]


def make_parts(
    task: Task,
    model: ModelRequest,
    loaded: LoadedModel,
    images: CalibrationSet,
    recipe: Recipe,
    device: torch.device,
    batch_size: int,
) -> list[Part]:
    """Build the chains, as the float model is."""
    # Before the chains take the float model over: a part's divergence or inputs may need the outputs of another.
    divergences = task.divergences(loaded, images, recipe, device, batch_size)
    inputs = task.inputs(loaded, images, recipe, device)
    parts = []
    for name, chain in task.chains(loaded, recipe).items():
        own = recipe.model_copy(update={"scope": task.part_scope(name, recipe)}) if name else recipe
        mark = fingerprint_of(model, loaded, images, own)
        parts.append(Part(name, chain.to(device), inputs[name], own, divergences[name], mark))
    return parts


def start(
    request: CellRequest,
    task: Task,
    loaded: LoadedModel,
    images: CalibrationSet,
    device: torch.device,
    resources: Resources,
    path: Callable[[Part], Path | None] = lambda part: None,
    alone: Callable[[Path | None], AbstractContextManager[object]] = nullcontext,
) -> list[Part]:
    """Build the chains and reconstruct their MLPs, or load them.

    Args:
        request: checked, with a recipe; its ``mlp_checkpoint``, where given, must be of the same run.
        images: the calibration set.
        path: where the reconstructed MLPs of a part are kept and looked for; None keeps nothing.
        alone: keeps other processes from making the same file, where these may.

    Raises:
        CheckpointError: ``mlp_checkpoint`` is missing or of another run.
    """
    recipe = request.recipe
    assert recipe is not None
    parts = make_parts(task, request.model, loaded, images, recipe, device, resources.batch_size)
    if not recipe.reconstruct_mlp:
        return parts
    if request.mlp_checkpoint is not None:
        mark = fingerprint_of(request.model, loaded, images, recipe)
        load_mlps(all_segments(chains_of(parts)), request.mlp_checkpoint, mark)
        teachers: Chains = {}
        if recipe.reconstruct:
            teachers = task.chains(task.load(request.model), recipe)
        return [replace(part, teacher=teachers[part.name].to(device) if teachers else None, reused=True) for part in parts]
    facts = checkpoint_facts(request.task, request.model, loaded)
    ready = []
    with_mlps = [part.name for part in parts if len(mlps(part.chain))]
    for part in parts:
        if with_mlps and part.name not in with_mlps:
            ready.append(part)
            continue
        file = path(part)
        with alone(file):
            teacher, reused = reconstruct_mlps_or_load(
                part.chain, part.inputs, part.recipe, part.divergence, resources, file, part.fingerprint, facts
            )
        ready.append(replace(part, teacher=teacher, reused=reused))
    return ready


def chains_of(parts: list[Part]) -> Chains:
    """The chains by name."""
    return {part.name: part.chain for part in parts}
