"""A prepared cell: its model, calibration images and parts, ready for the stages."""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from fimaq_core import NUMERICS_VERSION
from fimaq_core.chain import Segment
from fimaq_core.checkpoint import Fingerprint, save_checkpoint
from fimaq_core.compile_cache import use_own_cache
from fimaq_core.files import is_there, remove_leftovers
from fimaq_core.mixed_bits import apply_bits_map
from fimaq_core.pipeline import load_mlps
from fimaq_core.progress import OnProgress
from fimaq_core.reconstruction.reconstruct import ReconstructionLog
from fimaq_core.store import Address, CheckpointStore, Part, Resources, Stage
from tasks.common.cell.environment import StageClock, resolve_device
from tasks.common.cell.identity import note_shared, resolved, shared_digest
from tasks.common.cell.lease import awaited
from tasks.common.models.module_map import merge_logs
from tasks.common.record import WAIT
from tasks.common.registry import get_task
from tasks.common.request import CellRequest
from tasks.common.task import CalibrationSet, Chains, Evaluation, LoadedModel, Task


@dataclass
class PreparedCell:
    """A cell with its model, its calibration images and the parts of the model.

    :meth:`run` changes the parts stage by stage. :meth:`evaluate` measures the result.
    """

    request: CellRequest  # resolved
    task: Task
    device: torch.device
    resources: Resources  # settings of stages
    clock: StageClock
    loaded: LoadedModel  # the float model
    images: CalibrationSet | None = None  # None for full precision
    parts: list[Part] = field(default_factory=list)  # empty for full precision
    #: sha256 (hex) of the content of each checkpoint written or loaded, by name of the file
    artefacts: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> Fingerprint:
        """Fingerprint of checkpoints of the whole model."""
        given = self.request.model.model_args  # one weights file may fit several architectures
        rest = json.dumps(given, sort_keys=True) if given else ""
        return Fingerprint(
            model=self.loaded.tag + rest + (" features" if self.loaded.head else ""),
            weights=self.loaded.sha256,
            calibration=self.images.fingerprint,
            recipe=self.request.recipe,
        )

    @property
    def facts(self) -> dict[str, object]:
        """Facts for a checkpoint's header, with which later commands load the model."""
        model, task = self.request.model, self.request.task
        own = {"task": task, "model": model.name, "model_args": model.model_args}
        given = {"weights_entry": model.weights_entry, "preprocessing": model.preprocessing}
        given["head"] = model.head
        given = {name: value for name, value in given.items() if value}
        return {**own, "tag": self.loaded.tag, **given}

    @property
    def chains(self) -> Chains:
        """The chain of each part."""
        return {part.name: part.chain for part in self.parts}

    @property
    def log(self) -> ReconstructionLog:
        """One log with the logs of all parts."""
        log = ReconstructionLog()
        for part in self.parts:
            merge_logs(log, part.name, part.log)
        return log

    @property
    def notes(self) -> list[str]:
        """Notes for the user on weights, preprocessing and calibration images."""
        own = self.loaded.preprocessing
        said = [] if own is None else [f"preprocessing: {own.text()}"]
        weights = [*self.loaded.weights.notes(), *self.loaded.notes]
        return [*weights, *said, *(self.images.notes if self.images else [])]

    def keep_teachers(self) -> None:
        """Copy each chain before its MLPs change; reconstruction takes the copy as target."""
        for part in self.parts:
            part.teacher = copy.deepcopy(part.chain)

    def run(self, stages: Iterable[Stage], address: Callable[[Stage, Part], Address]) -> None:
        """Run stages on all parts; a stage with a file at its ``address`` is loaded instead."""
        store = CheckpointStore(self.resources, address, self._alone)
        for stage in stages:
            for part in filter(stage.wanted, self.parts):
                reused = store.run(stage, part)
                if stage.name:
                    self.clock.lap(stage.title(part) + (" (reused)" if reused else ""))

    def shared_file(self, stage: Stage, part: Part) -> Path:
        """Return the shared file of a stage. Equal inputs give equal names."""
        digest = shared_digest(stage.kind, part.name, part.recipe)
        own = self.fingerprint
        inputs = f"{digest}{own.weights}{own.calibration}{NUMERICS_VERSION}{own.model}"
        name = f"{hashlib.sha256(inputs.encode()).hexdigest()[:24]}.safetensors"
        path = self.request.results.parent / stage.kind / name
        note_shared(self.request, stage.kind, digest, path)
        return path

    @contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        """Keep other processes from making ``path``; wait for one that makes it now."""
        if is_there(path):
            yield
            return
        with awaited(path, self.resources.on_progress) as lease:
            remove_leftovers(path.parent, path.name)
            if lease.waited:
                self.clock.lap(WAIT)
            yield

    def save(self, path: Path, module: nn.Module, stage: str) -> None:
        """Write the checkpoint of a ``stage``; ``module`` holds the state of all parts."""
        facts = {**self.facts, "stage": stage}
        sha256 = save_checkpoint(path, module.state_dict(), self.fingerprint, facts)
        self.artefacts[path.name] = sha256

    def evaluate(self, chains: Chains) -> Evaluation:
        """Measure the model with ``chains`` in place of the float parts."""
        model = self.task.assemble(self.loaded, chains).to(self.device)
        how = self.device, self.request.eval_batch, self.request.workers
        data, on_progress = self.request.data, self.resources.on_progress
        return self.task.evaluate(model, self.loaded, data, *how, on_progress)


