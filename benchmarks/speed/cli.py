"""The command line: ``python -m benchmarks.speed``. Exit codes: 0 done, 2 cannot run, 130 broken off."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.console import user_errors
from fimaq_core.errors import FimaqError

OUTPUT = Path("results/speed.json")


class _Command(click.Command):
    """A command whose user errors are one line on stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        with user_errors(ctx, "Finished models are in the output file."):
            return super().invoke(ctx)


_COUNT = click.IntRange(min=1)
_DTYPE = click.Choice(["float32", "tf32", "bfloat16"])


@click.command(cls=_Command, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:N, or auto: a GPU if there is one.")
@click.option("--models", default="", help="Short names (comma list); real-size models get random weights and images.")
@click.option("--engines", default="", help="eager, fused, compiled, graph (comma list); graph needs CUDA.")
@click.option("--steps", type=_COUNT, help="Steps timed by each engine on one block of every make.")
@click.option("--images", type=_COUNT, help="Images on the tape.")
@click.option("--range-images", type=_COUNT, help="Images for calibration; a quarter of them is timed as well.")
@click.option("--memory-images", type=click.IntRange(min=0), help="Images where peak memory is measured; 0: not measured.")
@click.option("--direct/--no-direct", default=None, help="Time direct candidate search beside the calibration, or not.")
@click.option("--step-dtype", type=_DTYPE, help="Arithmetic of the steps' matrix products.  [default: float32]")
@click.option("--frozen-dtype", type=_DTYPE, help="Arithmetic of the full-precision parts.  [default: float32]")
@click.option("--threads", type=_COUNT, help="CPU threads.  [default: PyTorch's choice]")
@click.option("--budget", type=click.FloatRange(min=0, min_open=True), help="Seconds for all; what does not fit is left out.")
@click.option("--scaling", is_flag=True, help="Also print how time grows with depth, and the Fisher passes' share.")
@click.option("--output", type=click.Path(path_type=Path), default=OUTPUT, show_default=True, help="File of records; added to.")
@click.option("--table", type=click.Path(path_type=Path), help="Measure nothing: put this file's tables into README.md here.")
def main(
    device: str, models: str, engines: str, threads: int | None, budget: float | None, scaling: bool, output: Path,
    table: Path | None, **choices: Any,
) -> None:  # fmt: skip
    """Measure how fast quantization runs here, beside what the machine could do at best.

    Sizes not given depend on device and model, so that all ends within 5 minutes on two CPU cores (demo_vit, vit_small) and
    within 8 minutes on a GPU (vit_small, vit_base, deit_tiny, swin_small, swin_base). Nothing else should run meanwhile.
    """
    from benchmarks.speed.record import read_records
    from benchmarks.speed.table import README, rewrite

    if table is not None:
        records = read_records(table)
        if not records:
            raise FimaqError(f"There are no records in {table}: measure some with --output {table}.")
        rewrite(records)
        click.echo(f"wrote {README}")
        return
    _measure(device, models, engines, threads, budget, scaling, output, choices)


def _measure(
    device: str, models: str, engines: str, threads: int | None, budget: float | None, scaling: bool, output: Path,
    choices: dict[str, Any],
) -> None:  # fmt: skip
    import torch

    from benchmarks.speed import settings
    from benchmarks.speed.floors import measure_rates
    from benchmarks.speed.measure import measure
    from benchmarks.speed.record import read_records, write_record
    from benchmarks.speed.table import tables
    from benchmarks.speed.timing import Budget
    from tasks.common.environment import resolve_device

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = resolve_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    names = settings.parse_models(models, where)
    choices["engines"] = settings.parse_engines(engines, where)
    changes = {name: value for name, value in choices.items() if value is not None}
    read_records(output)  # complain before, not after minutes of work
    start, whole = time.monotonic(), Budget.of(budget or settings.BUDGET[where.type])
    rates = measure_rates(where, changes.get("step_dtype", "float32"))
    click.echo(f"{rates.flops / 1e9:.0f} GFLOP/s in matrix products, {rates.bytes / 1e9:.1f} GB/s in copies")
    done = []
    for name, share in zip(names, settings.budget_shares(names), strict=True):
        chosen = dataclasses.replace(settings.default_settings(name, where), **changes)

        def say(text: str) -> None:
            click.echo(f"[{time.monotonic() - start:4.0f} s] {text}")

        record = measure(name, chosen, rates, where, whole.share(share), say)
        write_record(output, record)
        done.append(record)
    click.echo(f"\n{tables(done, 'simple')}")
    if scaling:
        for record in done:
            parts = [f"{name} {value:.3g}" for name, value in (record.scaling or {}).items()]
            click.echo(f"\n{record.model}: " + (", ".join(parts) or "several makes of blocks, no depth to vary"))
    click.echo(f"\nRecords: {output} ({time.monotonic() - start:.0f} s)")
