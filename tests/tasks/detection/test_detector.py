"""Complete detectors: mmdet's own predictions in full precision; quantized layers change them."""

import numpy as np
import pytest
import torch
from head_detectors import build, chain_of, config, recipe, sample
from pycocotools import mask as coco_mask
from torch import Tensor

import tasks.detection.mm as mm
from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.chain import BlockChain
from fimaq_core.errors import DataError, NumericsError
from fimaq_core.layers import quant_layers, set_quantized
from fimaq_core.samples import Samples
from tasks.detection.detector import QuantizedDetector, detector_segments
from tasks.detection.neck import rpn_levels, rpn_segment
from tasks.detection.roi import roi_inputs, roi_parts

KINDS = {"mask": config(), "cascade": config(cascade=True), "boxes only": config(masks=False)}


def results(found: mm.DetDataSample) -> dict[str, Tensor]:
    return dict(found.pred_instances.items())


def assert_equal(found: mm.DetDataSample, expected: mm.DetDataSample) -> None:
    ours, theirs = results(found), results(expected)
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        assert torch.equal(ours[name], values), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("size", "factors"), [((64, 96), (1.0, 1.0)), ((75, 50), (1.25, 1.5))], ids=["plain", "resized"]
)
def test_the_float_model_predicts_as_mmdet_does(
    kind: str, size: tuple[int, int], factors: tuple[float, float]
) -> None:
    model = build(KINDS[kind])
    image, meta = sample(*size, factors)
    with torch.no_grad():
        (expected,) = model.predict(image, [mm.DetDataSample(metainfo=meta)], rescale=True)
    found = QuantizedDetector(model, {}).predict(image, meta)
    assert len(expected.pred_instances) >= 5
    assert_equal(found, expected)
    assert found.metainfo == meta
    if kind != "boxes only":
        masks = found.pred_instances.masks
        assert (masks.dtype, tuple(masks.shape[1:])) == (torch.bool, meta["ori_shape"])
        assert 0 < masks.float().mean() < 1


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_equal_a_test_step_on_raw_pixels(kind: str) -> None:
    model = build(KINDS[kind])
    pixels = torch.from_numpy(
        np.random.default_rng(1).integers(0, 256, (3, 200, 147), dtype=np.uint8)
    )
    meta = {"img_shape": (200, 147), "ori_shape": (133, 98), "scale_factor": (1.5, 200 / 133)}
    raw = {"inputs": [pixels], "data_samples": [mm.DetDataSample(metainfo=meta)]}
    with torch.no_grad():
        (expected,) = model.test_step(raw)
    batch = model.data_preprocessor(
        {"inputs": [pixels], "data_samples": [mm.DetDataSample(metainfo=meta)]}, False
    )
    assert batch["inputs"].shape == (1, 3, 224, 160)
    found = QuantizedDetector(model, {}).predict(batch["inputs"], batch["data_samples"][0].metainfo)
    assert len(found.pred_instances) >= 5
    assert_equal(found, expected)


def test_the_metric_of_coco_takes_the_predictions() -> None:
    model = build(KINDS["mask"])
    image, meta = sample(64, 96, (0.8, 0.8))
    found = QuantizedDetector(model, {}).predict(image, meta | {"img_id": 7})
    metric = mm.CocoMetric(metric=["bbox", "segm"])
    metric.process({}, [found.to_dict() | {"instances": []}])
    _, taken = metric.results[0]
    assert taken["img_id"] == 7
    assert np.array_equal(taken["bboxes"], found.pred_instances.bboxes.numpy())
    assert len(taken["masks"]) == len(found.pred_instances)
    for encoded, mask in zip(taken["masks"], found.pred_instances.masks.numpy(), strict=True):
        assert encoded["size"] == [80, 120]
        assert np.array_equal(coco_mask.decode(encoded), mask)


def parts_of(model: mm.TwoStageDetector, bits: int, **bits_of: int) -> dict[str, BlockChain]:
    """Chains of all parts; ``bits_of`` gives other bits to the part ``detector`` or ``roi``."""
    chain = chain_of(model, bits_of.get("detector", bits))
    return {"detector": chain, **roi_parts(model, recipe(bits_of.get("roi", bits)))}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_switched_off_leave_every_bit(kind: str) -> None:
    model = build(KINDS[kind])
    image, meta = sample(75, 100, (0.5, 0.5))
    expected = QuantizedDetector(model, {}).predict(image, meta)
    chains = parts_of(model, 4)
    found = QuantizedDetector(model, chains)
    assert_equal(found.predict(image, meta), expected)
    off = parts_of(build(KINDS[kind]), 32)
    for chain in off.values():
        set_quantized(chain, True)
    assert_equal(QuantizedDetector(model, off).predict(image, meta), expected)


