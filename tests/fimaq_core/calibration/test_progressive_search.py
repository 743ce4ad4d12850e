"""The progressive search against fine grids and a plain loop of its steps with direct errors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fimaq_core.calibration.candidates import MIN_SCALE, MIN_WEIGHT_SCALE, Candidates
from fimaq_core.calibration.output_error import Product
from fimaq_core.calibration.progressive import (
    progressive,
    progressive_heads,
    progressive_rows,
    start_grid,
)
from fimaq_core.calibration.weight_error import input_moments
from fimaq_core.quantizers.affine import fake_quantize


def heavy(*shape: int) -> Tensor:
    """Values with a heavy tail (Student's t, 3 degrees of freedom)."""
    return torch.randn(shape) / (torch.randn(3, *shape).square().mean(0)).sqrt()


def loop(
    error: Callable[[float, float], float],
    start: list[tuple[float, float]],
    new: int,
    spacing: float,
    floor: float,
) -> tuple[float, float]:
    """Search one group in plain Python: the least error of the start, and of all candidates."""
    found = sorted((error(*pair), number, pair) for number, pair in enumerate(start))
    first = least = found[0][0]
    for _ in range(5):
        pairs = [
            (max(scale + (i / (new - 1) - 0.5) * spacing, floor), zero)
            for _, _, (scale, zero) in found[:16]
            for i in range(new)
        ]
        spacing /= new - 0.5
        found = sorted((error(*pair), number, pair) for number, pair in enumerate(pairs))
        least = min(least, found[0][0])
    return first, least


def check(
    direct: Callable[[float, float], float],
    rows: Tensor,
    levels: int,
    found: tuple[float, float],
    floor: float,
) -> None:
    """Compare the result for one group with sorted values ``rows`` with the loop's least error."""
    start = start_grid(rows[None], levels, 128, floor)
    pairs = list(zip(start.scale[:, 0].tolist(), start.zero_point[:, 0].tolist(), strict=True))
    first, least = loop(direct, pairs, 8, pairs[1][0] - pairs[0][0], floor)
    # The errors' rounding may let other candidates through at the edge of those kept.
    assert direct(*found) == pytest.approx(least, rel=1e-3)
    assert direct(*found) <= first * (1 + 1e-6)


@pytest.mark.parametrize("new", [2, 3, 8])
def test_convex_errors_are_followed_to_the_last_spacing(new: int) -> None:
    torch.manual_seed(new)
    groups, steps = 40, 6
    wanted, zero = (
        torch.rand(groups, dtype=torch.float64) * 3 + 0.5,
        torch.randint(0, 4, (groups,)).double(),
    )

    def errors(candidates: Candidates, _: int) -> Tensor:
        return (candidates.scale / wanted - 1).square() + (candidates.zero_point - zero).square()

    scales = torch.linspace(0.4, 3.6, 9, dtype=torch.float64)
    start = Candidates(
        scales.repeat(4)[:, None].expand(-1, groups),
        torch.arange(4.0).double().repeat_interleave(9)[:, None],
    )
    start = Candidates(start.scale, start.zero_point.expand(-1, groups))
    spacing = torch.full((groups,), 0.4, dtype=torch.float64)
    found, found_zero = progressive(errors, start, 16, new, steps, spacing)
    assert found.shape == found_zero.shape == (groups,)
    assert torch.equal(found_zero, zero)
    fine = torch.linspace(0.4, 3.6, 100001, dtype=torch.float64)
    optimum = fine[
        errors(Candidates(fine[:, None].expand(-1, groups), zero.expand(100001, -1)), 1).argmin(0)
    ]
    assert ((found - optimum).abs() <= 0.4 / (new - 0.5) ** (steps - 2) + 4e-5).all()


def test_the_best_of_the_start_is_not_lost() -> None:
    # Only the start's own scales are good; with an even number no refinement meets them again.
    start = Candidates(
        torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]),
        torch.tensor([[0.0, 5.0], [1.0, 6.0], [2.0, 7.0]]),
    )

    def errors(candidates: Candidates, _: int) -> Tensor:
        off = (candidates.scale != candidates.scale.round()).double()
        return 100 * off + (candidates.scale - torch.tensor([3.0, 1.0])).abs()

    scale, zero = progressive(errors, start, 2, 8, 6, torch.ones(2))
    assert scale.tolist() == [3.0, 1.0]
    assert zero.tolist() == [2.0, 5.0]


def test_a_middle_step_is_remembered() -> None:
    def errors(candidates: Candidates, _: int) -> Tensor:
        return torch.where(candidates.scale == 0.5, 0.0, candidates.scale.double() + 1)

    # The first refinement of 1 with spacing 1 is (0.5, 1.5); later ones go to worse scales.
    scale, _ = progressive(
        errors, Candidates(torch.ones(1, 1), torch.zeros(1, 1)), 1, 2, 4, torch.ones(1)
    )
    assert scale.tolist() == [0.5]


def test_one_step_is_a_plain_search() -> None:
    torch.manual_seed(0)
    table = torch.rand(50, 7)
    start = Candidates(torch.rand(50, 7), torch.rand(50, 7))
    scale, zero = progressive(lambda *_: table, start, 16, 8, 1, torch.ones(7))
    expected = start.pick(table.argmin(0))
    assert torch.equal(scale, expected[0])
    assert torch.equal(zero, expected[1])


