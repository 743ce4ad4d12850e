"""``python -m benchmarks.real_size``: a model of published size with random weights, quantized from end to end.

It says whether the whole way holds at that size: the chains equal the library's model, and calibration and reconstruction end
within the time and memory that they show; it fails where they do not. The accuracy of random weights says nothing, so none is
measured. The defaults are small enough for two CPU cores: products of matrices take the time, in proportion to the samples of a
step and of a Fisher pass.
"""

import json
import time
from pathlib import Path

import click
import torch

from benchmarks.real_size import measure, subjects
from fimaq_core.progress import Progress
from fimaq_core.recipe import make_recipe
from tasks.common.environment import resolve_device
from tasks.common.registry import defaults

#: Of full-precision outputs here from the library's, over their root mean square.
LARGEST_DIFFERENCE = 1e-5


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="ViT-B-32", show_default=True, help="open_clip's name of a model, or a detector's short name.")
@click.option("--method", default="fimaq", show_default=True)
@click.option("--w-bits", default=4, show_default=True)
@click.option("--a-bits", default=4, show_default=True)
@click.option("--steps", type=int, help="Optimisation steps a block.  [CLIP 50, detectors 20]")
@click.option("--images", type=int, help="Calibration images, and pairs a batch of CLIP's divergence.  [16; 1]")
@click.option("--batch-size", type=int, help="Images a step.  [4; 1]")
@click.option("--range-candidates", type=int, help="Candidates a search of ranges.  [64; 128]")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--minutes", type=float, help="It may take so long.  [10; 20]")
@click.option("--output", type=click.Path(path_type=Path), help="JSON file that keeps the figures by model.")
def main(
    model: str, method: str, w_bits: int, a_bits: int, steps: int | None, images: int | None, batch_size: int | None,
    range_candidates: int | None, device: str, threads: int | None, minutes: float | None, output: Path | None,
) -> None:  # fmt: skip
    """Quantize a model of published size with random weights; print what it took."""
    if threads is not None:
        torch.set_num_threads(threads)
    subject = subjects.subject_of(model)
    given = {"steps": steps, "batch_size": batch_size, "range_candidates": range_candidates}
    if images is not None:
        given |= {"calibration_images": images, "range_images": images}
        given |= {"divergence_batch": images} if subject.task == "retrieval" else {}
    given = {name: value for name, value in given.items() if value is not None}
    bits = {"w_bits": w_bits, "a_bits": a_bits}
    recipe = make_recipe(method, defaults(subject.task), subject.fields, bits, given)
    figures = measure.measure(model, subject, recipe, resolve_device(device), _Lines())
    click.echo(json.dumps(figures, indent=1))
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        kept = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
        output.write_text(json.dumps({**kept, figures["model"]: figures}, indent=1) + "\n", encoding="utf-8")
    largest, allowed = max(figures["largest_difference"].values()), 60 * (subject.minutes if minutes is None else minutes)
    if largest > LARGEST_DIFFERENCE or figures["seconds"]["all"] > allowed:
        raise click.ClickException(
            f"differences up to {largest:.1e} (allowed: {LARGEST_DIFFERENCE:.0e}), {figures['seconds']['all']:.0f} s "
            f"(allowed: {allowed:.0f} s)"
        )


class _Lines:
    """Progress as a line every ten seconds: the way is long."""

    def __init__(self) -> None:
        self._spoke = 0.0

    def __call__(self, event: Progress) -> None:
        if time.monotonic() - self._spoke > 10:
            self._spoke = time.monotonic()
            loss = "" if event.loss is None else f" loss {event.loss:.4g}"
            click.echo(f"{event.stage} {event.block} {event.done}/{event.total}{loss}", err=True)


if __name__ == "__main__":
    main()
