"""Inputs whose quantized values are known exactly: they tell a changed quantizer at once, on every processor.

Scores cannot show all faults: whether a tie is rounded to even or up changes no accuracy, since ties hardly occur in data.
"""

import torch
from torch import Tensor

from fimaq_core.quantizers.affine import AffineQuantizer, fake_quantize, learned_fake_quantize, textbook_fake_quantize

#: Eight levels of step 0.5 with zero point 3: values from -1.5 to 2. Ties go to the even code, the rest to the nearest.
_SCALE, _ZERO_POINT, _BITS = 0.5, 3.0, 3
_INPUTS = (-9.0, -1.75, -1.25, -0.75, -0.3, -0.25, 0.0, 0.2, 0.25, 0.3, 0.75, 1.25, 1.6, 1.75, 2.25, 9.0)
_ANSWERS = (-1.5, -1.5, -1.0, -1.0, -0.5, 0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.5, 2.0, 2.0, 2.0)


def wrong() -> list[str]:
    """Return a line for each form of the uniform quantizer that misses a known answer; empty for an intact installation."""
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


def _list(values: Tensor) -> str:
    return ", ".join(f"{value:g}" for value in values.tolist())
