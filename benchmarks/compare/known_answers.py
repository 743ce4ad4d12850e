"""Small problems with exactly known answers, which reveal changed code on every processor.

Scores hide some faults. Ties are rare in data, so rounding them up instead of to even changes no
accuracy. One Fisher pass more or less changes the accuracy by less than another processor does.
"""

import torch
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, Segment
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.quantizers import affine
from fimaq_core.recipe import make_recipe
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.tape import Storage, Tape

#: Eight levels with step 0.5 and zero point 3: values from -1.5 to 2. Inputs are rounded to the
#: nearest code, and ties to the even code.
_SCALE, _ZERO_POINT, _BITS = 0.5, 3.0, 3
_INPUTS = (
    -9.0, -1.75, -1.25, -0.75, -0.3, -0.25, 0.0, 0.2,
    0.25, 0.3, 0.75, 1.25, 1.6, 1.75, 2.25, 9.0,
)  # fmt: skip
_ANSWERS = (-1.5, -1.5, -1.0, -1.0, -0.5, 0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 2.0)


def wrong() -> list[str]:
    """Return one line per wrong answer: none for an intact installation."""
    x, right = torch.tensor(_INPUTS), torch.tensor(_ANSWERS)
    scale, zero = torch.tensor([_SCALE]), torch.tensor([_ZERO_POINT])
    quantizer = affine.AffineQuantizer(_BITS)
    quantizer.set_range(scale, zero)
    quantizer.learning = "traced"
    levels, lines = 2**_BITS, []
    with torch.no_grad():
        forms = {
            "rounding to nearest": affine.fake_quantize(x, scale, zero, levels),
            "learned scale, fused": affine.learned_fake_quantize(x, scale, zero, levels),
            "learned scale, textbook": affine.textbook_fake_quantize(x, scale, zero, levels),
            "learned scale, traced": quantizer(x),
        }
    for name, found in forms.items():
        if (off := found != right).any():
            texts = [", ".join(f"{v:g}" for v in values[off]) for values in (x, found, right)]
            lines.append("  {}: {} became {}, right is {}".format(name, *texts))
    return [*lines, *_wrong_fisher_passes()]


class _HalfSquare(Divergence):
    """Half the squared distance. Its gradient with respect to an output is the output's error."""

    def __call__(self, outputs: Tensor, reference: Tensor) -> Tensor:
        return (outputs - reference).square().sum(1).mean() / 2


def _wrong_fisher_passes() -> list[str]:
    """Check three Fisher passes over an identity block whose output is wrong by 1, 2 and 4."""
    recipe = make_recipe("fimaq", {"loss": "fisher_diag", "steps": 9, "fisher_k": 3})
    chain = BlockChain([Segment(name, name, nn.Identity()) for name in ("block", "head")])
    images, storage = torch.arange(8.0).reshape(4, 2), Storage("device", torch.device("cpu"))
    tape = Tape(chain, images, storage, with_prefix=True, batch_size=2)
    tape.compute_target()
    objective = BlockObjective(chain, tape, recipe, tape.target, _HalfSquare(), [])
    for error in (1.0, 2.0, 4.0):
        objective.update(lambda x, error=error: x + error)

    def rounded(values: Tensor | None) -> list[float]:
        return [] if values is None else [round(value, 4) for value in values.flatten().tolist()]

    answers = {
        "Fisher passes": (sorted(objective.update_steps), [0, 3, 6]),
        "gradient per pass": (rounded(objective.state.gradients), [1.0, 1.0, 2.0, 2.0, 4.0, 4.0]),
        "diagonal Fisher weight": (rounded(objective.state.diagonal), [2.3333] * 2),
    }
    return [
        f"  {name}: {found}, right is {right}"
        for name, (found, right) in answers.items()
        if found != right
    ]
