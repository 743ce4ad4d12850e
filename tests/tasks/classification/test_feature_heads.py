"""Models without classifier: nearest neighbours, linear probe, cosine divergence, whole cells."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from fimaq_core import quantize
from fimaq_core.errors import DataError, ModelError
from fimaq_core.families import find_family
from fimaq_core.fisher.divergence import CosineDivergence
from fimaq_core.layers import set_quantized
from fimaq_core.recipe import make_recipe
from tasks.classification import heads
from tasks.classification.task import TASK
from tasks.common.cell.identity import planned_folder
from tasks.common.cell.run import run_cell
from tasks.common.record import read_record
from tasks.common.request import CellRequest, DataRequest, ModelRequest

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "embed_dim": 12, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
MODELS = {
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k": SMALL | {"num_classes": 7},
    "swin_tiny_patch4_window7_224.ms_in1k": SWIN | {"num_classes": 7},
}
FEW = {"calibration_images": 16, "range_search": "minmax", "batch_size": 8, "steps": 2}
FEW |= {"fisher_k": 1, "calibration_transform": "eval"}


def clusters(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (n, 8) around one centre per class, and their classes; 3 classes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    centres = np.random.default_rng(0).normal(size=(3, 8))
    features = centres[labels] + rng.normal(size=(count, 8))
    return torch.tensor(features, dtype=torch.float32), torch.tensor(labels)


def test_neighbours_vote_as_in_a_loop_by_hand() -> None:
    (bank, labels), (test, _) = clusters(50, 1), clusters(9, 2)
    found = heads.knn(bank, labels, 4)(test)
    for row, feature in enumerate(test.double()):
        similarity = [
            (float(feature @ one / feature.norm() / one.norm()), int(label))
            for one, label in zip(bank.double(), labels, strict=True)
        ]
        votes = [0.0] * 4
        for value, label in sorted(similarity, reverse=True)[:20]:
            votes[label] += math.exp(value / 0.07)
        expected = [math.log(vote / sum(votes) + 1e-12) for vote in votes]
        assert found[row].tolist() == pytest.approx(expected, rel=1e-4)
    # A bank that is smaller than the number of neighbours votes as a whole.
    assert heads.knn(bank[:3], labels[:3], 3)(test).exp().sum(1).tolist() == pytest.approx([1] * 9)


def test_the_probe_is_the_best_logistic_regression() -> None:
    bank, labels = clusters(60, 3)
    standard = (bank - bank.mean(0)) / bank.std(0, unbiased=False)
    weight, bias = torch.zeros(3, 8, requires_grad=True), torch.zeros(3, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        # scikit-learn's objective with C = 1: the sum over images plus half the squared weights.
        solver.zero_grad()
        logits = standard @ weight.T + bias
        value = nn.functional.cross_entropy(logits, labels, reduction="sum")
        value = value + weight.square().sum() / 2
        value.backward()
        return value

    solver.step(loss)
    expected = (standard @ weight.T + bias).log_softmax(1)
    assert torch.allclose(heads.linear(bank, labels, 3)(bank), expected, atol=5e-3)
    with pytest.raises(DataError, match="all classes"):
        heads.linear(bank, labels, 4)


def test_cosine_divergence_has_its_closed_form_and_gradient() -> None:
    f = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    q = torch.tensor([[4.0, 3.0], [0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    value = CosineDivergence()(q, f)
    assert value.item() == pytest.approx((1 - 24 / 25 + 1) / 2)
    value.backward()
    # d(1 - cos) / dq = -(f / |f| - cos q / |q|) / |q|, halved by the mean.
    first = -(f[0] / 5 - 24 / 25 * q.detach()[0] / 5) / 5 / 2
    assert torch.allclose(q.grad[0], first)
    same = f.clone().requires_grad_()
    CosineDivergence()(same, f).backward()
    assert torch.allclose(same.grad, torch.zeros_like(f), atol=1e-12)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with images of three colours in `train` and `val`, and weights of both models."""
    root = tmp_path_factory.mktemp("features")
    rng = np.random.default_rng(5)
    for part, count in (("train", 12), ("val", 4)):
        for label in range(3):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., label] += 100
                Image.fromarray(pixels).save(folder / f"{index}.png")
    for name, arguments in MODELS.items():
        torch.manual_seed(0)
        model = timm.create_model(name.partition(".")[0], **arguments)
        save_file(model.state_dict(), root / f"{name}.safetensors")
    return root


