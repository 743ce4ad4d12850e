"""``python -m benchmarks.speed``. Exit codes: 0 done, 2 cannot run, 130 interrupted."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.console import user_errors
from benchmarks.speed.record import README, read_records, rewrite, tables, write_record
from fimaq_core.errors import EngineError, FimaqError, suggest

if TYPE_CHECKING:
    from fimaq_core.numerics import Arithmetic
    from fimaq_core.reconstruction.engines import Engine

#: Models by default, and seconds of a run, by the type of the device.
MODELS = {
    "cpu": "demo_vit,vit_small",
    "cuda": "vit_small,vit_base,deit_tiny,swin_small,swin_base",
}
BUDGET = {"cpu": 280.0, "cuda": 450.0}
_HELP = {"help_option_names": ["-h", "--help"], "show_default": True}
_PATH = click.Path(path_type=Path)
_DTYPE = click.Choice(["float32", "tf32", "bfloat16"])


@click.command(context_settings=_HELP)
@click.option("--device", default="auto", help="cpu, cuda, cuda:N, or auto: a GPU if there is one.")
@click.option("--models", default="", help="Short names; real sizes get random weights and images.")
@click.option("--engines", default="", help="Of eager, fused, compiled, graph (comma list).")
@click.option("--step-dtype", type=_DTYPE, default="float32", help="Of the steps' products.")
@click.option("--frozen-dtype", type=_DTYPE, default="float32", help="Of full-precision parts.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option("--budget", type=click.FloatRange(min=1), help="Seconds; the rest is left out.")
@click.option("--quick", is_flag=True, help="Smallest sizes: only shows that it runs.")
@click.option("--output", type=_PATH, default="results/speed.json", help="File to add records to.")
@click.option("--table", type=_PATH, help="Only put this file's tables into README.md here.")
@click.pass_context
def main(
    context: click.Context,
    device: str,
    models: str,
    engines: str,
    step_dtype: "Arithmetic",
    frozen_dtype: "Arithmetic",
    threads: int | None,
    budget: float | None,
    quick: bool,
    output: Path,
    table: Path | None,
) -> None:
    """Measure how fast quantization runs here, beside the limits of the machine.

    Ends within 5 minutes on two CPU cores and within 8 minutes on a GPU. Nothing else should run
    meanwhile.
    """
    with user_errors(context, "Finished models are in the output file."):
        if table is not None:
            records = read_records(table)
            if not records:
                raise FimaqError(f"No records in {table}: measure some with --output {table}.")
            rewrite(records)
            click.echo(f"wrote {README}")
            return
        import torch

        from benchmarks.speed.measure import default_sizes, measure
        from benchmarks.speed.steps import measure_rates
        from tasks.common.environment import resolve_device

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        where = resolve_device(device)
        chosen = _engines(engines, where.type)
        if threads is not None:
            torch.set_num_threads(threads)
        if where.index is not None:
            torch.cuda.set_device(where)  # timers wait for the current device
        names = [name.strip() for name in (models or MODELS[where.type]).split(",")]
        read_records(output)  # complains before minutes of work, not after them
        start = time.monotonic()
        end = start + (budget or BUDGET[where.type])

        def say(text: str) -> None:
            click.echo(f"[{time.monotonic() - start:4.0f} s] {text}")

        rates = measure_rates(where, step_dtype)
        say(f"products: {rates.flops / 1e9:.0f} GFLOP/s, copies: {rates.bytes / 1e9:.1f} GB/s")
        settings = {"step_dtype": step_dtype, "frozen_dtype": frozen_dtype}
        done = []
        for index, name in enumerate(names):
            sizes = default_sizes(name, where)
            sizes = replace(sizes, engines=chosen or sizes.engines)
            if quick:
                sizes = replace(sizes, steps=2, images=32, range_images=2, memory_images=0)
            now = time.monotonic()
            deadline = now + max(end - now, 0.0) / (len(names) - index)
            done.append(measure(name, sizes, rates, where, settings, deadline, say))
            write_record(output, done[-1])
        click.echo(f"\n{tables(done, 'simple')}\n\nRecords: {output}")


def _engines(text: str, device: str) -> "tuple[Engine, ...]":
    """Return the engines of a comma list, and ``fused``, which stands for those that compile."""
    from fimaq_core.reconstruction.engines import FORMS

    chosen = [name.strip() for name in text.split(",") if name.strip()]
    for name in chosen:
        if name not in FORMS:
            raise EngineError(f"There is no engine '{name}'.{suggest(name, FORMS)}")
    if "graph" in chosen and device != "cuda":
        raise EngineError("The engine 'graph' needs a CUDA device: give --device cuda.")
    return tuple(one for one in FORMS if one in chosen or one == "fused") if chosen else ()
