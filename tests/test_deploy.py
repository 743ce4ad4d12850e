"""docs/deploy.md: its script prepares photos as timm does, and classifies as the harness does."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_onnx import small_onnx, written
from timm.data import create_transform
from torchvision.transforms import Grayscale

from fimaq_core import quantize
from fimaq_core.export.check import checked_export
from fimaq_core.export.facts import OnnxFacts
from fimaq_core.export.runtime import OnnxModel
from fimaq_core.export.writing import Normalise
from tasks.classification.demo import digit_pairs
from tasks.classification.task import TASK
from tasks.common.request import ModelRequest

PAGE = Path(__file__).parents[1] / "docs" / "deploy.md"

#: An export that gives its input back.
ECHO = """
<ir_version: 10, opset_import: ["" : 21]>
model (float[n, C, H, W] images) => (float[n, m] logits) { logits = Flatten (images) }
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "classify.py"
    path.write_text(code, encoding="utf-8")
    return path


def _photo(path: Path, width: int, height: int, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, channels), np.uint8)
    image = Image.fromarray(pixels.squeeze())
    image.save(path)
    return image.convert("RGB")


@pytest.mark.parametrize("size", [(90, 61), (47, 120), (80, 80)])
@pytest.mark.parametrize(
    "how",
    [
        {"input_size": (3, 32, 32), "crop_pct": 0.875, "interpolation": "bicubic"},
        {"input_size": (3, 24, 41), "crop_pct": 0.9, "interpolation": "bilinear"},
        {"input_size": (1, 32, 32), "crop_pct": 1.0, "interpolation": "lanczos"},
        {"input_size": (3, 31, 45), "crop_pct": 0.95, "crop_mode": "squash"},
    ],
)
def test_photos_are_prepared_as_timm_does(
    how: dict[str, Any],
    size: tuple[int, int],
    script: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    how = {"crop_mode": "center", "interpolation": "bicubic", "mean": (0.4,), "std": (0.2,)} | how
    how |= {name: how[name] * how["input_size"][0] for name in ("mean", "std")}
    image = _photo(tmp_path / "photo.png", *size)
    image = Grayscale()(image) if how["input_size"][0] == 1 else image
    wanted = create_transform(**how, is_training=False)(image)
    path = written(small_onnx(ECHO, preprocessing=how, class_names=None), tmp_path / "echo.onnx")
    monkeypatch.setattr(sys, "argv", ["classify.py", str(path), str(tmp_path / "photo.png")])
    found = runpy.run_path(str(script))["logits"]
    assert np.allclose(found, wanted.flatten().numpy(), rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_script_classifies_as_the_harness_does(script: Path, tmp_path: Path) -> None:
    """A process that imports nothing of this project classifies the bytes of an image of digits."""
    loaded, data = TASK.load(ModelRequest("demo_vit")), digit_pairs.DigitPairs("test")
    images = torch.stack([loaded.eval_transform(data[index][0]) for index in range(16)])
    few: dict[str, Any] = {"range_candidates": 16, "range_rounds": 1, "progress": False}
    q = quantize(loaded.model, images, method="rtn", w_bits=4, a_bits=4, **few)
    mean, std = [digit_pairs.PIXEL_MEAN], [digit_pairs.PIXEL_STD]
    facts = OnnxFacts(
        model="demo_vit",
        weights_sha256=loaded.sha256,
        recipe=q.recipe.model_dump(mode="json"),
        recipe_digest=q.recipe.digest(),
        preprocessing={"input_size": images.shape[1:], "mean": mean, "std": std},
        class_names=data.classes,
        normalised=False,
        layers=[],
    )
    path = tmp_path / "model.onnx"
    checked_export(q.chain, images, path, facts, normalise=(mean, std))
    with torch.no_grad():
        simulated = q(images).softmax(1).max(1)
    surest = int(simulated.values.argmax())
    data[surest][0].save(tmp_path / "photo.png")
    clean = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0]);"
        "assert not {'torch', 'timm', 'onnx', 'fimaq_core', 'tasks'} & set(sys.modules)"
    )
    command = [sys.executable, "-I", "-c", clean, script, path, tmp_path / "photo.png"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split(": ") for line in done.stdout.splitlines()]
    assert len(lines) == 5
    assert lines[0][0] == data.classes[int(simulated.indices[surest])]
    pixels = Normalise(mean, std).undo(images[surest : surest + 1])
    shares = OnnxModel(path)(pixels).softmax(1)[0]
    found = {name: float(share) for name, share in lines}
    wanted = {data.classes[label]: float(shares[label]) for label in shares.topk(5).indices}
    assert found == pytest.approx(wanted, abs=1e-3)
