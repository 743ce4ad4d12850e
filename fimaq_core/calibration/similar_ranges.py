"""Output errors of many candidate ranges of one operand, computed only as far as needed.

A search needs exact errors of its few best candidates only, and in later steps its candidates
hardly differ. So there are two ways:

* Sieve: errors are summed over pieces of the operand. A candidate is dropped once its sum so far
  exceeds the whole sums of ``width`` others.
* Run: the candidates of one kind, by ascending scale. The quantized operand is ``x̂ = s u - shift``
  with points u of unit scale, which are monotone in s. Between neighbouring scales few u change, so
  all errors follow from the first one. With ``ρ = s / s₀``, ``e`` the first output error, ``Y = s₀
  u₀ M`` and ``Δ = u - u₀`` the error is ``|e + (ρ - 1) Y + ρ s₀ ΔM|²``. ``Δ`` is a sum of few
  changes of single elements, so every term is a sum over changes; ``|ΔM|²`` is a sum over pairs of
  changes in the same row of the operand, with entries of ``G = MMᵀ``.
"""

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor

from fimaq_core.calibration.candidates import block_elements

#: Maps values, a scale that broadcasts to the values, and the candidate's kind (a zero point or a
#: numerator) to points u, a new tensor.
Points = Callable[[Tensor, Tensor, float], Tensor]
#: Costs of a run, as multiples of a single candidate's cost per element (measured on a CPU): per
#: element, per change, and per pair of changes in the same row.
_RUN_COST, _CHANGE_COST, _PAIR_COST = 3.0, 20.0, 8.0


def uniform_points(levels: int) -> Points:
    """Return the points of a uniform quantizer, whose kinds are zero points."""

    def points(values: Tensor, scale: Tensor, zero_point: float) -> Tensor:
        return torch.div(values, scale).round_().clamp_(-zero_point, levels - 1 - zero_point)

    return points


