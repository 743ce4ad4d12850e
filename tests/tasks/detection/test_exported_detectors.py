"""Exports of backbone and neck: maps of images of any size, and evaluation with float heads."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from detection_runs import LIMIT, MODEL, Done, cell, command, done, record_of, restored
from small_backbones import OFF_BITS, chain_of, detector, pictures
from small_models import quick
from torch import Tensor, nn

from fimaq_core.errors import ModelError
from fimaq_core.export.opening import open_onnx
from fimaq_core.export.runtime import OnnxModel
from fimaq_core.recipe import Recipe
from fimaq_core.samples import Samples
from tasks.detection.export import LEVELS, check_quantized, padded, scope_of, with_file
from tasks.detection.task import TASK

SCOPE = "backbone+fpn"


class Exported(NamedTuple):
    simulated: Done
    path: Path
    said: list[str]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The demo detector in 4 bits and its file. One export takes long, so all tests share it."""
    folder = tmp_path_factory.mktemp("detector")
    simulated = done(cell(folder, "rtn", scope=SCOPE, w_bits=4, a_bits=4))
    path = folder / "model.onnx"
    form = ("--out", path, "--check-samples", 2, "--no-speed")
    return Exported(simulated, path, command("export", simulated.checkpoint, *form).splitlines())


@pytest.mark.slow
def test_the_report_proves_codes_and_integers(exported: Exported) -> None:
    lines = dict(line.split(": ", 1) for line in exported.said)
    assert "activation codes are equal" in lines["codes"]
    assert lines["integers"].startswith("100.0 % of the multiply-adds with two quantized operands")
    assert f"its record has scope {SCOPE}" in lines["note"]
    facts = open_onnx(exported.path).facts
    assert (facts.part, facts.recipe["scope"], facts.task) == ("detector", SCOPE, "detection")
    assert facts.extra["input"]["pad_size_divisor"] == 32
    assert sum(layer.quantized for layer in facts.layers if layer.kind == "convolution") == 8


@pytest.mark.slow
def test_a_file_takes_images_of_any_size(exported: Exported) -> None:
    """Nearly all values are equal: a code next to a tie may differ, with what follows from it."""
    file, (_, _, model) = OnnxModel(exported.path), restored(exported.simulated)
    for height, width, count in ((64, 160, 1), (128, 96, 3), (224, 64, 1)):
        images = pictures(height, width, count)
        with torch.no_grad():
            wanted = model.extract_feat(images)
        found = file(images)
        assert [one.shape for one in found] == [one.shape for one in wanted]
        for one, other in zip(found, wanted, strict=True):
            assert float((one - other).abs().median()) <= 1e-4 * float(other.std())


@pytest.mark.slow
def test_a_file_is_measured_with_the_float_heads(exported: Exported, tmp_path: Path) -> None:
    said = command("evaluate", exported.path, "--limit", LIMIT, "--results", tmp_path)
    record, simulated = record_of(said).record, exported.simulated.record
    assert (record.variant, record.n) == (f"onnx [{SCOPE}]", LIMIT)
    assert record.metrics.keys() == simulated.metrics.keys()
    assert abs(record.metrics["AP_box"].value - simulated.metrics["AP_box"].value) <= 1
    assert record.exported is not None
    assert record.exported.integer_macs == record.exported.quantized_macs


class _Maps(nn.Module):
    """Stands for a file that gives maps of other numbers of channels."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.new_zeros(1, 5, x.shape[2] // 4, 8) for _ in LEVELS)


def test_maps_that_the_heads_do_not_take_are_refused() -> None:
    with pytest.raises(ModelError, match=r"\(1, 5, 32, 8\).* export the checkpoint again"):
        with_file(TASK.load(MODEL), _Maps())


@pytest.mark.parametrize("scope", ["backbone", "fpn", SCOPE, ""])
def test_the_scope_of_a_file_names_what_is_quantized(scope: str) -> None:
    off: Recipe = quick().model_copy(update=OFF_BITS)
    pieces = ("backbone", "fpn")
    recipes: Mapping[str, Recipe] = {one: quick() if one in scope else off for one in pieces}
    chain = chain_of(detector(), recipes)
    assert scope_of(chain) == scope
    if not scope:
        for one in (chain, None):
            with pytest.raises(ModelError, match="leaves backbone and neck in full precision"):
                check_quantized(one)


def test_images_of_several_sizes_become_one_tensor_of_bounded_size() -> None:
    images = [pictures(64, 32, seed=1), pictures(32, 96, seed=2)]
    found = padded(Samples(images))
    assert found.shape == (2, 3, 64, 96)
    assert torch.equal(found[0, :, :, :32], images[0][0])
    assert torch.equal(found[1, :, :32], images[1][0])
    assert not found[0, :, :, 32:].any()
    assert not found[1, :, 32:].any()
    assert len(padded(Samples([torch.zeros(1, 3, 1024, 1024)] * 3))) == 2
