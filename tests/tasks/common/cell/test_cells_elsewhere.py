"""A cell on other data measures the checkpoint of the cell at home; nothing is calibrated again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fimaq_core.errors import DataError
from fimaq_core.recipe import make_recipe
from tasks.common.cell.identity import cached, forget, planned_folder
from tasks.common.cell.run import run_cell
from tasks.common.record import read_record
from tasks.common.request import CellRequest, DataRequest, ModelRequest

FEW = {"calibration_images": 16, "range_images": 16, "calibration_transform": "eval", "seed": 2}


def request(results: Path, **data: object) -> CellRequest:
    recipe = make_recipe("rtn", {**FEW, "w_bits": 4, "a_bits": 4})
    own = DataRequest(limit=60, **data)
    model = ModelRequest("demo_vit")
    return CellRequest("classification", model, own, recipe, results=results, threads=1)


def files(results: Path, pattern: str) -> set[Path]:
    return set(results.parent.rglob(pattern))


def test_a_corrupted_cell_takes_the_model_of_the_clean_cell(tmp_path: Path) -> None:
    pytest.importorskip("imagecorruptions")
    results = tmp_path / "runs"
    clean, corrupt = request(results), request(results, corrupt="contrast:5")
    path = run_cell(corrupt)
    home = planned_folder(clean)
    own, base = read_record(path), read_record(home / "result.json")
    assert path.parent == planned_folder(corrupt) != home
    assert (own.dataset.name, base.dataset.name) == ("digit-pairs, contrast:5", "digit-pairs")
    for name in ("recipe_digest", "calibration", "modules", "artefacts", "variant", "method"):
        assert getattr(own, name) == getattr(base, name)
    assert own.fp_metrics["top1"].value < base.fp_metrics["top1"].value
    assert files(results, "quantized.safetensors") == {home / "quantized.safetensors"}
    assert len(files(results, "result.json")) == 4
    made = files(results, "quantized.*") | files(results, "calibration/*.safetensors")
    assert len(made) == 2
    run_cell(request(results, corrupt="contrast:1"))
    assert files(results, "quantized.*") | files(results, "calibration/*.safetensors") == made
    assert own.fidelity["kl"].value > 0
    with np.load(path.with_name("outcomes.npz")) as one, np.load(home / "outcomes.npz") as other:
        np.testing.assert_array_equal(one["sample"], other["sample"])
    assert cached(corrupt, path.parent) == []
    forget([corrupt])
    assert not path.exists()
    assert (home / "result.json").exists()


def test_what_is_measured_is_part_of_the_identity(tmp_path: Path) -> None:
    home, here = tmp_path / "imagenet", tmp_path / "r"
    whole = {"path": home, "dataset": f"imagenet-r={here}"}
    requests = [
        request(tmp_path, path=home),
        request(tmp_path, **whole),
        request(tmp_path, path=home, dataset=f"imagenet-a={here}"),
        request(tmp_path, path=home, dataset=f"imagenet-r={home}"),
        request(tmp_path, path=home, corrupt="fog:1"),
        request(tmp_path, path=home, corrupt="fog:2"),
        request(tmp_path, **whole, corrupt="fog:2"),
    ]
    assert len({planned_folder(one) for one in requests}) == len(requests)
    short = request(tmp_path, path=here, dataset="imagenet-r", calibration_data=home)
    assert planned_folder(short) == planned_folder(requests[1])
    # Full precision needs no data folder for a data set of its own.
    plain = [replace(one, recipe=None) for one in (requests[1], short)]
    plain.append(replace(plain[0], data=DataRequest(here, limit=60, dataset="imagenet-r")))
    assert len({planned_folder(one) for one in plain}) == 1
    head = [replace(one, model=ModelRequest("demo_vit", head="knn")) for one in plain]
    assert len({planned_folder(one) for one in head}) == 2


def test_a_data_set_without_a_home_has_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images to calibrate on: give .* --calibration-data"):
        run_cell(request(tmp_path, path=tmp_path, dataset="imagenet-r"))