def test_scales_stay_positive() -> None:
    seen: list[Tensor] = []

    def errors(candidates: Candidates, _: int) -> Tensor:
        seen.append(candidates.scale)
        return candidates.scale

    start = Candidates(torch.tensor([[0.01], [1.0]]), torch.zeros(2, 1))
    scale, _ = progressive(errors, start, 2, 8, 3, torch.tensor([0.99]), min_scale=0.002)
    assert scale.item() == pytest.approx(0.002)
    assert min(float(scales.min()) for scales in seen) == pytest.approx(0.002)


def test_too_few_new_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        progressive(
            lambda candidates, _: candidates.scale,
            Candidates(torch.ones(1, 1), torch.ones(1, 1)),
            1,
            1,
            2,
            torch.ones(1),
        )


@pytest.mark.parametrize("levels", [8, 16])
@pytest.mark.parametrize("own", [True, False], ids=["own error", "output error"])
def test_rows_equal_the_loop(levels: int, own: bool) -> None:
    torch.manual_seed(levels)
    x = heavy(200, 12) * torch.linspace(0.2, 3, 12) + 1
    x_hat = fake_quantize(x, torch.tensor(0.7), torch.tensor(8.0), 16)
    weight = heavy(5, 12)
    moments = None if own else input_moments(x, x_hat, weight)
    scale, zero = progressive_rows(weight, levels, 128, moments=moments)
    assert scale.shape == zero.shape == (5,)
    for row in range(5):
        w = weight[row].double()

        def direct(scale: float, zero: float, w: Tensor = w) -> float:
            quantized = fake_quantize(
                w, torch.tensor(scale).double(), torch.tensor(zero).double(), levels
            )
            delta = quantized - w
            if own:
                return float(delta.square().sum())
            return float((x_hat.double() @ delta + (x_hat - x).double() @ w).square().sum())

        check(
            direct,
            weight[row].sort().values,
            levels,
            (float(scale[row]), float(zero[row])),
            MIN_WEIGHT_SCALE,
        )


def test_rows_by_own_error_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight = heavy(7, 30)
    whole = progressive_rows(weight, 8, 128)
    monkeypatch.setattr("fimaq_core.calibration.own_error._TABLE", 3 * 128 * 8)
    for mine, expected in zip(progressive_rows(weight, 8, 128), whole, strict=True):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize(
    ("levels", "zeros"),
    [(4, [1, 2]), (8, [2, 3, 4, 5]), (16, list(range(4, 12))), (256, list(range(120, 136)))],
)
def test_the_first_grid_has_at_most_half_as_many_zero_points_as_levels(
    levels: int, zeros: list[int]
) -> None:
    grid = start_grid(torch.linspace(-1, 1, 101)[None], levels, 128)
    assert grid.zero_point.unique().tolist() == zeros
    scales = 128 // len(zeros)
    spans = [1.6 + 0.4 * i / (scales - 1) for i in range(scales)]  # the 0.1 to 0.9 quantiles, all
    found = grid.scale[:scales, 0] * (levels - 1)
    assert torch.allclose(found, torch.tensor(spans), atol=1e-4)


def test_a_row_of_zeros_has_a_range() -> None:
    weight = torch.stack([torch.zeros(20), torch.linspace(-1, 1, 20)])
    scale, zero = progressive_rows(weight, 8, 128)
    assert (scale > 0).all()
    assert torch.equal(fake_quantize(weight, scale[:, None], zero[:, None], 8)[0], weight[0])


@pytest.mark.parametrize("columns", [4, 20], ids=["direct form", "gram form"])
def test_input_equals_the_loop(columns: int) -> None:
    torch.manual_seed(columns)
    levels = 16
    x, plain = heavy(3, 20, 9), torch.randn(1, 9, columns)
    other = plain + 0.1 * torch.randn_like(plain)
    product = Product(x, other, x @ (other - plain), levels)
    ordered = x.flatten().sort().values
    scale, zero = progressive_heads(
        product, start_grid(ordered[None], levels, 128), levels=levels, count=128
    )
    assert scale.shape == zero.shape == (1,)

    def direct(scale: float, zero: float) -> float:
        quantized = fake_quantize(
            x.double(), torch.tensor(scale).double(), torch.tensor(zero).double(), levels
        )
        return float((quantized @ other.double() - x.double() @ plain.double()).square().sum())

    check(direct, ordered, levels, (float(scale), float(zero)), MIN_SCALE)


def test_heads_equal_the_loop() -> None:
    torch.manual_seed(0)
    heads, images, levels = 3, 4, 8
    x, plain = (
        heavy(heads, images, 10, 6) * torch.tensor([0.3, 1.0, 4.0]).view(-1, 1, 1, 1),
        torch.randn(heads, images, 6, 5),
    )
    other = plain + 0.1 * torch.randn_like(plain)
    product = Product(
        x.flatten(0, 1), other.flatten(0, 1), (x @ (other - plain)).flatten(0, 1), levels
    )
    ordered = x.flatten(1).sort(dim=1).values
    scale, zero = progressive_heads(
        product, start_grid(ordered, levels, 128), levels=levels, count=128
    )
    assert scale.shape == zero.shape == (heads,)
    for head in range(heads):

        def direct(scale: float, zero: float, head: int = head) -> float:
            quantized = fake_quantize(
                x[head].double(), torch.tensor(scale).double(), torch.tensor(zero).double(), levels
            )
            return float(
                (quantized @ other[head].double() - x[head].double() @ plain[head].double())
                .square()
                .sum()
            )

        check(direct, ordered[head], levels, (float(scale[head]), float(zero[head])), MIN_SCALE)
