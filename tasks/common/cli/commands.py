"""Commands of a task: ``run``, each stage alone, and facts about models."""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from fimaq_core.errors import RecipeError
from fimaq_core.progress import progress_bars
from fimaq_core.recipe import Recipe
from tasks.common.cli import options, process
from tasks.common.cli.options import TaskOptions
from tasks.common.request import CellRequest

_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}
_checkpoint = click.argument("checkpoint", type=options.PATH)


def build_group(task: str, summary: str, own: TaskOptions = TaskOptions()) -> click.Group:
    """Return the commands of a task. A command imports its libraries only when it runs."""

    @click.group(cls=process.Commands, help=summary, context_settings=_SETTINGS)
    @process.verbose
    def group() -> None:
        process.show_log(logging.ERROR)  # libraries for models warn about much that is as it should

    @group.command(cls=options.GroupedCommand)
    @options.model(own)
    @options.mlp_checkpoint
    @options.recipe(own)
    @click.option("--variant", help="Name of this variant of the method in tables.")
    @click.option("--results", default="results/runs", type=options.PATH, help="Folder of records.")
    @click.option("--force", is_flag=True, help="First remove the cell's own and shared files.")
    def run(force: bool, **given: Any) -> None:
        """Calibrate, reconstruct and evaluate one model; write a result record."""
        from tasks.common.cell.environment import resolve_device
        from tasks.common.cell.identity import forget, resolved
        from tasks.common.cell.run import run_cell

        recipe = options.take_recipe(task, given)
        request = resolved(options.cell_request(task, given, recipe))
        if force:
            resolve_device(request.device)  # a run that cannot start must remove nothing
            forget([request])
        with progress_bars() as on_progress:
            path = run_cell(request, on_progress)
        _echo_record(path)

    @group.command(cls=options.GroupedCommand)
    @options.model(own)
    @options.recipe(own)
    @options.out
    def reconstruct_mlp(out: Path, **given: Any) -> None:
        """Reconstruct only the MLPs with ReLU, the first stage of APHQ-ViT; write a checkpoint."""
        _first_stage(task, "mlp_stage", out, given)
        click.echo(f"checkpoint of reconstructed MLPs: {out}")

    @group.command(cls=options.GroupedCommand)
    @options.model(own)
    @options.mlp_checkpoint
    @options.recipe(own)
    @options.out
    def calibrate(out: Path, **given: Any) -> None:
        """Find only the ranges; write a checkpoint."""
        _first_stage(task, "calibrate_stage", out, given)
        click.echo(f"calibrated checkpoint: {out}")

    @group.command(cls=options.GroupedCommand)
    @_checkpoint
    @options.run(own)
    @options.weights()
    @options.recipe(own)
    @options.out
    def reconstruct(checkpoint: Path, out: Path, **given: Any) -> None:
        """Reconstruct the calibrated CHECKPOINT; continue where an earlier call stopped.

        Recipe options apply to reconstruction. Options of ranges must equal the checkpoint's.
        """
        from tasks.common.cell.stages import reconstruct_stage

        changes = options.given_recipe(given)
        request = options.cell_request(task, given)
        _next_stage(reconstruct_stage, request, checkpoint, out, changes)
        click.echo(f"reconstructed checkpoint: {out}")

    @group.command(cls=options.GroupedCommand)
    @_checkpoint
    @options.run(own)
    @options.weights()
    @options.finishing()
    @options.out
    def finish(checkpoint: Path, out: Path, **given: Any) -> None:
        """Train norms, biases and scales of the quantized CHECKPOINT through the whole model.

        The codes of the weights stay. Without options, the recipe in CHECKPOINT decides.
        """
        from tasks.common.cell.finishing import finish_stage

        changes = options.given_fields(given)
        request = options.cell_request(task, given)
        _next_stage(finish_stage, request, checkpoint, out, changes)
        click.echo(f"finished checkpoint: {out}")

    @group.command()
    @_checkpoint
    @options.data(own)
    @options.weights()
    @options.export(own)
    def export(checkpoint: Path, out: Path, **given: Any) -> None:
        """Write the quantized CHECKPOINT as an ONNX file that computes with integers; check it.

        Each layer gets equal inputs in the file and in the simulated model, and must have equal
        codes, except next to a rounding tie. No file is written if the check fails.
        """
        from tasks.common.cell.export import ExportForm, export_stage

        part = given.pop("part", None)
        form = ExportForm(**{field.name: given.pop(field.name) for field in fields(ExportForm)})
        request = options.cell_request(task, given)
        with progress_bars() as on_progress:
            (report,) = export_stage(request, checkpoint, out, form, on_progress, part=part)
        _echo(report.lines())

    @group.command()
    @_checkpoint
    @options.run(own)
    @options.weights()
    @click.option(
        "--results",
        default="results/runs",
        type=options.PATH,
        help="Folder of records, for ONNX files.",
    )
    def evaluate(checkpoint: Path, results: Path, **given: Any) -> None:
        """Evaluate CHECKPOINT of any stage, or an exported ONNX file, which gets a record.

        Reconstructed MLPs alone run in full precision.
        """
        if checkpoint.suffix.lower() == ".onnx":
            from tasks.common.cell.run import evaluate_file

            request = options.cell_request(task, {**given, "results": results})
            with progress_bars() as on_progress:
                path = evaluate_file(request, checkpoint, on_progress)
            _echo_record(path)
            return
        from tasks.common.cell.stages import evaluate_stage

        with progress_bars() as on_progress:
            found = evaluate_stage(options.cell_request(task, given), checkpoint, on_progress)
        for name, metric in found.metrics.items():
            click.echo(f"{name} {metric.value:.2f} ± {metric.stderr:.2f} (n = {found.n})")
        _echo(f"note: {note}" for note in found.notes)
        _echo(f"skipped: {sample}" for sample in found.skipped)

    @group.command()
    @_checkpoint
    @click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
    @options.weights()
    def inspect(checkpoint: Path, as_json: bool, **given: Any) -> None:
        """Show layers, sizes, bit operations and origin of CHECKPOINT of any stage."""
        from tasks.common.cell.stages import inspect_stage

        found = inspect_stage(options.cell_request(task, given), checkpoint)
        click.echo(json.dumps(found.content(), indent=1) if as_json else found.text())

    @group.command(cls=options.GroupedCommand)
    @click.argument("target", metavar="CHECKPOINT|MODEL")
    @options.sensitivity()
    @options.named_model(own)
    @options.mlp_checkpoint
    @options.recipe(own)
    def sensitivity(target: str, as_json: Path | None, **given: Any) -> None:
        """Rank layers by the divergence that quantizing each alone causes; suggest mixed bits.

        A CHECKPOINT has its own recipe and ranges. A MODEL, given by its name, is calibrated first.
        The float model's own outputs are the reference, on calibration images.
        """
        from tasks.common.cell.sensitivity import Budget, sensitivity_stage

        bits_file = given.pop("write_bits_map")
        limits = {name: given.pop(name) for name in ("mean_bits", "bops", "widths")}
        wanted = bits_file or limits["mean_bits"] or limits["bops"]
        budget = Budget(**limits) if wanted else None
        images, checkpoint = given.pop("images"), _checkpoint_of(target)
        if checkpoint is None:
            recipe = _quantizing(task, given)
        elif changed := options.given_recipe(given):
            raise RecipeError(f"{target} has its own recipe: leave {', '.join(changed)} out.")
        else:
            recipe = None
        request = options.cell_request(
            task, {**given, "name": "" if checkpoint else target}, recipe
        )
        with progress_bars() as on_progress:
            found = sensitivity_stage(
                request, checkpoint, images=images, budget=budget, on_progress=on_progress
            )
        click.echo(found.text())
        if as_json is not None:
            found.write(as_json)
            click.echo(f"facts: {as_json}")
        if bits_file is not None and found.suggestion is not None:
            found.suggestion.write(bits_file)
            click.echo(f"bits map: {bits_file}")

    @group.command()
    def models() -> None:
        """List short names and demo models."""
        from tasks.common.registry import get_task

        found = get_task(task)
        names = {**found.tags.SHORT_NAMES, **dict.fromkeys(found.tags.DEMO_NAMES, found.demo)}
        width = max(14, *map(len, names))
        for name, meaning in names.items():
            click.echo(f"{name:{width}s} {meaning}")

    return group


