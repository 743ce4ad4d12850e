"""The stages of a run one by one, each from checkpoint to checkpoint."""

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fimaq_core.checkpoint import Fingerprint, load_checkpoint, read_header, save_checkpoint
from fimaq_core.errors import CheckpointError, first_problem
from fimaq_core.files import remove
from fimaq_core.layers import set_quantized
from fimaq_core.pipeline import CALIBRATE, MLPS, RECONSTRUCT, load_mlps
from fimaq_core.progress import OnProgress, silent
from fimaq_core.recipe import OFF, Recipe, make_recipe
from fimaq_core.reconstruction.mlp import mlps, use_relu
from fimaq_core.reconstruction.reconstruct import ReconstructionLog
from fimaq_core.store import Address, CheckpointStore, Part, Pieces, Stage
from tasks.common.cell.prepare import Prepared, all_segments, prepare, whole
from tasks.common.models.facts import joined_facts, model_facts
from tasks.common.models.inspection import Inspection
from tasks.common.models.module_map import merge_logs
from tasks.common.preprocessing import GivenPreprocessing, replaced
from tasks.common.registry import defaults, scopes
from tasks.common.request import CellRequest, DataRequest, ModelRequest
from tasks.common.task import Chains, Evaluation

#: Recipe fields of a model without quantizers.
_FULL_PRECISION = {
    "w_bits": OFF,
    "a_bits": OFF,
    "s_bits": None,
    "head_bits": None,
    "patch_input_bits": OFF,
}

#: Names of models: no address such as ``hf-hub:...`` or ``local-dir:...``, no absolute path, no way up.
_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_.+-]+)*")
#: Texts in arguments, such as names of pools: no paths, no addresses, no dotted names of Python's.
_WORD = re.compile(r"[A-Za-z0-9_ +-]*")


def mlp_stage(request: CellRequest, out: Path, on_progress: OnProgress) -> list[str]:
    """Reconstruct the MLPs of a model and write them to ``out``; an ``out`` of the same run is kept.

    Returns:
        Notes on the weights and the calibration images.
    """
    assert request.recipe is not None
    # Merged again, so that fields that do not go with MLP reconstruction are refused now.
    recipe = make_recipe(
        request.recipe.method, request.recipe.model_dump(mode="json"), {"reconstruct_mlp": True}
    )
    cell = prepare(
        replace(request, recipe=recipe, mlp_checkpoint=out if out.is_file() else None), on_progress
    )
    cell.build()
    _run(MLPS, cell, out)
    if not out.is_file():
        tensors = mlps(all_segments(cell.chains)).state_dict()
        save_checkpoint(out, tensors, cell.fingerprint, {**cell.facts, "stage": MLPS.mark})
    _remove_parts(cell, out)
    return cell.notes


def calibrate_stage(request: CellRequest, out: Path, on_progress: OnProgress) -> list[str]:
    """Calibrate a model and write the checkpoint ``out``; an ``out`` of the same run is kept.

    MLPs that are reconstructed on the way are kept beside it.

    Returns:
        Notes on the weights and the calibration images.
    """
    cell = prepare(request, on_progress)
    cell.build()
    _run(MLPS, cell, _beside(out, "mlp"))
    if out.is_file():
        load_checkpoint(out, whole(cell.chains), cell.fingerprint, CALIBRATE.scope)
        return cell.notes
    _run(CALIBRATE, cell, out)
    if not out.is_file():
        cell.save(out, CALIBRATE.mark)
    _remove_parts(cell, out)
    return cell.notes


def _run(stage: Stage, cell: Prepared, out: Path) -> None:
    """Run a stage; each part is kept beside ``out``, or is ``out`` where it is the only one."""

    def address(stage: Stage, part: Part) -> Address:
        return Address.beside(_beside(out, part.name), stage)

    store = CheckpointStore(cell.resources, address)
    for part in filter(stage.wanted, cell.parts):
        store.run(stage, part)


def _remove_parts(cell: Prepared, out: Path) -> None:
    for part in cell.parts:
        if part.name:
            remove(_beside(out, part.name))


def _beside(path: Path, name: str) -> Path:
    """The file beside ``path`` with ``name`` in its name; ``path`` itself for no name."""
    return path.with_name(f"{path.stem}.{name}{path.suffix}") if name else path


