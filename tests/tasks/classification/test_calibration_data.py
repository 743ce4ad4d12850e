"""Images of other data to calibrate on: folders, and the kinds that the demo draws."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fimaq_core.errors import DataError
from fimaq_core.recipe import make_recipe
from tasks.classification.data import calibration_set
from tasks.classification.demo import sources
from tasks.classification.demo.digit_pairs import PIXEL_MEAN, PIXEL_STD
from tasks.classification.tags import missing_data
from tasks.classification.task import TASK
from tasks.common.cell.identity import planned_folder
from tasks.common.request import CellRequest, DataRequest, ModelRequest
from tasks.common.task import CalibrationSet, LoadedModel

RECIPE = make_recipe("rtn", {"calibration_images": 6, "calibration_transform": "eval", "seed": 1})


@pytest.fixture(scope="module")
def demo() -> LoadedModel:
    return TASK.load(ModelRequest("demo_vit"))


def calibrated(loaded: LoadedModel, place: str | Path) -> CalibrationSet:
    return calibration_set(loaded, DataRequest(calibration_data=Path(place)), RECIPE)


@pytest.mark.parametrize("kind", sources.KINDS)
def test_each_kind_is_the_same_at_every_draw_and_named(kind: str, demo: LoadedModel) -> None:
    first, second = (calibrated(demo, f"demo:{kind}") for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert (first.dataset, first.split) == (kind, "train")
    assert first.images.shape == (6, 1, 32, 64)
    assert len({image.numpy().tobytes() for image in first.images}) == 6
    assert all(name.startswith(f"{kind}/") for name in first.ids)
    own = calibration_set(demo, DataRequest(), RECIPE)
    assert own.dataset == "digit-pairs"
    assert own.fingerprint != first.fingerprint


def test_noise_has_the_moments_of_clipped_normal_noise() -> None:
    source = sources.calibration_source("noise")
    pixels = np.stack([np.asarray(source.read(index)) for index in range(40)]) / 255
    rng = np.random.default_rng(0)
    expected = rng.normal(PIXEL_MEAN, PIXEL_STD, 200_000).clip(0, 1)
    assert pixels.mean() == pytest.approx(expected.mean() - 0.5 / 255, abs=0.004)
    assert pixels.std() == pytest.approx(expected.std(), abs=0.004)


def test_a_folder_of_images_needs_no_classes(demo: LoadedModel, tmp_path: Path) -> None:
    flat, deep = tmp_path / "flat", tmp_path / "deep"
    for index in range(6):
        image = Image.fromarray(np.full((32, 64), 30 * index, np.uint8))
        for path in (flat / f"{index}.png", deep / f"{index % 2}" / f"{index}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    one, two = calibrated(demo, flat), calibrated(demo, deep)
    assert (one.dataset, one.split) == ("folder-6-images", "all")
    assert sorted(one.ids) == [f"{index}.png" for index in range(6)]
    assert sorted(two.ids) == [f"{index % 2}/{index}.png" for index in (0, 2, 4, 1, 3, 5)]
    assert {image.mean().item() for image in one.images} == {
        image.mean().item() for image in two.images
    }
    (deep / "train").mkdir()
    for name in ("0", "1"):
        (deep / name).rename(deep / "train" / name)
    parts = calibrated(demo, deep)
    assert (parts.dataset, parts.split) == ("folder-2-classes", "train")


def test_wrong_data_has_one_message(demo: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'demo:nois'. Did you mean 'demo:noise'\?"):
        calibrated(demo, "demo:nois")
    with pytest.raises(DataError, match="give a folder of images"):
        calibrated(demo, tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        calibrated(demo, tmp_path / "empty")
    other = DataRequest(tmp_path, calibration_data=Path("demo:noise"))
    loaded = LoadedModel(demo.model, "a.b", "file", "0" * 64, 3, *[demo.eval_transform] * 2)
    with pytest.raises(DataError, match="is for the demo models"):
        calibration_set(loaded, other, RECIPE)
    found = missing_data(DataRequest(calibration_data=tmp_path / "nothing"), brings_data=True)
    assert found is not None
    assert found.what == f"the folder {tmp_path / 'nothing'}"
    assert missing_data(DataRequest(calibration_data=Path("demo:noise")), True) is None


def test_the_source_is_part_of_a_cells_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def folder(source: str | None) -> Path:
        data = DataRequest(calibration_data=None if source is None else Path(source))
        return planned_folder(CellRequest("classification", ModelRequest("demo_vit"), data, RECIPE))

    names = [folder(source) for source in (None, "demo:noise", "demo:photos")]
    assert len({*names}) == 3
    monkeypatch.chdir(tmp_path)  # a drawn source has no place
    assert folder("demo:noise") == names[1]
