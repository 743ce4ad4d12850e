"""Settings of a quantization: the fields of a recipe, with their defaults, bounds and help.

The defaults are FIMA-Q's released settings.
"""

from functools import partial
from typing import Any, Literal

from pydantic import Field

from fimaq_core.bits_map import BitsMap
from fimaq_core.documents import Strict
from fimaq_core.methods import OFF

#: Names of block losses; :func:`fimaq_core.fisher.losses.register_loss` adds to them.
LOSSES = ["mse", "mae", "fisher_brecq", "fisher_diag", "fisher_lr", "fisher_dplr"]
LOSSES += ["perturb", "perturb_mean", "prediction", "least_squares", "mse_adalog"]
LOSSES += ["prediction_pdquant", "glf"]
#: Losses that compare predictions of the whole model; losses not divided by their first values.
PREDICTION = ("prediction", "prediction_pdquant")
UNDIVIDED = ("mse_adalog", "prediction_pdquant")
#: Losses through the full-precision model behind the block.
THROUGH_REST = (*PREDICTION, "glf")

#: Kinds of activation quantizers.
Kind = Literal["uniform", "log2", "logsqrt2", "adalog", "twin"]
_Arithmetic = Literal["float32", "tf32", "bfloat16"]


def _field(group: str, default: Any, help: str, **kwargs: Any) -> Any:
    if type(default) is int:
        kwargs.setdefault("le", 2**31 - 1)
    return Field(default, description=help, json_schema_extra={"group": group}, **kwargs)


_method, _bits, _range = (partial(_field, group) for group in ("method", "bits", "calibration"))
_mlp, _recon, _loss = (partial(_field, group) for group in ("mlp", "reconstruction", "loss"))
_finish, _numerics = partial(_field, "finish"), partial(_field, "numerics")


