"""``python -m benchmarks.real_size``: a model of published size with random weights, quantized from end to end.

It says whether the whole way holds at that size: the chains equal the library's model, and calibration and reconstruction end
within the time and memory that they show; it fails where they do not. The accuracy of random weights says nothing, so none is
measured. The defaults are small enough for two CPU cores: products of matrices take the time, in proportion to the pairs of a
step and of a Fisher pass.
"""

import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from fimaq_core.fisher.divergence import Divergence
from fimaq_core.progress import Progress
from fimaq_core.quantize import Resources, calibrate_or_load, finish, reconstruct_with_checkpoints
from fimaq_core.recipe import Recipe, make_recipe
from tasks.common.environment import describe, peak_memory, resolve_device
from tasks.common.prepare import make_parts
from tasks.common.request import ModelRequest
from tasks.common.task import CalibrationSet, LoadedModel

#: Of full-precision embeddings here from the library's, over their root mean square.
LARGEST_DIFFERENCE = 1e-5

_TEXT = "a photo of two red dogs on the green grass beside an old wooden table with some bread"


def random_clip(name: str, pairs: int) -> tuple[LoadedModel, CalibrationSet]:
    """An open_clip model with random weights, and random images and captions of its sizes; the same every time."""
    import open_clip

    from tasks.retrieval.tags import full_name
    from tasks.retrieval.tokenizers import build_tokenizer

    torch.manual_seed(0)
    architecture = full_name(name).partition(".")[0]
    model: Any = open_clip.create_model(architecture, pretrained=None).eval()
    height, width = model.visual.image_size if isinstance(model.visual.image_size, tuple) else (model.visual.image_size,) * 2
    text = open_clip.get_model_config(architecture)["text_cfg"]
    tokenizer = build_tokenizer(architecture, text, None, int(open_clip.get_model_tokenize_cfg(model)["vocab_size"]))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(pairs, 3, height, width, generator=generator)
    lengths = torch.randint(4, 16, (pairs,), generator=generator).tolist()
    words = _TEXT.split()
    order = torch.randint(0, len(words), (pairs, 16), generator=generator).tolist()
    captions = [" ".join(words[index] for index in row[:length]) for row, length in zip(order, lengths, strict=True)]
    inputs = {"vision": images, "text": tokenizer(captions)}
    loaded = LoadedModel(
        model, f"{architecture}.random", "random", "0" * 64, 0, nn.Identity(), nn.Identity(), tokenizer=tokenizer,
        context_length=tokenizer.context_length,
    )  # fmt: skip
    return loaded, CalibrationSet(images, [str(index) for index in range(pairs)], "random", "0" * 64, inputs=inputs)


@torch.no_grad()
def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two sets of embeddings (n, d), over the root mean square of the expected ones."""
    return float((found - expected).abs().max() / expected.square().mean().sqrt())


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", default="ViT-B-32", show_default=True, help="open_clip's name of a model (task retrieval).")
@click.option("--method", default="fimaq", show_default=True)
@click.option("--w-bits", default=4, show_default=True)
@click.option("--a-bits", default=4, show_default=True)
@click.option("--steps", default=50, show_default=True, help="Optimisation steps a block.")
@click.option("--images", default=16, show_default=True, help="Calibration pairs, and pairs a batch of the divergence.")
@click.option("--batch-size", default=4, show_default=True, help="Pairs a step.")
@click.option("--range-candidates", default=64, show_default=True, help="Candidates a search of ranges.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--threads", type=int, help="CPU threads.")
@click.option("--minutes", default=10.0, show_default=True, help="It may take so long.")
@click.option("--output", type=click.Path(path_type=Path), help="Where the figures go as JSON, beside being printed.")
def main(
    model: str, method: str, w_bits: int, a_bits: int, steps: int, images: int, batch_size: int, range_candidates: int,
    device: str, threads: int | None, minutes: float, output: Path | None,
) -> None:  # fmt: skip
    """Quantize both towers of a CLIP model of published size with random weights; print what it took."""
    if threads is not None:
        torch.set_num_threads(threads)
    where = resolve_device(device)
    recipe = make_recipe(
        method, {"w_bits": w_bits, "a_bits": a_bits, "steps": steps, "calibration_images": images, "range_images": images,
                 "batch_size": batch_size, "range_candidates": range_candidates, "scope": "both", "divergence_batch": images},
    )  # fmt: skip
    figures = measure(model, recipe, where)
    text = json.dumps(figures, indent=1)
    click.echo(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
    largest = max(figures["largest_difference"].values())
    if largest > LARGEST_DIFFERENCE or figures["seconds"]["all"] > 60 * minutes:
        raise click.ClickException(
            f"differences up to {largest:.1e} (allowed: {LARGEST_DIFFERENCE:.0e}), {figures['seconds']['all']:.0f} s "
            f"(allowed: {60 * minutes:.0f} s)"
        )


def measure(name: str, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """Quantize both towers of the model ``name`` and return what it took."""
    from tasks.common.registry import get_task

    task = get_task("retrieval")
    begun = time.monotonic()
    loaded, pairs = random_clip(name, recipe.calibration_images)
    sample = {part: pairs.of(part)[:4].to(device) for part in ("vision", "text")}
    float_model: Any = loaded.model.to(device)
    with torch.no_grad():
        expected = {"vision": float_model.encode_image(sample["vision"]), "text": float_model.encode_text(sample["text"])}
    resources = Resources(report=_Lines())
    parts = make_parts(task, ModelRequest(name), loaded, pairs, recipe, device, resources.batch_size)
    figures: dict[str, Any] = {
        "model": loaded.tag, "method": recipe.method, "bits": recipe.bits_name, "steps": recipe.steps,
        "pairs": recipe.calibration_images, "batch": recipe.batch_size, "candidates": recipe.range_candidates,
        "environment": describe(device).model_dump(mode="json"), "seconds": {"load": round(time.monotonic() - begun, 1)},
        "largest_difference": {}, "cosine": {}, "blocks": {},
    }  # fmt: skip
    for part in parts:
        with torch.no_grad():
            figures["largest_difference"][part.name] = largest_difference(part.chain(sample[part.name]), expected[part.name])
        figures["blocks"][part.name] = len(part.chain)
        start = time.monotonic()
        calibrate_or_load(part.chain, part.inputs, part.recipe, resources)
        figures["seconds"][part.stage("calibrate")] = round(time.monotonic() - start, 1)
        start = time.monotonic()
        if part.recipe.reconstruct:
            divergence: Divergence = part.divergence
            log = reconstruct_with_checkpoints(part.chain, part.inputs, part.recipe, divergence, resources)
            figures["engine"] = log.engine
        finish(part.chain)
        figures["seconds"][part.stage("reconstruct")] = round(time.monotonic() - start, 1)
        with torch.no_grad():
            close = torch.cosine_similarity(part.chain(sample[part.name]), expected[part.name]).mean()
        figures["cosine"][part.name] = float(close)
    figures["seconds"]["all"] = round(time.monotonic() - begun, 1)
    figures["peak_memory_bytes"] = peak_memory(device)
    return figures


class _Lines:
    """Progress as a line every ten seconds: the way is long."""

    def __init__(self) -> None:
        self._spoke = 0.0

    def __call__(self, event: Progress) -> None:
        if time.monotonic() - self._spoke > 10:
            self._spoke = time.monotonic()
            click.echo(f"{event.stage} {event.block} {event.done}/{event.total} {event.detail}", err=True)


if __name__ == "__main__":
    main()