def _echo(lines: Iterable[str]) -> None:
    for line in lines:
        click.echo(line)


def _echo_record(path: Path) -> None:
    """Print metrics and notes of a record."""
    from tasks.common.record import read_record

    record = read_record(path)
    for name, metric in record.metrics.items():
        full = record.fp_metrics.get(name)
        compared = "" if full is None else f", full precision {full.value:.2f}"
        click.echo(
            f"{record.model} {record.method} {name} {metric.value:.2f} ± {metric.stderr:.2f} "
            f"(n = {record.n}{compared})"
        )
    if record.fidelity:
        figures = (f"{name} {one.value:.3g}" for name, one in record.fidelity.items())
        click.echo(f"fidelity to full precision: {', '.join(figures)}")
    _echo(record.weights.notes())
    if record.preprocessing is not None:
        click.echo(f"preprocessing: {record.preprocessing.text()}")
    _echo(f"note: {note}" for note in record.notes)
    click.echo(f"record: {path}")


def _first_stage(task: str, stage: str, out: Path, given: dict[str, Any]) -> None:
    """Run a stage that starts from the float model, and print its notes."""
    from tasks.common.cell import stages

    request = options.cell_request(task, given, _quantizing(task, given))
    with progress_bars() as on_progress:
        notes = getattr(stages, stage)(request, out, on_progress)
    _echo(f"note: {note}" for note in notes)


def _quantizing(task: str, given: dict[str, Any]) -> Recipe:
    """Remove the recipe options from ``given`` and return their recipe."""
    recipe = options.take_recipe(task, given)
    if recipe is None:
        raise RecipeError("Method 'fp' has no stages: use run.")
    return recipe


def _checkpoint_of(target: str) -> Path | None:
    """Return the path of a checkpoint; None for the name of a model."""
    path = Path(target)
    return path if path.suffix == ".safetensors" or path.is_file() else None


def _next_stage(
    stage: Callable[..., list[str]],
    request: CellRequest,
    checkpoint: Path,
    out: Path,
    changes: dict[str, Any],
) -> None:
    """Run a stage that starts from ``checkpoint``, and print its notes."""
    with progress_bars() as on_progress:
        notes = stage(request, checkpoint, out, changes, on_progress)
    _echo(f"note: {note}" for note in notes)


def main(group: click.Group, arguments: list[str] | None = None) -> None:
    """Run a command group, see `process.run`."""
    process.run(group, arguments)
