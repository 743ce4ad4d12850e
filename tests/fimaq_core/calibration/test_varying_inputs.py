"""Calibration on samples of varying shapes: inputs of each layer, thinning, and one tensor."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from small_models import chain_of, images, quick, swin
from small_pyramid import WIDTH, by_hand, pyramid, swap, varied
from torch import Tensor, nn

from fimaq_core.calibration import calibrate as calibrate_module
from fimaq_core.calibration import capture, layer_ranges
from fimaq_core.calibration.calibrate import calibrate
from fimaq_core.calibration.thinning import spread
from fimaq_core.chain import BlockChain, Segment
from fimaq_core.errors import NumericsError
from fimaq_core.layers import (
    QuantConv2d,
    QuantConvTranspose2d,
    QuantLayer,
    QuantLinear,
    QuantMatMul,
    quant_layers,
    set_quantized,
)
from fimaq_core.pipeline import freeze
from fimaq_core.recipe import OFF, Recipe
from fimaq_core.samples import Samples

pytestmark = pytest.mark.slow


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, tuple[Tensor, ...]]]:
    """Inputs that calibration gives the search of each layer, by segment and name."""
    seen: dict[str, tuple[Tensor, ...]] = {}
    original = calibrate_module.calibrate_layer

    def note(
        segment: Segment, name: str, layer: QuantLayer, inputs: tuple[Tensor, ...], recipe: Recipe
    ) -> tuple[Tensor, ...]:
        seen[f"{segment.label}.{name}"] = inputs
        return original(segment, name, layer, inputs, recipe)

    with monkeypatch.context() as patch:
        patch.setattr(calibrate_module, "calibrate_layer", note)
        yield seen


def ranges(chain: BlockChain) -> dict[str, Tensor]:
    return {name: value for name, value in chain.state_dict().items() if "quantizer" in name}


@pytest.mark.parametrize("method", ["fimaq", "rtn", "repq", "erq", "adalog", "ptq4vit"])
def test_images_of_one_size_give_what_one_tensor_gives(method: str) -> None:
    """Without thinning only the order of sums differs, so an equally good candidate may win."""
    recipe, x = quick(method, w_bits=4, a_bits=4), images(8, 40)
    dense, ragged = chain_of(swin(40), recipe), chain_of(swin(40), recipe)
    calibrate(dense, x, recipe, batch_size=3)
    calibrate(ragged, Samples(list(x.split(1))), recipe)
    found, expected = ranges(ragged), ranges(dense)
    assert found.keys() == expected.keys()
    scales = [name for name in expected if name.endswith("scale")]
    assert len(scales) > 30
    # Where outliers by rounding are allowed, they are few; min-max has no choice to make.
    agree = [
        name for name in scales if torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-7)
    ]
    assert len(agree) >= (1.0 if method == "rtn" else 0.95) * len(scales)
    zeros = [name for name in expected if name.endswith("zero_point")]
    assert sum(torch.equal(found[name], expected[name]) for name in zeros) >= 0.95 * len(zeros)


@torch.no_grad()
def test_every_layer_sees_what_the_float_model_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, x = quick("rtn", range_search="percentile"), varied()
    chain = pyramid(recipe)
    expected: dict[str, list[tuple[Tensor, ...]]] = {}
    handles = []
    for segment in chain:
        for name, layer in quant_layers(segment.block):
            calls = expected.setdefault(f"{segment.label}.{name}", [])
            handles.append(
                layer.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args))
            )
    for image in x:
        by_hand(chain, image)
    for handle in handles:
        handle.remove()
    with watched(monkeypatch) as seen:
        calibrate(chain, x, recipe)
    assert seen.keys() == expected.keys()
    kinds = {
        f"{segment.label}.{name}": layer
        for segment in chain
        for name, layer in quant_layers(segment.block)
    }
    for name, inputs in seen.items():
        calls = expected[name]
        if isinstance(kinds[name], QuantMatMul):
            assert len(inputs) == 2
            for found, parts in zip(inputs, zip(*calls, strict=True), strict=True):
                assert torch.equal(found, torch.cat(parts))
        elif isinstance(kinds[name], QuantLinear):
            rows = torch.cat([call[0].flatten(0, -2) for call in calls])
            assert inputs[0].ndim == 3
            assert torch.equal(inputs[0].flatten(0, 1), rows)
        else:
            assert len(inputs) == len(x)
            for found, (own,) in zip(inputs, calls, strict=True):
                assert torch.equal(found.flatten(2), own.flatten(2))
    # The neck's input consists of the kept outputs of the blocks before it, per image.
    assert {found.shape[1] for found in seen["neck.0"]} == {2 * WIDTH}


def test_layers_see_their_share_of_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, x = quick("rtn", range_search="percentile"), varied()
    with watched(monkeypatch) as whole:
        calibrate(pyramid(recipe), x, recipe)
    monkeypatch.setattr(capture, "ROWS", 5 * 10)
    monkeypatch.setattr(capture, "CONV_VALUES", 5 * 3 * WIDTH)
    with watched(monkeypatch) as seen:
        calibrate(pyramid(recipe), x, recipe)
    tokens = [image.shape[2] * image.shape[3] // 16 for image in x]
    assert min(tokens) > 10

    def chosen(rows: Tensor, lengths: list[int], wanted: int) -> Tensor:
        return torch.cat([part[spread(len(part), wanted)] for part in torch.split(rows, lengths)])

    fc1 = chosen(whole["blocks.1.mlp.fc1"][0].flatten(0, 1), tokens, 10)
    assert torch.equal(seen["blocks.1.mlp.fc1"][0].flatten(0, 1), fc1)
    # Windows have two rows, so an image leaves five, and both operands the same ones.
    windows = [count // 2 for count in tokens]
    for found, all_windows in zip(seen["blocks.0.product"], whole["blocks.0.product"], strict=True):
        assert torch.equal(found, chosen(all_windows, windows, 5))
    for found, own in zip(seen["predict.conv"], whole["predict.conv"], strict=True):
        assert found.shape == (1, WIDTH, 3, 1)
        assert torch.equal(found[0, :, :, 0], own[0, :, :, 0][:, spread(own.shape[2], 3)])
    # A neck of twice the channels leaves half the positions; the patch embedding's images stay.
    assert {found.shape for found in seen["neck.0"]} == {(1, 2 * WIDTH, 1, 1)}
    assert all(
        torch.equal(*pair) for pair in zip(seen["embed.proj"], whole["embed.proj"], strict=True)
    )
    assert [part.shape for part in seen["embed.proj"]] == [image.shape for image in x]


def test_wide_inputs_leave_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, x = quick("rtn", range_search="percentile"), varied()
    monkeypatch.setattr(capture, "VALUES", 5 * 12 * 16)
    with watched(monkeypatch) as seen:
        calibrate(pyramid(recipe), x, recipe)
    # Images have 24, 24, 16, 48 and 24 positions, windows two of them; a row of fc2 has 16 values,
    # one of fc1 8, a window 16.
    assert seen["blocks.0.mlp.fc2"][0].flatten(0, 1).shape == (5 * 12, 16)
    assert seen["blocks.0.mlp.fc1"][0].flatten(0, 1).shape == (4 * 24 + 16, 8)
    assert len(seen["blocks.0.product"][0]) == len(seen["blocks.0.product"][1]) == 4 * 12 + 8


@torch.no_grad()
def test_min_max_ranges_are_of_all_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little a search would see."""
    recipe, x = quick("rtn"), varied()
    plain = pyramid(recipe)
    calibrate(plain, x, recipe)
    for name in ("ROWS", "VALUES", "CONV_VALUES"):
        monkeypatch.setattr(capture, name, 5)
    thin = pyramid(recipe)
    calibrate(thin, x, recipe)
    assert all(
        torch.equal(*pair)
        for pair in zip(ranges(plain).values(), ranges(thin).values(), strict=True)
    )
    set_quantized(plain, False)
    fc1: list[Tensor] = []
    block = plain.segment(1).block
    block.get_submodule("mlp.fc1").register_forward_pre_hook(lambda _, args: fc1.append(args[0]))
    for image in x:
        by_hand(plain, image)
    low, high = min(float(part.min()) for part in fc1), max(float(part.max()) for part in fc1)
    found = block.get_submodule("mlp.fc1").input_quantizer.scale
    assert float(found) == pytest.approx((high - low) / (2**recipe.a_bits - 1), rel=1e-5)


