"""Ranges of convolutions by own errors against brute force; lists of inputs; selected rows."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fimaq_core.calibration import thinning
from fimaq_core.calibration.candidates import MIN_WEIGHT_SCALE, grid_candidates
from fimaq_core.calibration.conv_ranges import calibrate_conv, calibrate_conv_by_own_error
from fimaq_core.calibration.percentile_ranges import conv_percentiles
from fimaq_core.calibration.refit import reduce_conv_error
from fimaq_core.calibration.thinning import conv_values, in_pieces, spread
from fimaq_core.layers import QuantConv2d, QuantConvTranspose2d
from fimaq_core.recipe import Recipe, make_recipe

Layer = QuantConv2d | QuantConvTranspose2d


def recipe(method: str = "fimaq", **changes: object) -> Recipe:
    return make_recipe(method, {"range_candidates": 64, "refit_flips": 20, **changes})


def conv(weight_bits: int, input_bits: int) -> QuantConv2d:
    return QuantConv2d.from_float(
        nn.Conv2d(6, 5, 3, padding=1), weight_bits, input_bits
    ).requires_grad_(False)


def upward(weight_bits: int, input_bits: int) -> QuantConvTranspose2d:
    return QuantConvTranspose2d.from_float(
        nn.ConvTranspose2d(6, 5, 2, 2), weight_bits, input_bits
    ).requires_grad_(False)


LAYERS: list[Callable[[int, int], Layer]] = [conv, upward]
each_layer = pytest.mark.parametrize("build", LAYERS, ids=["convolution", "transposed"])


def levels_of_a_pyramid() -> list[Tensor]:
    return [torch.randn(2, 6, 9, 7) * 2, torch.randn(2, 6, 5, 4) + 1, torch.randn(1, 6, 3, 2)]


def state(layer: nn.Module) -> list[Tensor]:
    return [value.clone() for value in layer.state_dict().values()]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(*pair) for pair in zip(state(a), state(b), strict=True))


def errors(rows: Tensor, candidates: list[tuple[float, float]], levels: int) -> Tensor:
    """Own squared errors (candidates,) of one row: the nearest of all points, value by value."""
    found = []
    for scale, zero in candidates:
        points = (torch.arange(levels, dtype=torch.float64) - zero) * scale
        found.append((rows.double()[:, None] - points).abs().amin(1).square().sum())
    return torch.stack(found)


@each_layer
@pytest.mark.parametrize("method", ["fimaq", "adalog"])
@pytest.mark.parametrize("bits", [3, 6])
@pytest.mark.parametrize("one_sided", [False, True], ids=["both signs", "behind a ReLU"])
def test_own_errors_by_brute_force(
    build: Callable[[int, int], Layer], method: str, bits: int, one_sided: bool
) -> None:
    torch.manual_seed(bits)
    layer, parts = build(bits, bits), levels_of_a_pyramid()
    parts = [part.relu() for part in parts] if one_sided else parts
    calibrate_conv_by_own_error(layer, parts, recipe(method))

    values, levels = torch.cat([part.flatten() for part in parts]), 2**bits
    grid = grid_candidates(values.sort().values[None], levels, 64)
    candidates = list(zip(grid.scale[:, 0].tolist(), grid.zero_point[:, 0].tolist(), strict=True))
    low, high = min(float(values.min()), 0), max(float(values.max()), 0)
    candidates.append(
        ((high - low) / (levels - 1), float(round(-low / (high - low) * (levels - 1))))
    )
    table = errors(values, candidates, levels)
    found = errors(
        values,
        [(float(layer.input_quantizer.scale), float(layer.input_quantizer.zero_point))],
        levels,
    )
    assert float(found) <= float(table.min()) * (1 + 1e-5)
    assert float(found) == pytest.approx(float(table.min()), rel=1e-5)
    assert layer.input_quantizer.scale.shape == (1, 1, 1, 1)
    if one_sided and bits == 6:
        assert int(table.argmin()) == 64  # the grid ends below what a ReLU gives

    # In the float layer's layout the rows of a transposed convolution are its second dimension.
    matrix = layer.weight.flatten(1)
    grid = grid_candidates(matrix.sort(1).values, levels, 64, MIN_WEIGHT_SCALE)
    for row, own in enumerate(matrix):
        candidates = list(
            zip(grid.scale[:, row].tolist(), grid.zero_point[:, row].tolist(), strict=True)
        )
        quantizer = layer.weight_quantizer
        chosen = [(float(quantizer.scale[row]), float(quantizer.zero_point[row]))]
        assert float(errors(own, chosen, levels)) == pytest.approx(
            float(errors(own, candidates, levels).min()), rel=1e-5
        )


@each_layer
def test_min_max_and_percentiles_of_lists(
    build: Callable[[int, int], Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    parts = levels_of_a_pyramid()
    parts[1][0, 2, 3, 1], parts[2][0, 0, 0, 0] = 30.0, -20.0
    layer = build(4, 4)
    monkeypatch.setattr(thinning, "CONV_VALUES", 60)  # min-max sees all values nevertheless
    calibrate_conv_by_own_error(layer, parts, recipe("rtn"))
    assert float(layer.input_quantizer.scale) == pytest.approx(50 / 15)
    assert float(layer.input_quantizer.zero_point) == 6
    matrix = layer.weight.flatten(1)
    spans = matrix.amax(1).clamp(min=0) - matrix.amin(1).clamp(max=0)
    assert torch.allclose(layer.weight_quantizer.scale[:, 0], spans / 15)
    monkeypatch.undo()
    listed, whole = build(4, 4), build(4, 4)
    whole.weight = listed.weight
    values = torch.cat([part.flatten() for part in parts])
    conv_percentiles(listed, parts)
    conv_percentiles(whole, values.view(1, 6, -1, 1))
    assert torch.equal(listed.input_quantizer.scale, whole.input_quantizer.scale)
    assert torch.equal(listed.weight_quantizer.scale, whole.weight_quantizer.scale)
    assert float(listed.input_quantizer.scale) < 50 / 15


@each_layer
def test_quantizers_that_are_off_get_no_range(build: Callable[[int, int], Layer]) -> None:
    for method in ("fimaq", "rtn", "repq"):
        for bits in ((4, 32), (32, 4)):
            layer = build(*bits)
            (conv_percentiles if method == "repq" else calibrate_conv_by_own_error)(
                layer, levels_of_a_pyramid(), *([] if method == "repq" else [recipe(method)])
            )
            assert (layer.weight_quantizer.scale.numel() > 0) == (bits[0] == 4)
            assert (layer.input_quantizer.scale.numel() > 0) == (bits[1] == 4)


@pytest.mark.parametrize("method", ["fimaq", "rtn"])
@pytest.mark.parametrize("input_bits", [32, 8])
def test_a_patch_embedding_sees_a_list_as_one_tensor(method: str, input_bits: int) -> None:
    torch.manual_seed(3)
    x, plain = torch.randn(16, 3, 12, 8) + 0.5, nn.Conv2d(3, 8, 4, stride=4).requires_grad_(False)
    whole, listed = (QuantConv2d.from_float(plain, 3, input_bits) for _ in range(2))
    calibrate_conv(whole, x, recipe(method))
    calibrate_conv(listed, list(torch.split(x, 8)), recipe(method))
    assert same(whole, listed)
    if input_bits == 32:
        reduce_conv_error(whole, x, recipe("erq"))
        reduce_conv_error(listed, list(torch.split(x, 8)), recipe("erq"))
        assert whole.weight_quantizer.codes.numel() == whole.weight.numel()
        assert same(whole, listed)


def test_a_patch_embedding_sees_images_of_all_sizes() -> None:
    """Its choice has no larger output error over all of them than the choice by one size alone."""
    torch.manual_seed(5)
    plain = nn.Conv2d(3, 8, 4, stride=4).requires_grad_(False)
    images = [
        torch.randn(2, 3, 8, 16) * torch.tensor([3.0, 0.1, 1.0])[:, None, None],
        torch.randn(1, 3, 12, 4) * 0.1,
    ]

    def error(x: Tensor | list[Tensor]) -> float:
        layer = QuantConv2d.from_float(plain, 3, 32)
        calibrate_conv(layer, x, recipe())
        layer.quantized = True
        return float(sum((layer(image) - plain(image)).square().sum() for image in images))

    assert error(images) < error(images[1])
    assert error([images[1], images[0]]) == pytest.approx(error(images), rel=1e-6)


@pytest.mark.parametrize(
    ("count", "wanted"),
    [(5, 9), (9, 9), (1000, 1), (1000, 7), (66_800, 256), (65_536, 256), (7, 6)],
)
def test_rows_are_spread_evenly(count: int, wanted: int) -> None:
    index = spread(count, wanted)
    assert len(index) == min(count, wanted)
    if wanted >= count:
        assert index.tolist() == list(range(count))
        return
    starts = [number * count // wanted for number in range(wanted + 1)]
    assert all(
        start <= row < end
        for start, row, end in zip(starts[:-1], index.tolist(), starts[1:], strict=True)
    )


def test_rows_of_an_image_do_not_fall_into_one_column() -> None:
    """256 of 256 x 256 positions, where an even stride would always hit the same column."""
    columns = spread(65_536, 256) % 256
    counts = torch.histc(columns.float(), 16, 0, 256)
    assert int(counts.min()) >= 14
    assert int(counts.max()) <= 18


def test_long_inputs_are_thinned_position_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    parts = levels_of_a_pyramid()
    everything = torch.cat([part.permute(0, 2, 3, 1).reshape(-1, 6) for part in parts])
    assert torch.equal(conv_values(parts)[0].sort().values, everything.flatten().sort().values)
    monkeypatch.setattr(thinning, "CONV_VALUES", 6 * 40)
    found = conv_values(parts)
    assert found.shape == (1, 240)
    assert torch.equal(found[0], everything[spread(len(everything), 40)].flatten())
    layer, alone = conv(4, 4), conv(4, 4)
    alone.weight, alone.bias = layer.weight, layer.bias
    calibrate_conv_by_own_error(layer, parts, recipe())
    calibrate_conv_by_own_error(
        alone, everything[spread(len(everything), 40)].t()[None, :, :, None], recipe()
    )
    assert same(layer, alone)


def test_pieces_of_rows() -> None:
    for count, pieces in ((96, 32), (24, 8), (7, 1)):
        rows = torch.randn(count, 3)
        found = in_pieces(rows)
        assert found.shape == (pieces, count // pieces, 3)
        assert torch.equal(found.flatten(0, 1), rows)
