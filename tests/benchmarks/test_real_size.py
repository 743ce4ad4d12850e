"""The bench of a model of published size, on a small configuration."""

import json
from pathlib import Path

import open_clip
import pytest
from click.testing import CliRunner

from benchmarks.real_size import __main__ as real_size
from benchmarks.real_size import measure, subjects

SMALL = {
    "embed_dim": 16,
    "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "image_size": 32, "patch_size": 16},
    "text_cfg": {"layers": 1, "width": 32, "heads": 2, "context_length": 20, "vocab_size": 49408},
}
ARGUMENTS = [
    "--model",
    "fimaq-small",
    "--steps",
    "2",
    "--images",
    "8",
    "--batch-size",
    "4",
    "--range-candidates",
    "16",
    "--threads",
    "1",
]


@pytest.fixture
def small(tmp_path: Path) -> None:
    path = tmp_path / "fimaq-small.json"
    path.write_text(json.dumps(SMALL), encoding="utf-8")
    open_clip.add_model_config(path)


def test_it_says_what_it_took(small: None, tmp_path: Path) -> None:
    output = tmp_path / "figures.json"
    done = CliRunner().invoke(real_size.main, [*ARGUMENTS, "--output", str(output)])
    assert done.exit_code == 0, done.output
    (figures,) = json.loads(output.read_text(encoding="utf-8")).values()
    assert set(figures["largest_difference"]) == set(figures["cosine"]) == {"vision", "text"}
    assert max(figures["largest_difference"].values()) < 1e-5
    assert figures["blocks"] == {"vision": 4, "text": 2}
    assert 0.5 < min(figures["cosine"].values()) <= max(figures["cosine"].values()) < 0.99999
    parts = [value for stage, value in figures["seconds"].items() if stage != "all"]
    assert sum(parts) <= figures["seconds"]["all"] + 0.5


def test_it_fails_where_it_takes_too_long(small: None) -> None:
    done = CliRunner().invoke(real_size.main, [*ARGUMENTS, "--minutes", "0.0001"])
    assert done.exit_code == 1
    assert "allowed: 0 s" in done.output


def test_it_fails_where_the_chain_is_not_the_model(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "largest_difference", lambda found, expected: 2e-5)
    done = CliRunner().invoke(real_size.main, ARGUMENTS)
    assert done.exit_code == 1
    assert "2.0e-05 (allowed: 1e-05)" in done.output


def test_a_detector_and_its_heads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tasks.detection import configs

    few = {"embed_dims": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4, "channels": 16}
    small = configs.detector_config("mask_rcnn", **few, classes=5, fc_channels=16, mask_convs=1, proposals=20, detections=10)
    monkeypatch.setattr(configs, "published_config", lambda name: small)
    monkeypatch.setattr(subjects, "_IMAGE", (64, 90))
    output = tmp_path / "figures.json"
    output.write_text('{"other": {}}', encoding="utf-8")
    arguments = ["--model", "mask_rcnn_swin_tiny", "--steps", "2", "--range-candidates", "16", "--threads", "1"]
    done = CliRunner().invoke(real_size.main, [*arguments, "--output", str(output)])
    assert done.exit_code == 0, done.output
    kept = json.loads(output.read_text(encoding="utf-8"))
    assert list(kept) == ["other", "mask_rcnn_swin_tiny.random"]
    figures = kept["mask_rcnn_swin_tiny.random"]
    assert figures["shapes"]["detector"] == [1, 3, 64, 96]
    assert figures["blocks"] == {"detector": 11, "bbox": 1, "mask": 1}  # embedding, 5 blocks, 3 mergings, neck, RPN
    assert set(figures["largest_difference"]) == set(figures["cosine"]) == {"detector", "bbox", "mask"}
    assert max(figures["largest_difference"].values()) < 1e-5
    assert 0.3 < min(figures["cosine"].values()) <= max(figures["cosine"].values()) < 0.99999