def request(place: Path, name: str, head: str | None, **changes: object) -> CellRequest:
    model = ModelRequest(name, MODELS[name], place / f"{name}.safetensors", head=head)
    recipe = make_recipe("fimaq", FEW, {"w_bits": 8, "a_bits": 8, **changes})
    data = DataRequest(place)
    return CellRequest("classification", model, data, recipe, results=place / "runs", threads=1)


@pytest.mark.parametrize("name", MODELS)
def test_a_chain_without_classifier_gives_the_models_features(place: Path, name: str) -> None:
    loaded = TASK.load(request(place, name, "knn").model)
    assert (loaded.classes, loaded.head) == (0, "knn")
    x = torch.rand(2, *loaded.input_shape)
    with torch.no_grad():
        expected = loaded.model.forward_head(loaded.model.forward_features(x), pre_logits=True)
        chain = find_family(loaded.model).build(loaded.model, make_recipe("fimaq"))
        set_quantized(chain, False)
        assert torch.allclose(chain(x), expected, atol=1e-5)
    assert [segment.kind for segment in chain].count("head") == 0


@pytest.mark.parametrize(("name", "head"), zip(MODELS, heads.HEADS, strict=True))
def test_a_cell_classifies_features(place: Path, name: str, head: str) -> None:
    path = run_cell(request(place, name, head))
    record = read_record(path)
    assert set(record.metrics) == {f"{head}_top1"}
    assert record.fp_metrics.keys() == record.metrics.keys()
    # Colours are easy, also for random features, and 8 bits change little.
    assert record.fp_metrics[f"{head}_top1"].value == 100
    assert record.metrics[f"{head}_top1"].value >= 80
    (note,) = [note for note in record.notes if note.startswith(f"head {head}: ")]
    assert "for 36 images of folder-3-classes train" in note
    assert list(record.blocks)[-1].split(".")[-2] == "blocks"
    own, without = (planned_folder(request(place, name, one)) for one in (head, None))
    assert own != without


def test_a_checkpoint_keeps_its_head(place: Path, tmp_path: Path) -> None:
    from tasks.classification.command import group
    from tasks.common.cli.commands import main

    name, out = next(iter(MODELS)), tmp_path / "out.safetensors"
    weights = ["--weights", str(place / f"{name}.safetensors")]
    few = ["--method", "rtn", "--calibration-images", "8", "--calibration-transform", "eval"]
    own = ["--model", name, "--model-args", json.dumps(MODELS[name]), "--data", str(place)]
    main(group, ["calibrate", *own, *weights, *few, "--head", "knn", "--out", str(out)])
    main(group, ["inspect", str(out), *weights])
    main(group, ["evaluate", str(out), *weights, "--data", str(place)])
    main(group, ["export", str(out), *weights, "--data", str(place), "--out", f"{out}.onnx"])


def test_a_model_with_two_classifiers_is_refused(place: Path) -> None:
    with pytest.raises(ModelError, match="two classifiers"):
        TASK.load(ModelRequest("demo_deit", head="knn"))


def test_a_model_without_classifier_needs_a_head(place: Path) -> None:
    name = next(iter(MODELS))
    arguments, path = SMALL | {"num_classes": 0}, place / "bare.safetensors"
    state = timm.create_model(name.partition(".")[0], **arguments).state_dict()
    save_file(state, path)
    with pytest.raises(ModelError, match="give --head knn or --head linear"):
        TASK.load(ModelRequest(name, arguments, path))
    assert TASK.load(ModelRequest(name, arguments, path, head="linear")).classes == 0


def test_features_are_quantized_through_the_api(place: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", **(SMALL | {"num_classes": 0})).eval()
    x = torch.rand(16, 3, 32, 32)
    settings = {"calibration_images": 16, "range_search": "minmax", "steps": 4, "batch_size": 8}
    quantized = quantize(model, x, w_bits=8, a_bits=8, fisher_k=1, progress=False, **settings)
    with torch.no_grad():
        assert CosineDivergence()(quantized(x), model(x)).item() < 1e-3
