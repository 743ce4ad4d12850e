"""From a request to the parts that stages take, for ``run`` and the commands of single stages."""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from fimaq_core.chain import Segment
from fimaq_core.checkpoint import Fingerprint, save_checkpoint
from fimaq_core.errors import RecipeError
from fimaq_core.pipeline import load_mlps
from fimaq_core.progress import OnProgress
from fimaq_core.store import Part, Resources
from tasks.common.cell.environment import resolve_device
from tasks.common.cell.identity import resolved
from tasks.common.registry import get_task
from tasks.common.request import CellRequest
from tasks.common.task import CalibrationSet, Chains, Evaluation, LoadedModel, Task


@dataclass
class Prepared:
    """A request with its model and calibration images.

    Attributes:
        request: checked, see :func:`check_request`.
        task: of the request.
        device: where everything runs.
        resources: how stages run.
        loaded: the float model.
        images: the calibration set; None for full precision.
        parts: of the model, filled by :meth:`build`.
    """

    request: CellRequest
    task: Task
    device: torch.device
    resources: Resources
    loaded: LoadedModel
    images: CalibrationSet | None = None
    parts: list[Part] = field(default_factory=list)

    @property
    def built_model(self) -> str:
        """The architecture and its arguments: weights of one file may fit several of them."""
        given = self.request.model.model_args
        return self.loaded.tag + (json.dumps(given, sort_keys=True) if given else "")

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of checkpoints of the whole model."""
        recipe, images = self.request.recipe, self.images
        assert recipe is not None
        assert images is not None
        return Fingerprint(
            model=self.built_model,
            weights=self.loaded.sha256,
            calibration=images.fingerprint,
            recipe=recipe,
        )

    @property
    def facts(self) -> dict[str, object]:
        """Facts in a checkpoint from which a later stage builds the model."""
        model = self.request.model
        given = {"weights_entry": model.weights_entry, "preprocessing": model.preprocessing}
        return {
            **{
                "task": self.request.task,
                "model": model.name,
                "model_args": model.model_args,
                "tag": self.loaded.tag,
            },
            **{name: value for name, value in given.items() if value},
        }

    @property
    def chains(self) -> Chains:
        """The chains by the names of their parts."""
        return {part.name: part.chain for part in self.parts}

    @property
    def notes(self) -> list[str]:
        """Which weights were taken, how images are prepared, and remarks on the images."""
        own = self.loaded.preprocessing
        said = [] if own is None else [f"preprocessing: {own.text()}"]
        return [*self.loaded.weights.notes(), *said, *(self.images.notes if self.images else [])]

    def build(self) -> None:
        """Turn the float model into its parts, with the MLPs of ``mlp_checkpoint`` if it is given.

        Raises:
            CheckpointError: ``mlp_checkpoint`` is missing or of another run.
        """
        task, loaded, images, recipe = self.task, self.loaded, self.images, self.request.recipe
        assert recipe is not None
        assert images is not None
        # First, since chains take the float model over: a part's divergence may need another's outputs.
        divergences = task.divergences(
            loaded, images, recipe, self.device, self.resources.batch_size
        )
        inputs = task.inputs(loaded, images, recipe, self.device)
        for name, chain in task.chains(loaded, recipe).items():
            # A scope that names this part alone lets runs with other scopes share the part's files.
            own = (
                recipe.model_copy(update={"scope": task.part_scope(name, recipe)})
                if name
                else recipe
            )
            mark = self.fingerprint.model_copy(update={"recipe": own})
            self.parts.append(
                Part(
                    chain.to(self.device),
                    inputs[name],
                    own,
                    divergences[name],
                    mark,
                    name,
                    dict(self.facts),
                )
            )
        if self.request.mlp_checkpoint is not None:
            for part in self.parts:
                part.teacher = copy.deepcopy(part.chain)
            load_mlps(all_segments(self.chains), self.request.mlp_checkpoint, self.fingerprint)

    def save(self, path: Path, stage: str) -> None:
        """Write a checkpoint of the whole model after `stage`."""
        save_checkpoint(
            path, whole(self.chains).state_dict(), self.fingerprint, {**self.facts, "stage": stage}
        )

    def evaluate(self, chains: Chains, on_progress: OnProgress) -> Evaluation:
        """Measure the model with `chains` in place of the parts they stand for."""
        request = self.request
        model = self.task.assemble(self.loaded, chains).to(self.device)
        return self.task.evaluate(
            model,
            self.loaded,
            request.data,
            self.device,
            request.eval_batch,
            request.workers,
            on_progress,
        )


def prepare(request: CellRequest, on_progress: OnProgress) -> Prepared:
    """Load the model, and draw the calibration images unless it is to stay in full precision.

    Raises:
        FimaqError: the request makes no sense, or something is missing, damaged or does not fit.
    """
    request = check_request(request)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    device = resolve_device(request.device)
    task = get_task(request.task)
    resources = Resources(on_progress, request.placement, request.eval_batch, request.step_engine)
    cell = Prepared(request, task, device, resources, task.load(request.model))
    if request.recipe is not None:
        cell.images = task.calibration(cell.loaded, request.data, request.recipe)
    return cell


def check_request(request: CellRequest) -> CellRequest:
    """Return the request with its scope spelled out.

    Raises:
        RecipeError: the task has no such scope or evaluation, or the recipe reconstructs no MLPs and
            ``mlp_checkpoint`` is given.
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
    """Return what a checkpoint of a whole model holds: its one chain, or all of them by name."""
    return chains[""] if list(chains) == [""] else nn.ModuleDict(chains)


def all_segments(chains: Chains) -> list[Segment]:
    """Return the segments of all chains in order."""
    return [segment for chain in chains.values() for segment in chain]
