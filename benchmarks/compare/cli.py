"""``python -m benchmarks compare RUN_A RUN_B``."""

from pathlib import Path

import click


@click.command()
@click.argument("run_a", type=click.Path(path_type=Path))
@click.argument("run_b", type=click.Path(path_type=Path))
@click.option(
    "--metric", default="", help="These metrics, such as top1 or R@1,i2t_R@5; by default all of one pair, the main ones of many."
)
@click.option(
    "--level", type=click.FloatRange(0.5, 0.9999), default=0.95, show_default=True,
    help="Of the confidence intervals; a difference is shown where p is below 1 - level.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def compare(run_a: Path, run_b: Path, metric: str, level: float, as_json: bool) -> None:
    """Test whether two runs differ, sample by sample.

    A RUN is a cell's folder, its result.json, or a folder that holds several records, such as a method's. Records are paired that
    share task, data, model, bits, seed and scope; also method and variant where a side has several of these. Full precision,
    which has no bits, is compared with whatever is on the other side.

    Exit codes: 0 compared, whatever came out; 2 cannot compare.
    """
    from benchmarks.compare.judge import judge
    from benchmarks.compare.sides import pair_up, read_side
    from benchmarks.compare.text import json_text, report

    pairing = pair_up(read_side(run_a), read_side(run_b))
    wanted = tuple(dict.fromkeys(name.strip() for name in metric.split(",") if name.strip()))
    judged = judge(pairing, level, wanted)
    click.echo(json_text(pairing, judged, level) if as_json else report(pairing, judged, level))