def reconstruct_stage(
    task_name: str,
    checkpoint: Path,
    out: Path,
    given: dict[str, Any],
    data: DataRequest,
    options: dict[str, Any],
    on_progress: OnProgress,
) -> ReconstructionLog:
    """Reconstruct a calibrated checkpoint and write ``out``; until then, blocks are kept beside it.

    Args:
        given: recipe fields that replace the checkpoint's.
        options: fields of :class:`CellRequest`, and weights, weights_folder; weights_entry and
            preprocessing replace what the checkpoint was made with.

    Raises:
        CheckpointError: the checkpoint is of another run, or given fields would change its ranges.
    """
    fingerprint, facts = read_origin(checkpoint, task_name)
    if facts["stage"] != CALIBRATE.mark:
        raise CheckpointError(
            f"The checkpoint {checkpoint} is of stage '{facts['stage']}': reconstruct needs a calibrated one."
        )
    recipe = _changed(fingerprint.recipe, given, defaults(task_name))
    cell = prepare(_request(task_name, facts, data, recipe, options), on_progress)
    cell.build()
    if recipe.reconstruct_mlp:
        for part in cell.parts:
            part.teacher = copy.deepcopy(part.chain)
        use_relu(all_segments(cell.chains))
    load_checkpoint(checkpoint, whole(cell.chains), cell.fingerprint, CALIBRATE.scope)

    def address(stage: Stage, part: Part) -> Address:
        return Address.beside(_beside(out, part.name), stage)._replace(file=None)

    store = CheckpointStore(cell.resources, address)
    log = ReconstructionLog(notes=cell.notes)
    for part in cell.parts:
        store.run(RECONSTRUCT, part)
        merge_logs(log, part.name, part.log)
    cell.save(out, RECONSTRUCT.mark)
    for part in cell.parts:
        Pieces(address(RECONSTRUCT, part).pieces, RECONSTRUCT.piece).remove()
    return log


def evaluate_stage(
    task_name: str,
    checkpoint: Path,
    data: DataRequest,
    options: dict[str, Any],
    on_progress: OnProgress,
) -> Evaluation:
    """Evaluate a checkpoint of any stage. ``options`` as in :func:`reconstruct_stage`."""
    fingerprint, facts = read_origin(checkpoint, task_name)
    cell = prepare(_request(task_name, facts, data, None, options), on_progress)
    evaluation = cell.evaluate(_restored(cell, checkpoint, fingerprint, facts), on_progress)
    said = replaced(facts.get("preprocessing", {}), options.get("preprocessing", {}))
    return replace(evaluation, notes=[*cell.notes, *said, *evaluation.notes])


def inspect_stage(task_name: str, checkpoint: Path, options: dict[str, Any]) -> Inspection:
    """Facts about the model in a checkpoint of any stage. Needs float weights (``options``), no data.

    Raises:
        CheckpointError: no checkpoint, of another task, or made from other weights.
        ModelError: the task does not say what images the model takes.
    """
    fingerprint, facts = read_origin(checkpoint, task_name)
    cell = prepare(_request(task_name, facts, DataRequest(), None, options), silent)
    chains = _restored(cell, checkpoint, fingerprint, facts)
    inputs, untouched = (
        cell.task.examples(cell.loaded, chains),
        cell.task.untouched(cell.loaded, chains),
    )
    measured = joined_facts(
        {name: model_facts(chain, inputs[name]) for name, chain in chains.items()}, untouched
    )
    loaded = cell.loaded
    found = (
        loaded.tag,
        facts["stage"],
        fingerprint,
        measured,
        tuple(untouched),
        loaded.entry,
        loaded.preprocessing,
    )
    return Inspection(checkpoint, task_name, *found)


def _restored(
    cell: Prepared, checkpoint: Path, fingerprint: Fingerprint, facts: dict[str, Any]
) -> Chains:
    """The quantized model of a checkpoint; of stage ``mlp`` in full precision, with these MLPs."""
    if fingerprint.weights != cell.loaded.sha256:
        other, own = fingerprint.weights[:12], cell.loaded.sha256[:12]
        raise CheckpointError(
            f"The checkpoint {checkpoint} was made from other weights (sha256 {other}) than those found now ({own})."
        )
    if facts["stage"] == MLPS.mark:
        chains = cell.task.chains(
            cell.loaded, fingerprint.recipe.model_copy(update=_FULL_PRECISION)
        )
        load_mlps(all_segments(chains), checkpoint, None)
        return chains
    chains = cell.task.chains(cell.loaded, fingerprint.recipe)
    if fingerprint.recipe.reconstruct_mlp:
        use_relu(all_segments(chains))
    load_checkpoint(checkpoint, whole(chains), None)
    set_quantized(whole(chains), True)
    return chains


