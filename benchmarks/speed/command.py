"""The command ``python -m benchmarks.speed``."""

import time
from pathlib import Path

import click
from tabulate import tabulate  # type: ignore[import-untyped, unused-ignore]

from benchmarks.speed.results import SpeedRecord, read_records, tables, write_record
from fimaq_core.errors import FimaqError
from fimaq_core.export import require_export
from tasks.common.cli import numbers, process

#: Default models, and default seconds of a run, by type of device.
MODELS = {"cpu": "demo_vit,vit_small", "cuda": "vit_small,vit_base,deit_tiny,swin_small,swin_base"}
BUDGET = {"cpu": 280.0, "cuda": 450.0}
_HELP = {"help_option_names": ["-h", "--help"], "show_default": True}
_PATH = click.Path(path_type=Path)


@click.command(cls=process.Command, context_settings=_HELP)
@process.verbose
@click.option("--device", default="auto", help="cpu, cuda, cuda:N, or auto: a GPU if there is one.")
@click.option(
    "--models", default="", help="Short names; weights and images of real sizes are random."
)
@click.option("--threads", type=numbers.THREADS, help="CPU threads.")
@click.option(
    "--budget", type=numbers.FiniteRange(1, 1e9), help="Seconds; later measurements are left out."
)
@click.option("--quick", is_flag=True, help="Smallest sizes, to see that the benchmark runs.")
@click.option("--output", type=_PATH, default="results/speed.json", help="File to add records to.")
@click.option(
    "--export", type=_PATH, help="Also measure exports to ONNX, and add records to this file."
)
@click.option("--table", type=_PATH, help="Only print the tables of this file as Markdown.")
def main(
    device: str,
    models: str,
    threads: int | None,
    budget: float | None,
    quick: bool,
    output: Path,
    export: Path | None,
    table: Path | None,
) -> None:
    """Measure how fast quantization runs on this machine, and compare with its limits.

    The default models take at most 5 minutes on two CPU cores and 8 minutes on a GPU. Exports
    always run on the CPU, and take 3 minutes more. Run nothing else meanwhile.
    """
    if table is not None:
        records = read_records(table, SpeedRecord)
        if not records:
            raise FimaqError(f"No records in {table}: measure some with --output {table}.")
        click.echo(tables(records))
        return
    import torch

    from benchmarks.speed.measure import Sizes, default_sizes, measure
    from benchmarks.speed.steps import measure_rates
    from tasks.common.cell.environment import resolve_device

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = resolve_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if where.index is not None:
        torch.cuda.set_device(where)  # timers wait for the current device
    names = [name.strip() for name in (models or MODELS[where.type]).split(",")]
    read_records(output, SpeedRecord)  # reports an unusable file before minutes of work
    if export is not None:
        from benchmarks.speed import export as exports

        require_export()
        read_records(export, exports.ExportRecord)
    start = time.monotonic()
    end = start + (budget or BUDGET[where.type])

    def say(text: str) -> None:
        click.echo(f"[{time.monotonic() - start:4.0f} s] {text}")

    rates = measure_rates(where)
    say(f"products: {rates.flops / 1e9:.0f} GFLOP/s, copies: {rates.bytes / 1e9:.1f} GB/s")
    done = []
    for index, name in enumerate(names):
        sizes = default_sizes(name, where)
        if quick:
            sizes = Sizes(("fused",), steps=2, images=32, range_images=2, memory_images=0)
        now = time.monotonic()
        deadline = now + max(end - now, 0.0) / (len(names) - index)
        done.append(measure(name, sizes, rates, where, deadline, say))
        write_record(output, done[-1])
    click.echo(f"\n{tables(done, 'simple')}\n\nRecords: {output}")
    if export is not None:
        chosen = names if models or quick else exports.MODELS
        rounds = {1: 2} if quick else exports.ROUNDS
        found = []
        for record in exports.measure_exports(chosen, torch.get_num_threads(), say, rounds):
            write_record(export, record)
            found.append(record)
        click.echo(f"\n{tabulate(exports.rows(found), headers='keys')}\n\nRecords: {export}")
