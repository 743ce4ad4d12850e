"""Cells of the deepfake task: the demo, and timm models on frames in a folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from benchmarks.results.outcomes import read
from fimaq_core.errors import DataError, ModelError, RecipeError
from fimaq_core.recipe import make_recipe
from tasks.common.cell.run import run_cell
from tasks.common.record import read_record
from tasks.common.registry import originals
from tasks.common.request import CellRequest, DataRequest, ModelRequest
from tasks.deepfake.demo import scenes
from tasks.deepfake.index import CLASSES
from tasks.deepfake.metrics import measures
from tasks.deepfake.tags import TRAINED_ON
from tasks.deepfake.task import TASK

FEW = {"calibration_images": 16, "range_search": "minmax", "calibration_transform": "eval"}
ARGUMENTS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
VIT = "vit_tiny_patch16_224"


def cell(results: Path, model: ModelRequest, data: DataRequest, **changes: object) -> CellRequest:
    recipe = make_recipe("rtn", FEW, {"w_bits": 8, "a_bits": 8, **changes})
    return CellRequest("deepfake", model, data, recipe, results=results, threads=1)


def test_the_demo_goes_through_the_layout(tmp_path: Path) -> None:
    names = scenes.demo_frames("test").source.ids[:16]
    assert names[0] == "test/FF-real/c23/000/000.png"
    frames = scenes.demo_frames("test")
    assert len(frames.source.ids) == 4 * len({*frames.video}) == 1600
    kinds = {name.split("/")[1] for name in frames.source.ids}
    assert kinds == {*scenes.KINDS}
    first, again = (np.asarray(scenes.draw_frame(names[1])) for _ in range(2))
    assert (first == again).all()
    path = run_cell(cell(tmp_path / "runs", ModelRequest("demo_deepfake"), DataRequest()))
    record = read_record(path)
    assert record.fp_metrics["frame_auc"].value > 90
    assert record.fp_metrics["video_auc"].value > record.fp_metrics["frame_auc"].value
    assert record.metrics["frame_auc"].value > 85
    assert (record.n, record.dataset.count) == (400, 400)
    assert record.calibration.dataset == "digit-fakes"
    assert record.calibration.split == "train"
    assert record.fidelity["agreement"].value > 90
    # Frames of a video are alike: the error of a mean over frames is that over videos.
    content = np.load(path.parent / "outcomes.npz")
    kl = content["kl"].reshape(400, 4).astype(float)
    assert (content["cluster"].reshape(400, 4) == np.arange(400)[:, None]).all()
    error = kl.mean(axis=1).std(ddof=1) / 20
    assert record.fidelity["kl"].stderr == pytest.approx(error, rel=1e-4)
    outcomes = read(record, path.parent)
    assert outcomes.clusters == 400
    for name in ("frame_auc", "frame_accuracy"):
        assert outcomes.value(name) == pytest.approx(record.metrics[name].value)
    assert next(iter(outcomes.metrics)) == "frame_auc"
    found = originals("deepfake", ModelRequest("demo_deepfake"), DataRequest(), names[:2])
    assert found[names[1]].size == (48, 48)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with indices, frames and weights of a small ViT."""
    root, rng = tmp_path_factory.mktemp("deepfake"), np.random.default_rng(2)
    sets = {TRAINED_ON: ("FF-real", "FF-DF"), "DFDC": ("DFDC_Real", "DFDC_Fake")}
    for name, labels in sets.items():
        index: dict[str, dict[str, object]] = {}
        for fake, label in enumerate(labels):
            for split in ("train", "test"):
                videos = {}
                for key in ("a", "b", "c"):
                    frames = [f"{name}/{label}/{split}/{key}/{i}.png" for i in range(3)]
                    for frame in frames:
                        file = root / frame
                        file.parent.mkdir(parents=True, exist_ok=True)
                        pixels = rng.integers(0, 100, (40, 40, 3)) + 100 * fake
                        Image.fromarray(pixels.astype(np.uint8)).save(file)
                    videos[key] = {"label": label, "frames": frames}
                whole = {"c23": videos} if name == TRAINED_ON else videos
                index.setdefault(label, {})[split] = whole
        file = root / "dataset_json" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({name: index}))
    save_file(
        timm.create_model(VIT, num_classes=2, **ARGUMENTS).state_dict(), root / "w.safetensors"
    )
    return root


def test_a_backbone_is_measured_on_another_set(place: Path, tmp_path: Path) -> None:
    model = ModelRequest(VIT, ARGUMENTS, place / "w.safetensors")
    data = DataRequest(place, evaluation="DFDC")
    path = run_cell(cell(tmp_path / "runs", model, data, calibration_images=12))
    record = read_record(path)
    assert (record.dataset.name, record.dataset.split) == ("DFDC", "test")
    assert record.calibration.dataset == TRAINED_ON
    assert (record.n, "18 frames of 6 videos" in record.notes) == (6, True)
    assert record.preprocessing.mean == (0.5, 0.5, 0.5)
    content = np.load(path.parent / "outcomes.npz")
    assert (content["label"] == [0] * 9 + [1] * 9).all()
    assert (content["cluster"] == np.repeat(np.arange(6), 3)).all()
    own = measures(np.linspace(0, 1, 18), content["label"] == 1, content["cluster"])
    assert record.metrics.keys() == own.keys()


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    model = ModelRequest(VIT, ARGUMENTS, place / "w.safetensors")
    with pytest.raises(ModelError, match=r"num_classes|do not fit|has 3 classes"):
        TASK.load(ModelRequest(VIT, {**ARGUMENTS, "num_classes": 3}, place / "w.safetensors"))
    loaded = TASK.load(model)
    with pytest.raises(RecipeError, match="--calibration-transform eval"):
        TASK.calibration(loaded, DataRequest(place), make_recipe("rtn"))
    with pytest.raises(DataError, match="needs data: give --data"):
        TASK.calibration(loaded, DataRequest(), make_recipe("rtn", FEW))
    demo = TASK.load(ModelRequest("demo_deepfake"))
    assert demo.classes == len(CLASSES)
    with pytest.raises(DataError, match="leave --eval DFDC out"):
        TASK._open(demo, None, "DFDC", "test")