class RangeErrors:
    """Squared error of ``(s u(x) - shift) @ other`` against the full-precision product.

    Args:
        x, other: as of :class:`.output_error.Product`; x contains the shift.
        residual: ``(x - shift) @ (other - other in full precision)``.
        points: maps ``values`` to u.
        values: tensor of the shape of ``x``; by default ``x`` itself.
    """

    def __init__(
        self,
        x: Tensor,
        other: Tensor,
        residual: Tensor,
        points: Points,
        values: Tensor | None = None,
    ) -> None:
        self.x, self.points, self.values = x, points, x if values is None else values
        self.gram = other @ other.mT
        self.narrow = other.shape[2] <= other.shape[1]
        if self.narrow:
            self.matrix, self.term = other.contiguous(), residual
            self.constants = residual.new_zeros(len(x), dtype=torch.float64)
        else:
            self.matrix, self.term = self.gram, residual @ other.mT
            self.constants = residual.square().sum((1, 2)).double()
        self._base: Tensor | None = None
        self.step = max(block_elements(x.device) // (16 * x[0].numel()), 1)

    def best(self, scale: Tensor, kind: Tensor, width: int) -> Tensor:
        """Return errors, float64 (candidates,), of at least the ``width`` best candidates.

        The other errors may be infinite. ``kind`` (candidates,) is the last argument of ``points``.
        """
        self.scale, self.kinds = scale, kind.tolist()
        out = torch.full(scale.shape, torch.inf, dtype=torch.float64, device=scale.device)
        pairs = list(zip(self.kinds, scale.tolist(), range(len(scale)), strict=True))
        alone: list[int] = []
        for _, run in groupby(sorted(pairs), key=lambda pair: pair[0]):
            self._run([index for _, _, index in run], out, alone)
        if alone:
            self._sieve(torch.tensor(alone, device=scale.device), out, width)
        return out

    def _sieve(self, alive: Tensor, out: Tensor, width: int) -> None:
        """Write the errors of those candidates ``alive`` that may be among the best to ``out``."""
        partial = torch.zeros_like(out)
        start = 0
        while start < len(self.x) and len(alive):
            # The first piece is short; each later one is as long as all before together.
            stop = min(max(2 * start, self.step, len(self.x) // 8), len(self.x))
            partial[alive] += self._direct(alive, start, stop)
            if start == 0 and stop < len(self.x):
                # The whole errors of the most promising candidates are tight bounds for the others.
                order = partial[alive].argsort(stable=True)
                first, alive = alive[order[:width]], alive[order[width:]]
                out[first] = partial[first] + self._direct(first, stop, len(self.x))
            if width <= len(out):
                alive = alive[partial[alive] <= out.kthvalue(width).values]
            start = stop
        out[alive] = partial[alive]

    def _direct(self, which: Tensor, start: int, stop: int) -> Tensor:
        """Return the errors of candidates on entries ``start`` to ``stop``, one by one."""
        total = torch.zeros(len(which), dtype=torch.float64, device=which.device)
        candidates = which.tolist()
        for part in self._parts(start, stop):
            total += self.constants[part].sum()
            x, values, term = self.x[part], self.values[part], self.term[part]
            wide = term if self.narrow else 2 * term
            sums = []
            for index in candidates:
                scale = self.scale[index]
                delta = self.points(values, scale, self.kinds[index]).mul_(scale).sub_(x)
                made = self._product(delta, part).add_(wide)
                made = made.square_() if self.narrow else made.mul_(delta)
                sums.append(made.sum((1, 2)))
            total += torch.stack(sums).double().sum(1)
        return total

    def _parts(self, start: int, stop: int) -> list[slice]:
        firsts = range(start, stop, self.step)
        return [slice(first, min(first + self.step, stop)) for first in firsts]

    def _product(self, delta: Tensor, part: slice, transposed: bool = False) -> Tensor:
        matrix = self.matrix.mT if transposed else self.matrix
        if len(matrix) > 1:
            return torch.bmm(delta, matrix[part])
        return (delta.flatten(0, 1) @ matrix[0]).view(*delta.shape[:2], -1)

    def _run(self, run: list[int], out: Tensor, alone: list[int]) -> None:
        """Write the errors of a run to ``out``, or add the run to ``alone`` if it would be slow."""
        if len(run) <= _RUN_COST:
            alone += run
            return
        # A small sample tells how many changes a row has.
        probe = slice(0, max(min(self.step, len(self.x) // 16), 1))
        ends = [self._points(self.values[probe], index) for index in (run[0], run[-1])]
        counts = (ends[0] != ends[1]).sum(2, dtype=torch.float32)
        changes = (_CHANGE_COST * counts + _PAIR_COST * counts.square()).mean()
        if _RUN_COST * self.x.shape[2] + float(changes) > len(run) * self.x.shape[2]:
            half = len(run) // 2
            self._run(run[:half], out, alone)
            self._run(run[half:], out, alone)
            return
        sums = torch.stack([self._sums(part, run) for part in self._parts(0, len(self.x))]).sum(0)
        square, cross, whole, pairs, in_error, in_whole = sums
        scale = self.scale[run].double()
        more = scale / scale[0] - 1
        single = square + more * (2 * cross + more * whole)
        changed = scale * (2 * in_error + 2 * more * in_whole)
        out[run] = single + changed + scale.square() * pairs

    def _points(self, values: Tensor, index: int) -> Tensor:
        return self.points(values, self.scale[index], self.kinds[index])

    def _sums(self, part: slice, run: list[int]) -> Tensor:
        """Return sums (6, candidates): ``|e|²``, ``eY``, ``|Y|²``, ``|ΔM|²``, ``ΔMe``, ``ΔMY``.

        They are sums over the entries of ``part``.
        """
        if self._base is None:
            self._base = self._product(self.x, slice(None)) - self.term
        x, values, scale = self.x[part], self.values[part], self.scale[run[0]]
        first = self._points(values, run[0])
        changed = (first != self._points(values, run[-1])).flatten().nonzero()[:, 0]
        whole = first * scale
        delta = whole - x
        # e and Y, or both times Mᵀ.
        error = self._product(delta, part).add_(self.term[part])
        output = error + self._base[part]
        if self.narrow:
            dense = [error.square(), error * output, output.square()]
            error, output = self._product(error, part, True), self._product(output, part, True)
        else:
            dense = [(error + self.term[part]).mul_(delta), error * whole, output * whole]
        sums = [product.sum((1, 2)).double().sum() for product in dense]
        sums[0] = sums[0] + self.constants[part].sum()

        codes = self.points(values.flatten()[changed], self.scale[run, None], self.kinds[run[0]])
        step = (codes[1:] - codes[:-1]).t().contiguous()
        which, number = step.nonzero(as_tuple=True)
        step = step[which, number]
        element, number = changed[which], number + 1

        def total(changes: Tensor) -> Tensor:
            return _by_index(number, changes, len(run)).cumsum(0)

        linear = [total(step * dense_form.flatten()[element]) for dense_form in (error, output)]
        pairs = total(self._pairs(part, element, number, step))
        return torch.stack([*(one.expand(len(run)) for one in sums), pairs, *linear])

    def _pairs(self, part: slice, element: Tensor, number: Tensor, step: Tensor) -> Tensor:
        """Return what each change adds to ``|ΔM|²``, together with earlier changes of its row."""
        rows, inner = self.x.shape[1:]
        row, column = element // inner, element % inner
        order = number
        if len(number):
            order = (row * (int(number.max()) + 1) + number).argsort(stable=True)
        row, column, values = row[order], column[order], step[order]
        # Pairs: each change with every earlier change of its row, and with itself.
        every = torch.arange(len(row), device=row.device)
        _, lengths = torch.unique_consecutive(row, return_counts=True)
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        meets = every - starts + 1
        later = every.repeat_interleave(meets)
        place = torch.arange(len(later), device=row.device)
        earlier = place - (meets.cumsum(0) - meets - starts)[later]
        entry = 0 if len(self.gram) == 1 else (row // rows + part.start)[later] * inner
        product = self.gram.flatten()[(entry + column[later]) * inner + column[earlier]]
        product *= torch.where(later == earlier, 1, 2) * values[later] * values[earlier]
        sums = _by_index(later, product, len(row))
        return torch.zeros_like(step, dtype=torch.float64).index_copy_(0, order, sums)


def _by_index(index: Tensor, values: Tensor, count: int) -> Tensor:
    """Return the sum of the values of each index, float64 (count,)."""
    return torch.bincount(index, values.double(), count).double()
