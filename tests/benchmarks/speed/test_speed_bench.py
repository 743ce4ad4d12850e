"""The speed benchmark: floors, extrapolation, records, and the command at its smallest sizes."""

import json
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchmarks.speed.command import main
from benchmarks.speed.export import ExportRecord, measure_export, rows
from benchmarks.speed.memory import peak_of_block
from benchmarks.speed.results import SpeedRecord, read_records, tables, write_record
from benchmarks.speed.steps import measure_rates, step_bytes
from benchmarks.speed.walk import SegmentTimes, extrapolate, protocol_seconds, walk
from benchmarks.speed.workload import Workload, make_workload
from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.recipe import Recipe, make_recipe
from tasks.common.task import Exportable
from tests.small_models import chain_of, images, quick, swin, vit

CPU = torch.device("cpu")
README = Path(__file__).parents[3] / "benchmarks/speed/README.md"
REQUIRED = {
    "device", "model", "step_ms", "floor_ms", "stages_s", "peak_bytes", "full_protocol_min",
    "published_min", "versions", "date",
}  # fmt: skip


def workload(model: nn.Module, recipe: Recipe, thin: bool = True) -> Workload:
    return make_workload(chain_of(model, recipe), images(recipe.calibration_images), thin=thin)


def test_rates_are_positive_and_floors_follow_from_them() -> None:
    rates = measure_rates(CPU, size=128)
    assert rates.flops > 1e6
    assert rates.bytes > 1e6
    floors = rates.floors_ms(int(rates.flops), int(rates.bytes / 2))
    assert floors == pytest.approx({"arithmetic": 1000, "bytes": 500}, rel=1e-3)


def test_operations_and_bytes_of_a_vit_block_step_are_as_counted_by_hand() -> None:
    """Count a block's products: qkv, projection, two of attention, two of the MLP.

    Each product is taken once forward and twice backward. The loss has two products of its own, by
    the Fisher gradients and by the root of their Gram matrix, once forward and once backward.
    """
    batch, tokens, width, hidden, heads, rank = 8, 17, 32, 64, 2, 2
    recipe = quick("fimaq", range_search="minmax", calibration_images=16, fisher_k=rank, steps=50)
    made = workload(vit(2), recipe)
    calibrate(made.chain, made.images, recipe)
    times = walk(made, recipe, ["fused"], 1, time.monotonic() + 60)
    work = times.steps[made.main]
    weights = width * 3 * width + width * width + 2 * width * hidden
    products = batch * tokens * (weights + 2 * tokens * width)
    loss = batch * (tokens * width * rank + rank * rank)
    assert work.flops == 2 * (3 * products + 2 * loss)
    # Inputs of 4 layers; q, k, v and the attention map.
    quantized = batch * tokens * (3 * width + hidden + 3 * width + heads * tokens)
    assert work.bytes == step_bytes(3 * batch * tokens * width, quantized, weights)
    assert set(times.wall) == {"tape", "fisher", "steps"}
    assert min(segment.tape for segment in times.segments) > 0
    assert min(segment.tail for segment in times.segments) > 0
    own = [segment.own for segment in times.segments]
    assert own[made.structure_of.index(made.main)] is not None
    assert own[-1] is None  # the head has no Fisher passes


def test_segments_of_one_structure_are_measured_once() -> None:
    recipe = quick("fimaq")
    made = workload(vit(3), recipe)
    assert [one.label for one in made.structures] == ["patch_embed", "blocks.0", "head"]
    assert [one.count for one in made.structures] == [1, 3, 1]
    assert made.order == (0, 1, 1, 1, 2)
    assert len(made.chain) == 3
    whole = workload(vit(3), recipe, thin=False)
    assert whole.order == (0, 1, 2, 3, 4)
    assert whole.structure_of == (0, 1, 1, 1, 2)
    windows = make_workload(chain_of(swin(40), recipe), images(2, 40), thin=True)
    assert windows.chain(windows.images).shape == (2, 10)
    assert sum(one.count for one in windows.structures) == len(windows.order)


def test_the_protocol_is_the_sum_of_its_parts() -> None:
    recipe = make_recipe("fimaq", {"steps": 100, "calibration_images": 10, "fisher_k": 2})
    segments = [
        SegmentTimes(calibration=1, tape=0.1, own=0.01, tail=0.02, step=0.001),
        SegmentTimes(calibration=2, tape=0.2, own=0.03, tail=0.04, step=0.002),
        SegmentTimes(calibration=3, tape=0.3, tail=0.05, step=0.003),
    ]
    found = protocol_seconds([0, 1, 1, 2], segments, recipe, compile_s=7.0)
    assert found["calibration"] == pytest.approx(1 + 2 + 2 + 3)
    assert found["tape"] == pytest.approx(10 * (0.1 + 0.2 + 0.2 + 0.3))
    passes = (0.01 + 0.04 + 0.04 + 0.05) + (0.03 + 0.04 + 0.05) + (0.03 + 0.05)
    assert found["fisher"] == pytest.approx(2 * 10 * passes)
    assert found["steps"] == pytest.approx(100 * (0.001 + 0.002 + 0.002 + 0.003))
    assert found["compile"] == 7


