"""The optional term of a detector's divergence against mmdet's own modules and autograd."""

import copy
import json
from pathlib import Path

import pytest
import torch
from detection_runs import MODEL, QUICK, cell, command, done
from torch import Tensor, nn

from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import Beside, BlockChain
from fimaq_core.fisher.passes import Sweep
from fimaq_core.layers import set_quantized
from fimaq_core.recipe import make_recipe
from fimaq_core.samples import Samples
from tasks.common.registry import defaults
from tasks.common.request import DataRequest
from tasks.common.task import CalibrationSet, LoadedModel
from tasks.detection.detector import DETECTOR
from tasks.detection.mm import DetDataSample, bbox2roi
from tasks.detection.task import TASK

pytestmark = pytest.mark.slow

RECIPE = make_recipe("fimaq", defaults("detection"), QUICK, {"detection_terms": "rpn+roi"})
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return TASK.load(MODEL)


@pytest.fixture(scope="module")
def images(loaded: LoadedModel) -> CalibrationSet:
    return TASK.calibration(loaded, DataRequest(), RECIPE)


@pytest.fixture
def chain(loaded: LoadedModel) -> BlockChain:
    return TASK.chains(copy.deepcopy(loaded), RECIPE)[DETECTOR]


def maps_of(model: nn.Module, features: tuple[Tensor, ...]) -> Tensor:
    """The RPN's outputs in the chain's order: of every position A class logits, then 4 A deltas."""
    rows = []
    for scores, boxes in zip(*model.rpn_head(features), strict=True):
        anchors, (height, width) = scores.shape[1], scores.shape[2:]
        for row in range(height):
            for column in range(width):
                found = [scores[0, anchor, row, column] for anchor in range(anchors)]
                found += [boxes[0, number, row, column] for number in range(4 * anchors)]
                rows.append(torch.stack(found))
    return torch.stack(rows)[None]


def proposals_of(model: nn.Module, image: Tensor) -> Tensor:
    """Proposals of mmdet for an image whose padding counts as image."""
    size = tuple(image.shape[2:])
    sample = DetDataSample(
        metainfo={
            "img_shape": size,
            "ori_shape": size,
            "pad_shape": size,
            "scale_factor": (1.0, 1.0),
        }
    )
    boxes: Tensor = model.rpn_head.predict(model.extract_feat(image), [sample], rescale=False)[
        0
    ].bboxes
    return boxes


def logits_of(model: nn.Module, features: tuple[Tensor, ...], proposals: Tensor) -> Tensor:
    scores: Tensor = model.roi_head._bbox_forward(features, bbox2roi([proposals]))["cls_score"]
    return scores


@torch.no_grad()
def test_behind_the_maps_are_the_class_logits_of_the_float_proposals(
    loaded: LoadedModel, chain: BlockChain, images: CalibrationSet
) -> None:
    model = loaded.model
    for image in images.images:
        features = model.extract_feat(image)
        proposals = proposals_of(model, image)
        logits = logits_of(model, features, proposals)
        assert logits.shape == (model.test_cfg.rpn.max_per_img, 11)
        expected = torch.cat([maps_of(model, features).flatten(1), logits.reshape(1, -1)], 1)
        found = chain(image)
        assert found.shape == expected.shape
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(chain.side_of(image)[0], proposals)  # type: ignore[index]


