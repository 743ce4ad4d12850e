"""Choice of bits within a budget: the optimum of brute force, and budgets that hold."""

from itertools import product

import numpy as np
import pytest

from fimaq_core.bits_budget import Choice, bops_cost, choose, mean_bits_cost, suggest_bits
from fimaq_core.errors import RecipeError
from fimaq_core.sensitivity import Sensitivity

WIDTHS = (2, 4, 8)
VALUES = {("one", "w"): 30, ("one", "a"): 7, ("two", "a"): 5, ("two", "b"): 11, ("three", "w"): 10}


def rows(seed: int) -> list[Sensitivity]:
    """Divergences of three layers; ``three`` has a weight only."""
    generator = np.random.default_rng(seed)
    return [
        Sensitivity(*key, width, values, float(generator.random()) * 4.0**-width)
        for key, values in VALUES.items()
        for width in WIDTHS
    ]


def loss_of(measured: list[Sensitivity], bits: dict[str, dict[str, int]]) -> float:
    return sum(row.exact for row in measured if bits[row.layer][row.operand] == row.bits)


def every_choice() -> list[dict[str, dict[str, int]]]:
    found = []
    for widths in product(WIDTHS, repeat=len(VALUES)):
        bits: dict[str, dict[str, int]] = {}
        for (layer, operand), width in zip(VALUES, widths, strict=True):
            bits.setdefault(layer, {})[operand] = width
        found.append(bits)
    return found


def means(bits: dict[str, dict[str, int]]) -> tuple[float, float]:
    weights = (30 * bits["one"]["w"] + 10 * bits["three"]["w"]) / 40
    inputs = (7 * bits["one"]["a"] + 5 * bits["two"]["a"] + 11 * bits["two"]["b"]) / 23
    return weights, inputs


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tied", [(), ("one",)])
def test_mean_bits_equal_brute_force(seed: int, tied: tuple[str, ...]) -> None:
    measured = rows(seed)
    found = suggest_bits(measured, mean_bits_cost(measured), (4, 4), tied=tied)
    allowed = [
        bits
        for bits in every_choice()
        if max(means(bits)) <= 4 and (not tied or bits["one"]["w"] == bits["one"]["a"])
    ]
    assert found in allowed
    best = min(loss_of(measured, bits) for bits in allowed)
    assert loss_of(measured, found) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("share", [0.4, 0.5, 1.0])
def test_bops_equal_brute_force(share: float) -> None:
    measured, macs = rows(7), {"one": 50, "two": 20, "three": 4, "not quantized": 1000}
    uniform = {
        "one": {"w": 4, "a": 4}, "two": {"a": 4, "b": 4}, "three": {"w": 4}
    }  # fmt: skip
    cost = bops_cost(macs, uniform)

    def bops(bits: dict[str, dict[str, int]]) -> float:
        one, two = bits["one"], bits["two"]
        return (
            50 * one["w"] * one["a"] + 20 * two["a"] * two["b"] + 4 * 32 * bits["three"]["w"]
        ) / (50 * 16 + 20 * 16 + 4 * 32 * 4)

    assert sum(cost(*item)[0] for item in uniform.items()) == pytest.approx(1)
    found = suggest_bits(measured, cost, (share,))
    allowed = [bits for bits in every_choice() if bops(bits) <= share * (1 + 1e-9)]
    best = min(loss_of(measured, bits) for bits in allowed)
    assert bops(found) <= share * (1 + 1e-9)
    assert loss_of(measured, found) == pytest.approx(best, rel=1e-6)


def test_a_budget_below_all_choices_is_one_error() -> None:
    choices = {"one": [Choice({"w": 3}, 0.1, (3.0,)), Choice({"w": 4}, 0.0, (4.0,))]}
    assert choose(choices, (3.0,))["one"].bits == {"w": 3}
    with pytest.raises(RecipeError, match="raise the budget or allow smaller"):
        choose(choices, (2.9,))