def _changed(recipe: Recipe, given: dict[str, Any], usual: dict[str, Any]) -> Recipe:
    """The checkpoint's recipe with ``given`` fields; a given method replaces all but the ranges' fields.

    Args:
        usual: fields that the task sets for every method alike.
    """
    ranges = {name: getattr(recipe, name) for name in (*recipe.range_fields(), "scope")}
    if given.get("scope", recipe.scope) != recipe.scope:
        raise CheckpointError(
            f"The checkpoint's scope is '{recipe.scope}', not '{given['scope']}': calibrate for that one."
        )
    method = given.get("method")
    kept = ranges if method is not None else recipe.model_dump(mode="json", exclude={"method"})
    return make_recipe(
        method or recipe.method,
        usual,
        kept,
        {name: value for name, value in given.items() if name != "method"},
    )


def _request(
    task: str,
    facts: dict[str, Any],
    data: DataRequest,
    recipe: Recipe | None,
    options: dict[str, Any],
) -> CellRequest:
    """A request for the model of a checkpoint with these ``facts``."""
    more = dict(options)
    model = ModelRequest(
        facts["model"],
        facts["model_args"],
        more.pop("weights"),
        more.pop("weights_folder"),
        more.pop("weights_entry", None) or facts.get("weights_entry"),
        facts.get("preprocessing", {}) | more.pop("preprocessing", {}),
    )
    return CellRequest(task, model, data, recipe, **more)


class _Facts(BaseModel):
    """What a checkpoint says of its model: decides what is built and loaded, and is not trusted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    task: str
    model: str
    model_args: dict[str, Any]
    tag: str
    stage: Literal["mlp", "calibrated", "reconstructed"]
    weights_entry: str | None = None
    preprocessing: GivenPreprocessing = GivenPreprocessing()


def read_origin(path: Path, task: str) -> tuple[Fingerprint, dict[str, Any]]:
    """Read fingerprint and facts of the checkpoint of a whole model.

    Args:
        task: name of the task that it must be of.

    Returns:
        The fingerprint, and ``task``, ``model``, ``model_args``, ``tag``, ``stage``; where they were
        given, ``weights_entry`` and ``preprocessing``.

    Raises:
        CheckpointError: no such checkpoint, one of another task or of a part of a model, or facts that
            would make a library read files, fetch or import something.
    """
    fingerprint, content = read_header(path)
    if content.get("task", task) != task:
        raise CheckpointError(
            f"The checkpoint {path} is of task {content['task']!r}, not {task!r}."
        )
    try:
        facts = _Facts.model_validate(content)
    except ValidationError as error:
        raise CheckpointError(
            f"The checkpoint {path} does not say which model it is of ({first_problem(error)})."
        ) from error
    if not _NAME.fullmatch(facts.model):
        raise CheckpointError(
            f"The checkpoint {path} is of a model {facts.model!r}, which is no name of a model."
        )
    for where, text in _texts(facts.model_args, "model_args"):
        if not _WORD.fullmatch(text):
            raise CheckpointError(
                f"The checkpoint {path} has {text!r} in {where}: a checkpoint may not name files, addresses or modules."
            )
    scope, known = fingerprint.recipe.scope, scopes(task)
    if scope is not None and scope not in known:
        raise CheckpointError(
            f"The checkpoint {path} has the scope {scope!r}, which task '{task}' does not have."
        )
    given = {"weights_entry": facts.weights_entry, "preprocessing": facts.preprocessing.fields()}
    own = facts.model_dump(exclude=set(given))
    return fingerprint, own | {name: value for name, value in given.items() if value}


def _texts(value: object, where: str) -> Iterator[tuple[str, str]]:
    """All texts in a JSON value, keys too, each with where it is."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield where, name
            yield from _texts(item, f"{where}.{name}")
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _texts(item, f"{where}.{number}")
