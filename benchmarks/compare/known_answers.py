"""Small problems whose answers are known exactly. They tell changed code on every processor.

Scores cannot show all faults. Whether a tie is rounded to even or up changes no accuracy, since ties
hardly occur in data; and one Fisher pass more or less changes it by less than another processor does.
"""

import torch
from torch import Tensor, nn

from fimaq_core.chain import BlockChain, Segment
from fimaq_core.fisher.divergence import Divergence
from fimaq_core.quantizers.affine import (
    AffineQuantizer,
    fake_quantize,
    learned_fake_quantize,
    textbook_fake_quantize,
)
from fimaq_core.recipe import make_recipe
from fimaq_core.reconstruction.objective import BlockObjective
from fimaq_core.reconstruction.tape import Storage, Tape

#: Eight levels of step 0.5 with zero point 3: values from -1.5 to 2. Ties go to the even code, the
#: rest to the nearest.
_SCALE, _ZERO_POINT, _BITS = 0.5, 3.0, 3
_INPUTS = (
    -9.0,
    -1.75,
    -1.25,
    -0.75,
    -0.3,
    -0.25,
    0.0,
    0.2,
    0.25,
    0.3,
    0.75,
    1.25,
    1.6,
    1.75,
    2.25,
    9.0,
)
_ANSWERS = (-1.5, -1.5, -1.0, -1.0, -0.5, 0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 2.0)


def wrong() -> list[str]:
    """Return a line for each wrong answer; empty for an intact installation."""
    return [*_wrong_quantizers(), *_wrong_fisher_passes()]


def _wrong_quantizers() -> list[str]:
    inputs, answers = torch.tensor(_INPUTS), torch.tensor(_ANSWERS)
    return [
        f"  {name}: {_list(inputs[found != answers])} became {_list(found[found != answers])}, "
        f"right is {_list(answers[found != answers])}"
        for name, found in _forms(inputs).items()
        if not torch.equal(found, answers)
    ]


def _forms(x: Tensor) -> dict[str, Tensor]:
    scale, zero = torch.tensor([_SCALE]), torch.tensor([_ZERO_POINT])
    quantizer = AffineQuantizer(_BITS)
    quantizer.set_range(scale, zero)
    quantizer.learning = "traced"
    with torch.no_grad():
        return {
            "rounding to nearest": fake_quantize(x, scale, zero, 2**_BITS),
            "learned scale, fused": learned_fake_quantize(x, scale, zero, 2**_BITS),
            "learned scale, textbook": textbook_fake_quantize(x, scale, zero, 2**_BITS),
            "learned scale, traced": quantizer(x),
        }


class _HalfSquare(Divergence):
    """Half the squared distance: its gradient at an output is the output's error."""

    def __call__(self, outputs: Tensor, reference: Tensor) -> Tensor:
        return (outputs - reference).square().sum(1).mean() / 2


def _wrong_fisher_passes() -> list[str]:
    """Three passes of FIMA-Q over an identity, with the block's output off by 1, 2 and 4."""
    recipe = make_recipe("fimaq", {"loss": "fisher_diag", "steps": 9, "fisher_k": 3})
    chain = BlockChain(
        [Segment("block", "block", nn.Identity()), Segment("head", "head", nn.Identity())]
    )
    images = torch.arange(8.0).reshape(4, 2)
    tape = Tape(
        chain, images, Storage("device", torch.device("cpu")), with_prefix=True, batch_size=2
    )
    tape.compute_target()
    target = tape.target
    objective = BlockObjective(chain, tape, recipe, target, _HalfSquare(), [])
    block = chain.segment(0).block
    for error in (1.0, 2.0, 4.0):
        objective.update(lambda x, error=error: block(x) + error)
    found = {
        "Fisher passes": (sorted(objective.update_steps), [0, 3, 6]),
        "gradient of each pass": (
            _rounded(objective.state.gradients),
            [1.0, 1.0, 2.0, 2.0, 4.0, 4.0],
        ),
        "diagonal Fisher weight": (_rounded(objective.state.diagonal), [2.3333, 2.3333]),
    }
    return [
        f"  {name}: {here}, right is {right}"
        for name, (here, right) in found.items()
        if here != right
    ]


def _rounded(values: Tensor | None) -> list[float]:
    return [] if values is None else [round(value, 4) for value in values.flatten().tolist()]


def _list(values: Tensor) -> str:
    return ", ".join(f"{value:g}" for value in values.tolist())