class Upward(nn.Module):
    """One convolution called on two levels, a transposed one, and a linear layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up, self.fc = (
            nn.Conv2d(4, 6, 3, padding=1),
            nn.ConvTranspose2d(6, 5, 2, 2),
            nn.Linear(5, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        small, large = (self.conv(level).relu() for level in (x[..., ::2, ::2], x))
        out: Tensor = self.fc((self.up(small) + large[:, :5]).relu().permute(0, 2, 3, 1))
        return out


def upward(recipe: Recipe) -> BlockChain:
    torch.manual_seed(0)
    block = swap(Upward(), recipe)
    block.up = QuantConvTranspose2d.from_float(block.up, recipe.w_bits, recipe.a_bits)
    return BlockChain([Segment("head", "predictor", block)])


def regions(*counts: int) -> Samples:
    generator = torch.Generator().manual_seed(2)
    return Samples([torch.randn(count, 4, 8, 6, generator=generator) for count in counts])


EVERY = ["fimaq", "rtn", "repq", "erq", "adalog", "ptq4vit", "qdrop"]


@pytest.mark.parametrize("method", EVERY)
def test_every_recipe_calibrates_heads_on_images_with_any_number_of_regions(method: str) -> None:
    recipe = quick(method, w_bits=4, a_bits=4)
    x = regions(3, 0, 2, 1)
    chain = upward(recipe)
    full = torch.cat([chain(part) for part in x])
    calibrate(chain, x, recipe)
    freeze(chain)
    out = torch.cat([chain(part) for part in x])
    assert 0 < float((out - full).norm() / full.norm()) < 0.4
    assert all(layer.weight_quantizer.codes.numel() for _, layer in quant_layers(chain))
    # An image without regions counts for nothing.
    again = upward(recipe)
    calibrate(again, Samples([x[0], x[2], x[3]]), recipe)
    freeze(again)
    assert all(
        torch.equal(*pair)
        for pair in zip(ranges(chain).values(), ranges(again).values(), strict=True)
    )


@pytest.mark.parametrize("method", EVERY)
def test_every_recipe_calibrates_a_pyramid(method: str) -> None:
    recipe, x = quick(method, w_bits=6, a_bits=6), varied()
    chain = pyramid(recipe)
    full = [chain(image) for image in x]
    calibrate(chain, x, recipe)
    freeze(chain)
    error = sum((chain(image) - own).square().sum() for image, own in zip(x, full, strict=True))
    assert 0 < float(error / sum(own.square().sum() for own in full)) < 0.06


def test_a_layer_called_twice_is_calibrated_on_both(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = quick("rtn", range_search="percentile")
    for x, pieces in ((regions(3, 2), 2), (regions(5)[0], 2)):
        chain = upward(recipe)
        with watched(monkeypatch) as seen:
            calibrate(chain, x, recipe)
        found = seen["head.conv"]
        assert len(found) == pieces
        assert sum(part.numel() for part in found) == 5 * 4 * (48 + 12)
        values = torch.cat([part.flatten() for part in found]).sort().values
        given = torch.cat([level.flatten() for own in x for level in (own, own[..., ::2, ::2])])
        assert torch.equal(values, given.sort().values)


def test_a_layer_without_input_is_named() -> None:
    recipe = quick()
    with pytest.raises(NumericsError, match=r"head\.conv.*range_images"):
        calibrate(upward(recipe), regions(0, 0), recipe)
    chain = upward(recipe)
    chain.segment(0).block.add_module("idle", QuantLinear.from_float(nn.Linear(3, 3), 4, 4))
    with pytest.raises(NumericsError, match=r"head\.idle"):
        calibrate(chain, regions(2, 1), recipe)


def test_not_a_number_is_named_though_it_would_be_thinned_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(capture, "CONV_VALUES", 1)
    x = regions(3, 2)
    x.tensors[1][1, 2, 3, 4] = float("nan")
    with pytest.raises(NumericsError, match=r"head\.conv"):
        calibrate(upward(quick()), x, quick())


def test_segments_that_are_off_are_walked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backbone alone or neck alone: only the quantized layers get ranges and need inputs."""
    recipe, x = quick("rtn"), varied()
    full = pyramid(recipe)
    calibrate(full, x, recipe)
    for label in ("blocks.1", "neck"):
        chain = pyramid(recipe)
        for segment in chain:
            for _, layer in quant_layers(segment.block):
                for part in layer.children():
                    if segment.label != label:
                        part.bits = OFF  # type: ignore[assignment]
        with watched(monkeypatch) as seen:
            calibrate(chain, x, recipe)
        assert {name.rpartition(".")[0].removesuffix(".mlp") for name in seen} == {label}
        for segment, other in zip(chain, full, strict=True):
            for (_, layer), (_, same) in zip(
                quant_layers(segment.block), quant_layers(other.block), strict=True
            ):
                own, expected = layer.state_dict(), same.state_dict()
                for name in (name for name in own if name.endswith("scale")):
                    assert (
                        torch.equal(own[name], expected[name])
                        if segment.label == label
                        else own[name].numel() == 0
                    )


def test_only_the_first_images_set_ranges() -> None:
    recipe = quick("rtn", range_images=2)
    some, all_of_two = pyramid(recipe), pyramid(recipe)
    calibrate(some, varied(5), recipe)
    calibrate(all_of_two, Samples(varied(5).tensors[:2]), recipe)
    assert all(
        torch.equal(*pair)
        for pair in zip(ranges(some).values(), ranges(all_of_two).values(), strict=True)
    )


def test_convolutions_outside_the_patch_embedding_go_by_their_own_errors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[tuple[str, int]] = []
    for kind in ("calibrate_conv", "calibrate_conv_by_own_error"):
        monkeypatch.setattr(
            layer_ranges,
            kind,
            lambda layer, x, r, kind=kind, run=getattr(layer_ranges, kind): (
                called.append((kind, layer.out_channels)),
                run(layer, x, r),
            ),
        )
    recipe = quick()
    chain = pyramid(recipe)
    calibrate(chain, varied(), recipe)
    assert called == [
        ("calibrate_conv", WIDTH),
        ("calibrate_conv_by_own_error", WIDTH),
        ("calibrate_conv_by_own_error", 5),
    ]
    assert all(isinstance(layer, QuantConv2d) for _, layer in quant_layers(chain.segment(3).block))