class Settings(Strict, allow_inf_nan=False):
    """All fields of a recipe; :class:`fimaq_core.recipe.Recipe` checks them together."""

    method: str = _method("fimaq", "Method that the recipe started from.")
    seed: int = _method(
        3407, "Seed of calibration images, batches, dropping, Fisher passes.", ge=0, le=2**63 - 1
    )
    scope: str | None = _method(
        None,
        "Quantized part of the model, as the task names it (retrieval: both, vision, text; "
        "detection: backbone+fpn+rpn+roi or some of them); if not given, the task's usual part.",
    )

    w_bits: int = _bits(4, "Bits of weights, 2 to 8, or 32 for off.")
    a_bits: int = _bits(4, "Bits of linear inputs and attention operands, 2 to 8, or 32 for off.")
    s_bits: int | None = _bits(None, "Bits of softmax outputs; as a_bits if not given.")
    head_bits: int | None = _bits(None, "Bits of the classifier's input; as a_bits if not given.")
    patch_input_bits: int = _bits(
        OFF, "Bits of the patch embedding's input; 32 (off) as in the released code."
    )
    bits_map: BitsMap | None = _bits(
        None,
        "Bits of single layers in place of those above: 'layer: {w: 3, a: 4}' lines, for products "
        "'{a: 4, b: 4}'.",
    )

    calibration_images: int = _range(1024, "Images drawn for calibration and reconstruction.", ge=1)
    calibration_transform: Literal["eval", "train"] = _range(
        "train", "Transform of the calibration images: 'train' as released (seeded), or 'eval'."
    )
    rotate: Literal["none", "hadamard"] = _range(
        "none",
        "Rotate residual stream and heads by Hadamard matrices, folded into the weights before "
        "everything else; the float function stays.",
    )
    softmax_quantizer: Kind = _range("uniform", "Quantizer of softmax outputs.")
    gelu_quantizer: Kind = _range("uniform", "Quantizer of GELU outputs.")
    range_search: Literal["minmax", "percentile", "output-error", "progressive"] = _range(
        "output-error",
        "Search of scales and zero points: min-max; the best of three percentiles by own error "
        "(RepQ-ViT); a grid by the layer's output error; that grid refined step by step (AdaLog).",
    )
    range_images: int = _range(128, "Calibration images for ranges: the first ones.", ge=1)
    range_candidates: int = _range(128, "Candidates per search.", ge=16)
    range_grid: Literal["released", "extended"] = _range(
        "released",
        "Candidates of range searches: those of the released code, or these and ranges that reach "
        "all values, min-max among them.",
    )
    range_inputs: Literal["float", "quantized"] = _range(
        "float",
        "Inputs for ranges: in the float model, or behind layers that are quantized already "
        "(RepQ-ViT).",
    )
    range_rounds: int = _range(3, "Rounds of alternating search.", ge=0)
    reparameterize: bool = _range(
        True,
        "Reparameterise LayerNorm and the linear layer behind it (if weight and activation bits "
        "agree; with percentile ranges always). Rotated models are never reparameterised.",
    )
    reparameterize_merges: bool = _range(
        True, "Reparameterise also the norm before the reduction of a patch merging."
    )
    refit: bool = _range(False, "Refit weights by ridge regression, refine roundings (ERQ).")
    refit_ridge: float = _range(1000.0, "Ridge of the refit, added to sums over tokens.", ge=0)
    refit_rule: Literal["error", "gradient"] = _range(
        "error",
        "Rule for changing a rounding: the error falls, or the gradient also exceeds half a step; "
        "then the patch embedding is left as it is (ERQ).",
    )
    refit_flips: int = _range(100, "Limit of changed roundings per row and half.", ge=0)
    revision: int = _range(
        1,
        "Version of the algorithms, raised where their results change; it follows from the other "
        "settings.",
        ge=1,
    )
    per_token: bool = _range(True, "Expand activation scales to one per token position (FIMA-Q).")

    reconstruct_mlp: bool = _mlp(
        False, "First replace GELU by ReLU and train each MLP to give its old outputs (APHQ-ViT)."
    )
    mlp_steps: int = _mlp(20_000, "Optimisation steps per MLP.", ge=1)
    mlp_batch: int = _mlp(32, "Images per step of an MLP's optimisation.", ge=1)
    mlp_lr: float = _mlp(4e-5, "Learning rate of an MLP's weights (Adam, cosine to 0).", gt=0)
    mlp_percentile: float = _mlp(
        0.99, "Quantile of positive hidden values at which the second term clamps.", gt=0, le=1
    )
    mlp_loss: Literal["perturb_mean", "mse"] = _mlp(
        "perturb_mean",
        "MLP loss: weighted by the mean perturbation Hessian, or squared error (mse).",
    )

    reconstruct: bool = _recon(True, "Reconstruct blocks after calibration.")
    reconstruct_parts: Literal["all", "blocks"] = _recon(
        "all", "Reconstruct everything, or only transformer blocks and patch mergings."
    )
    start: Literal["nearest", "gptq", "gptaq"] = _recon(
        "nearest",
        "Weights at the start: rounded to nearest, or in closed form by GPTQ or GPTAQ. Without "
        "reconstruction these are the final weights; with it, the rounding regulariser acts from "
        "the first step.",
    )
    start_damp: float = _recon(
        0.01, "Damping of a closed form, as a share of the Hessian's mean diagonal.", gt=0
    )
    weight_learning: Literal["rounding", "straight-through"] = _recon(
        "rounding", "Learn how weights are rounded, or the weights by straight-through gradients."
    )
    lr_weight: float = _recon(
        2e-5, "Learning rate of straight-through weights (Adam, cosine to 0).", gt=0
    )
    steps: int = _recon(20_000, "Optimisation steps per block.", ge=1)
    batch_size: int = _recon(32, "Images per step.", ge=1)
    prefix_prob: float = _recon(
        0.5, "Share of a block's input from the quantized prefix, in steps of 1/256.", ge=0, le=1
    )
    activation_prob: float = _recon(
        0.5, "Share of activations quantized in training, in steps of 1/256.", ge=0, le=1
    )
    lr_alpha: float = _recon(1e-3, "Learning rate of the rounding variables (Adam).", gt=0)
    lr_scale: float = _recon(4e-5, "Learning rate of activation scales (Adam, cosine to 0).", gt=0)
    learn_scales: bool = _recon(True, "Learn activation scales.")
    round_weight: float = _recon(0.01, "Weight of the rounding regulariser.", ge=0)
    round_warmup: float = _recon(0.2, "Share of steps before the regulariser starts.", ge=0, lt=1)
    beta_start: float = _recon(20.0, "Exponent of the regulariser at its start.", ge=1)
    beta_end: float = _recon(2.0, "Exponent of the regulariser at the end.", ge=1)

    loss: str = _loss("fisher_dplr", f"Block loss: {', '.join(LOSSES)}.")
    loss_start: float | None = _loss(
        None,
        "Value that the losses of all blocks, the head's too, start at (2 in APHQ-ViT's code); if "
        "not given, the losses' own values, and the head's KL is not divided by its start.",
        gt=0,
    )
    fisher_k: int = _loss(5, "Fisher passes per block, the low-rank part's rank.", ge=1, le=64)
    fisher_mode: Literal["q", "qf"] = _loss(
        "q", "Fisher passes spread over the steps (q) or before the first k (qf)."
    )
    fisher_p1: float = _loss(1.0, "Weight of the low-rank part.", ge=0)
    fisher_p2: float = _loss(1.0, "Weight of the diagonal part.", ge=0)
    fisher_drop: bool = _loss(True, "Keep random dropping active in Fisher passes, as released.")
    perturbation: float = _loss(1e-6, "ε of the perturbation Hessian.", gt=0)
    prediction_share: float = _loss(
        0.5, "Share of the prediction's divergence in the loss 'prediction'.", ge=0, le=1
    )
    prediction_lambda: float = _loss(
        0.1, "Divisor of the prediction's divergence in the loss 'prediction_pdquant'.", gt=0
    )
    glf_weight: float = _loss(
        2.0, "Weight of the block's own squared error in the loss 'glf'.", ge=0
    )
    detection_terms: Literal["rpn", "rpn+roi"] = _loss(
        "rpn",
        "Divergence of a detector: class and box maps of its region proposals, or these and the "
        "classes of the full-precision model's proposals (detection).",
    )
    temperature: float = _loss(20.0, "Temperature of a classifier's divergence.", gt=0)
    divergence_batch: int = _loss(
        32, "Consecutive samples that a divergence compares with each other (retrieval).", ge=2
    )

    finish_steps: int = _finish(
        0,
        "Steps of joint finishing: after reconstruction, norms, biases and scales are trained "
        "through the whole quantized model (200 or more).",
        ge=0,
    )
    finish_lr: float = _finish(2e-3, "Learning rate of norms and biases (Adam, cosine to 0).", gt=0)
    finish_lr_scale: float = _finish(
        4e-4, "Learning rate of scales in finishing (Adam, cosine to 0).", gt=0
    )
    finish_batch: int = _finish(
        32, "Images per step of finishing; images of varying sizes are taken one by one.", ge=1
    )
    finish_held_out: int = _finish(
        64, "Calibration images held out of finishing; the best step on them is kept.", ge=1
    )
    finish_weight_scales: bool = _finish(False, "Train the scales of weights in finishing too.")

    step_dtype: _Arithmetic = _numerics(
        "float32", "Arithmetic of the steps' matrix products; on CPUs tf32 is float32."
    )
    frozen_dtype: _Arithmetic = _numerics(
        "float32", "Arithmetic of full-precision parts (tape, Fisher passes), as step_dtype."
    )