def prepare(
    request: CellRequest, on_progress: OnProgress, *, measured: bool = False
) -> PreparedCell:
    """Load the model; draw calibration images and build parts if the model is to be quantized.

    ``measured`` makes the parts' divergences also for recipes that do not need them.

    Raises FimaqError if the request is contradictory, or a file is missing, damaged or unsuitable.
    """
    request = resolved(request)
    use_own_cache()  # before the task imports its libraries
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    device = resolve_device(request.device)
    clock, task = StageClock(device), get_task(request.task)
    resources = Resources(on_progress, request.placement, request.eval_batch, request.step_engine)
    cell = PreparedCell(request, task, device, resources, clock, task.load(request.model))
    if request.recipe is not None:
        cell.images = task.calibration(cell.loaded, request.data, request.recipe)
    clock.lap("load")
    if request.recipe is not None:
        cell.parts = _parts(cell, measured)
    if request.mlp_checkpoint is not None:
        cell.keep_teachers()
        path = request.mlp_checkpoint
        # Records take plain names only.
        name = re.sub(r"[^A-Za-z0-9._-]|^\.", "_", path.name)[:200]
        cell.artefacts[name] = load_mlps(all_segments(cell.chains), path, cell.fingerprint)
    return cell


def _parts(cell: PreparedCell, measured: bool) -> list[Part]:
    """Turn the float model into parts."""
    task, loaded, images, recipe = cell.task, cell.loaded, cell.images, cell.request.recipe
    # Chains take over modules of the float model, so its last uses come first.
    needing = recipe.model_copy(update={"reconstruct": True}) if measured else recipe
    divergences = task.divergences(loaded, images, needing, cell.device, cell.resources.batch_size)
    inputs, parts = task.inputs(loaded, images, recipe, cell.device), []
    chains = task.chains(loaded, recipe)
    apply_bits_map(chains, recipe.bits_map)
    for name, chain in chains.items():
        own = recipe
        if name:  # limit the scope to this part, so that runs of other scopes share its files
            own = recipe.model_copy(update={"scope": task.part_scope(name, recipe)})
        mark = cell.fingerprint.model_copy(update={"recipe": own})
        run = chain.to(cell.device), inputs[name], own, divergences[name]
        parts.append(Part(*run, mark, name, cell.facts, artefacts=cell.artefacts))
    return parts


def whole_module(chains: Chains) -> nn.Module:
    """Return one module with all chains, whose state a checkpoint of the whole model holds."""
    return chains[""] if list(chains) == [""] else nn.ModuleDict(chains)


def all_segments(chains: Chains) -> list[Segment]:
    """Return the segments of all chains in order."""
    return [segment for chain in chains.values() for segment in chain]
