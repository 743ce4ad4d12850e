"""Choice of the bits of all layers: the least divergence within a budget.

Divergences of single operands are added up, as if they did not influence each other (HAWQ-V2: Dong
et al., NeurIPS 2020, arXiv:1911.03852). The choice is a knapsack with one choice per layer.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np
from scipy import optimize, sparse

from fimaq_core.errors import RecipeError
from fimaq_core.recipe import OFF
from fimaq_core.sensitivity import Sensitivity

#: Bits by operand.
Bits = dict[str, int]
#: Costs of a layer, by its name and bits: one per budget.
Cost = Callable[[str, Bits], tuple[float, ...]]


class Choice(NamedTuple):
    """One possible choice of a layer's bits."""

    bits: Bits
    loss: float  # sum of the divergences of its operands
    costs: tuple[float, ...]  # one per budget


def suggest_bits(
    rows: Iterable[Sensitivity], cost: Cost, budgets: Sequence[float], *, tied: Collection[str] = ()
) -> dict[str, Bits]:
    """Return the bits by layer with the least sum of exact divergences within ``budgets``.

    Args:
        rows: divergence of each operand at each bit-width that it may have.
        cost: costs of a layer; the sum over layers of each cost is at most its budget.
        budgets: one limit per cost.
        tied: names of layers whose operands must have equal bits.

    Raises:
        RecipeError: no choice meets the budgets.
    """
    losses: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        losses.setdefault(row.layer, {}).setdefault(row.operand, {})[row.bits] = row.exact
    choices: dict[str, list[Choice]] = {}
    for layer, own in losses.items():
        for widths in product(*own.values()):
            bits = dict(zip(own, widths, strict=True))
            if layer not in tied or len(set(widths)) == 1:
                loss = sum(own[operand][width] for operand, width in bits.items())
                choices.setdefault(layer, []).append(Choice(bits, loss, cost(layer, bits)))
    return {layer: choice.bits for layer, choice in choose(choices, budgets).items()}


def choose(choices: Mapping[str, Sequence[Choice]], budgets: Sequence[float]) -> dict[str, Choice]:
    """Pick one choice per layer: least sum of losses, each sum of costs at most its budget.

    HiGHS (``scipy.optimize.milp``) solves it. Raises RecipeError if no choice meets the budgets, or
    if the best one is not found in a minute.
    """
    flat = [choice for own in choices.values() for choice in own]
    sizes = [len(own) for own in choices.values()]
    groups = sparse.block_diag([np.ones((1, size)) for size in sizes], format="csr")
    losses = np.array([choice.loss for choice in flat])
    costs = np.array([choice.costs for choice in flat]).T
    found = optimize.milp(
        losses / max(float(np.abs(losses).max()), 1e-300),
        integrality=np.ones(len(flat)),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(groups, 1, 1),
            # Sums are rounded, and a budget may be met exactly.
            optimize.LinearConstraint(costs, ub=np.asarray(budgets) * (1 + 1e-9)),
        ],
        options={"mip_rel_gap": 1e-6, "time_limit": 60.0},
    )
    if found.status == 1:
        raise RecipeError("No best choice of bits was found in a minute: allow fewer bit-widths.")
    if found.x is None:
        raise RecipeError(
            "No choice of bits meets the budget: raise the budget or allow smaller bit-widths."
        )
    ends = np.cumsum(sizes)[:-1]
    picked = [int(np.argmax(part)) for part in np.split(found.x, ends)]
    return {layer: own[at] for (layer, own), at in zip(choices.items(), picked, strict=True)}


def mean_bits_cost(rows: Iterable[Sensitivity]) -> Cost:
    """Return a cost with two sums over layers: the mean bits of weights, and of other operands.

    Weights count by their number, other operands by their values per sample.
    """
    values = {(row.layer, row.operand): row.values for row in rows}
    totals = [
        max(sum(n for (_, operand), n in values.items() if (operand == "w") is weights), 1)
        for weights in (True, False)
    ]

    def cost(layer: str, bits: Bits) -> tuple[float, ...]:
        sums = [0.0, 0.0]
        for operand, width in bits.items():
            sums[operand != "w"] += width * values[layer, operand]
        return tuple(own / total for own, total in zip(sums, totals, strict=True))

    return cost


def bops_cost(macs: Mapping[str, int], uniform: Mapping[str, Bits]) -> Cost:
    """Return a cost whose sum is the bit operations as a share of those of ``uniform`` bits.

    A layer's bit operations are its multiply-adds ``macs`` times the bits of both operands, 32 for
    an operand that is not quantized (Bayesian Bits: van Baalen et al., NeurIPS 2020,
    arXiv:2005.07093). Layers without a quantized operand do not count.
    """

    def bops(layer: str, bits: Bits) -> float:
        return float(macs[layer] * prod(bits.values()) * OFF ** (2 - len(bits)))

    total = sum(bops(layer, bits) for layer, bits in uniform.items())
    return lambda layer, bits: (bops(layer, bits) / total,)