@torch.no_grad()
def test_quantized_features_are_looked_at_on_the_same_proposals(
    loaded: LoadedModel, chain: BlockChain, images: CalibrationSet
) -> None:
    """The float model's own head gives the classes."""
    calibrate(chain, images.images, RECIPE)
    image = images.images[0]
    set_quantized(chain, True)
    found = chain(image)
    assert torch.equal(chain.side_of(image)[0], proposals_of(loaded.model, image))
    features = TASK.assemble(copy.deepcopy(loaded), {DETECTOR: chain}).extract_feat(image)
    logits = logits_of(loaded.model, features, proposals_of(loaded.model, image))
    assert torch.allclose(found[:, -logits.numel() :], logits.reshape(1, -1), rtol=1e-5, atol=1e-5)
    set_quantized(chain, False)
    assert not torch.allclose(
        chain(image)[:, -logits.numel() :], logits.reshape(1, -1), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_fisher_passes_have_the_gradient_of_mmdets_own_modules(
    loaded: LoadedModel, chain: BlockChain, images: CalibrationSet, stage: int
) -> None:
    """Gradient in the last block of a stage, which feeds the neck and the next stage."""
    model, image, number = (
        loaded.model,
        images.images[1],
        len(loaded.model.backbone.stages[stage].blocks) - 1,
    )
    labels = [segment.label for segment in chain]
    index = labels.index(f"backbone.stages.{stage}.blocks.{number}")
    one = CalibrationSet(Samples([image]), ["a"], "eval", "b")
    divergence = TASK.divergences(loaded, one, RECIPE, CPU, 1)[DETECTOR]
    with torch.no_grad():
        reference = divergence.reference(Samples([chain(image)]))[0]
        x, kept = image, ()
        for segment in list(chain)[:index]:
            x = segment(x, None, kept)
            kept = segment.kept_with(x, kept)
        entered = chain.segment(index).enter(x, None, kept)
        noise = 0.05 * torch.randn(
            chain.segment(index).block(entered).shape, generator=torch.Generator().manual_seed(2)
        )

    def disturbed(batch: Tensor) -> Tensor:
        return chain.segment(index).block(batch) + noise  # type: ignore[no-any-return]

    beside = Beside(Samples([chain.side_of(image)]), tuple(Samples([own]) for own in kept))
    sweep = Sweep(chain, index, Samples([reference]), divergence, CPU, beside=beside)
    ((_, output, gradient),) = sweep.gradients(Samples([entered]), disturbed)

    proposals = proposals_of(model, image)
    leaf = output.clone().requires_grad_(True)
    block = model.backbone.stages[stage].blocks[number]
    handle = block.register_forward_hook(lambda *_: leaf.flatten(1, 2))
    try:
        features = model.extract_feat(image)
    finally:
        handle.remove()
    logits = logits_of(model, features, proposals)
    own = torch.cat([maps_of(model, features).flatten(1), logits.reshape(1, -1)], 1)
    (expected,) = torch.autograd.grad(divergence(own, reference), leaf)
    assert expected.norm() > 0
    assert (gradient - expected).norm() < 1e-3 * expected.norm()
    # the term has a share of its own
    plain = TASK.divergences(
        loaded, one, RECIPE.model_copy(update={"detection_terms": "rpn"}), CPU, 1
    )[DETECTOR]
    maps = own.shape[1] - logits.numel()
    short = plain.reference(Samples([maps_of(model, model.extract_feat(image)).detach()]))[0]
    handle = block.register_forward_hook(lambda *_: leaf.flatten(1, 2))
    try:
        without = maps_of(model, model.extract_feat(image)).flatten(1)
    finally:
        handle.remove()
    assert without.shape[1] == maps
    (less,) = torch.autograd.grad(plain(without, short), leaf)
    assert (less - expected).norm() > 1e-2 * expected.norm()


def test_a_run_with_the_term(tmp_path: Path) -> None:
    """The term changes the learned values; checkpoints do not hold the float detector."""
    with_term = done(cell(tmp_path, detection_terms="rpn+roi"))
    without = done(cell(tmp_path))
    assert "detection_terms=rpn+roi" in with_term.record.variant
    assert "calibrate detector (reused)" in without.record.seconds
    assert list(with_term.record.last_loss) == list(without.record.last_loss)
    assert with_term.record.last_loss != without.record.last_loss
    assert with_term.state.keys() == without.state.keys()
    assert len(list((tmp_path / "calibration").glob("*.safetensors"))) == 3
    sizes = sorted(
        path.stat().st_size for path in (tmp_path / "reconstruction").glob("*.safetensors")
    )
    assert len(sizes) == 6
    assert sizes[-1] < 1.01 * sizes[-2]
    shown = [
        json.loads(command("inspect", one.checkpoint, "--json")) for one in (with_term, without)
    ]
    assert shown[0]["totals"] == shown[1]["totals"]
    assert set(shown[0]["changes"]) - set(shown[1]["changes"]) == {"detection_terms"}


def test_the_term_goes_with_reconstructed_mlps(tmp_path: Path) -> None:
    """APHQ-ViT's gradient of the term; its teacher has a side too."""
    record = done(cell(tmp_path, "aphq", detection_terms="rpn+roi")).record
    assert record.notes == []
    assert all(0 < value < float("inf") for name, value in record.last_loss.items())