@pytest.mark.parametrize("kind", ["mask", "cascade"])
@pytest.mark.parametrize("scope", ["detector", "roi"])
def test_two_bits_change_what_is_detected(kind: str, scope: str) -> None:
    model = build(KINDS[kind])
    image, meta = sample(64, 96)
    expected = results(QuantizedDetector(model, {}).predict(image, meta))
    other, other_meta = sample(96, 64, seed=1)
    images = Samples([image, other])
    inputs: dict[str, Samples] = {"detector": images}
    inputs |= roi_inputs(model, images, [meta, other_meta], torch.device("cpu"), limit=20)
    chains = parts_of(model, 32, **{scope: 2})
    assert chains.keys() == inputs.keys()
    for name, chain in chains.items():
        calibrate(chain, inputs[name], recipe(2))
    found = QuantizedDetector(model, chains).predict(image, meta)
    detected = results(found)
    shared = min(len(detected["scores"]), len(expected["scores"]))
    assert shared > 0
    assert not torch.allclose(detected["scores"][:shared], expected["scores"][:shared], atol=1e-2)
    for chain in chains.values():
        set_quantized(chain, False)
    restored = results(QuantizedDetector(model, chains).predict(image, meta))
    assert all(torch.equal(restored[name], values) for name, values in expected.items())


@pytest.mark.parametrize("kind", ["mask", "cascade"])
def test_the_whole_chain_predicts_as_mmdet_does(kind: str) -> None:
    model = build(KINDS[kind])
    image, meta = sample(75, 100, (0.5, 0.5))
    expected = results(QuantizedDetector(model, {}).predict(image, meta))
    recipes = {"backbone": recipe(4), "fpn": recipe(4)}
    chain = BlockChain([*detector_segments(model, recipes), rpn_segment(model, recipe(4))])
    found = results(
        QuantizedDetector(model, {"detector": chain, **roi_parts(model, recipe(4))}).predict(
            image, meta
        )
    )
    assert len(found["scores"]) >= 5
    assert torch.equal(found["labels"], expected["labels"])
    assert torch.allclose(found["scores"], expected["scores"], atol=1e-4)
    assert torch.allclose(found["bboxes"], expected["bboxes"], atol=1e-2)
    assert (found["masks"] != expected["masks"]).float().mean() < 1e-3
    levels = rpn_levels(*image.shape[2:])
    with torch.no_grad():
        assert chain(image).shape == (1, sum(levels), 15)


def test_only_the_layers_of_the_heads_are_the_detectors_own() -> None:
    model = build(KINDS["mask"])
    chains = parts_of(model, 4)
    detector = QuantizedDetector(model, chains)
    names = {name for name, _ in detector.named_parameters()}
    assert not any(name.startswith(("backbone", "neck")) for name in names)
    assert detector.roi_head is model.roi_head
    heads = {id(layer) for name, chain in chains.items() for _, layer in quant_layers(chain)}
    assert heads == {id(layer) for _, layer in quant_layers(detector)}


def test_images_come_one_by_one_and_with_their_sizes() -> None:
    detector = QuantizedDetector(build(KINDS["mask"]), {})
    image, meta = sample(64, 64)
    with pytest.raises(DataError, match="one image at a time, and this is a batch of 2"):
        detector.predict(torch.cat([image, image]), meta)
    del meta["scale_factor"], meta["ori_shape"]
    with pytest.raises(DataError, match="lacks ori_shape, scale_factor"):
        detector.predict(image, meta)


WHERE = {
    "backbone and neck": "neck.fpn_convs.1.conv",
    "the RPN": "rpn_head.rpn_cls",
    "the RoI head bbox1": "roi_head.bbox_head.1.fc_reg",
    "the RoI head mask0": "roi_head.mask_head.0.upsample",
}


@pytest.mark.parametrize("what", WHERE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_not_less_to_find(what: str, value: float) -> None:
    """mmdet leaves out boxes and scores that are NaN, and says nothing."""
    model = build(KINDS["cascade"])
    image, meta = sample(64, 96)
    detector = QuantizedDetector(model, {})
    detector.predict(image, meta)
    layer = model.get_submodule(WHERE[what])
    layer.bias.data[0] = value
    with pytest.raises(NumericsError, match=f"The output of {what} holds NaN or infinity"):
        detector.predict(image, meta)
    layer.bias.data[0] = 0.0
    detector.predict(image, meta)
    assert not any(module._forward_hooks for module in model.modules())