def test_calibration_is_extrapolated_along_a_line() -> None:
    assert extrapolate((2, 3.0), (8, 6.0), 128) == pytest.approx(66)
    assert extrapolate((2, 3.0), (8, 2.5), 128) == 2.5  # noise: less time for more images
    assert extrapolate((8, 2.0), (8, 2.0), 16) == 4


def test_the_peak_of_a_block_is_measured() -> None:
    recipe = quick("fimaq", calibration_images=16, batch_size=8)
    assert peak_of_block(chain_of(vit(2), recipe), images(16), recipe) > 0


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """File that the command writes for a demo model at the smallest sizes."""
    path = tmp_path_factory.mktemp("speed") / "speed.json"
    sizes = "--quick --device cpu --models demo_vit"
    before = torch.get_num_threads()
    found = CliRunner().invoke(main, [*sizes.split(), "--threads", "1", "--output", str(path)])
    torch.set_num_threads(before)
    assert found.exit_code == 0, found.output
    assert "demo_vit" in found.output
    return path


def test_the_command_writes_whole_records(records: Path) -> None:
    (content,) = json.loads(records.read_text())
    assert set(content) >= REQUIRED
    assert set(content["stages_s"]) == {"calibration", "tape", "fisher", "steps"}
    assert content["step_ms"].keys() == {"fused"}
    assert content["step_ms"]["fused"] > 0
    assert content["floor_ms"] > 0
    assert content["full_protocol_min"] * 60 == pytest.approx(
        sum(content["full_protocol_s"].values()), rel=1e-3
    )
    assert content["extrapolated"]


def test_the_tables_of_a_file_are_printed(records: Path) -> None:
    found = CliRunner().invoke(main, ["--table", str(records)])
    assert found.exit_code == 0
    assert found.output == f"{tables(read_records(records, SpeedRecord))}\n"
    assert "demo_vit" in found.output


def test_unusable_requests_are_one_line(tmp_path: Path) -> None:
    runner = CliRunner()
    for arguments in (["--device", "cuda:99"], ["--table", str(tmp_path / "none.json")]):
        found = runner.invoke(main, arguments)
        assert found.exit_code == 2
        assert found.output.startswith("error: ")
        assert len(found.output.splitlines()) == 1


def test_tables_of_the_committed_records_are_those_of_the_readme() -> None:
    records = read_records(
        Path(__file__).parents[3] / "results" / "reference" / "speed.json", SpeedRecord
    )
    assert [record.model for record in records] == ["demo_vit", "vit_small"]
    assert tables(records) in README.read_text(encoding="utf-8")


def test_an_export_is_measured_and_recorded(tmp_path: Path) -> None:
    recipe = quick("fimaq", range_search="minmax", calibration_images=4, w_bits=4, a_bits=4)
    chain, samples = chain_of(vit(1), recipe), images(4)
    calibrate(chain, samples, recipe)
    exported = Exportable(chain, samples, lambda logits: logits.argmax(1))
    record = measure_export("tiny", exported, recipe, threads=1, rounds={1: 2, 3: 2})
    assert record.packed_bytes < record.bytes < record.float_bytes
    assert 0.9 * record.quantized_macs < record.integer_macs <= record.quantized_macs < record.macs
    assert list(record.speed) == [1, 3]
    for found in record.speed.values():
        assert 0 < found.low <= found.ratio <= found.high
        assert min(found.float_ms, found.ms) > 0
    path = tmp_path / "export.json"
    write_record(path, record)
    write_record(path, record.model_copy(update={"bytes": record.bytes + 1}))
    (again,) = read_records(path, ExportRecord)
    assert (again.model, again.bytes) == ("tiny", record.bytes + 1)
    (row,) = rows([again])
    assert row["int8"] == f"{again.bytes / again.float_bytes:.2f}"


def test_a_file_of_other_records_is_refused_before_work(tmp_path: Path, records: Path) -> None:
    arguments = ["--device", "cpu", "--output", str(tmp_path / "speed.json")]
    found = CliRunner().invoke(main, [*arguments, "--export", str(records)])
    assert found.exit_code == 2
    assert found.output.startswith(f"error: {records} holds no speed records: move it away.")
    assert not (tmp_path / "speed.json").exists()
