"""Named methods: changes to the default recipe; and the algorithms that have changed since."""

from typing import Any

#: Bit-width that switches a quantizer off.
OFF = 32

#: Recipe fields and values.
Changes = dict[str, Any]
_PER_TENSOR: Changes = {"per_token": False}
_NO_RECONSTRUCTION: Changes = {"reconstruct": False, "per_token": False}
_FEW_IMAGES: Changes = {**_NO_RECONSTRUCTION, "calibration_images": 32, "range_images": 32}
_CLOSED_FORM: Changes = {**_NO_RECONSTRUCTION, "calibration_images": 128}
_TWIN: Changes = {"softmax_quantizer": "twin", "gelu_quantizer": "twin"}
_ADALOG: Changes = {"softmax_quantizer": "adalog", "gelu_quantizer": "adalog"}
_ADALOG["range_search"] = "progressive"
_REPQ: Changes = {**_FEW_IMAGES, "range_search": "percentile", "softmax_quantizer": "logsqrt2"}
_REPQ |= {"calibration_transform": "eval", "range_inputs": "quantized", "patch_input_bits": 8}
_ERQ: Changes = {**_REPQ, "refit": True, "refit_rule": "gradient", "reparameterize_merges": False}
#: Squared error, full-precision inputs, no dropping.
_BRECQ: Changes = {**_PER_TENSOR, "loss": "mse", "prefix_prob": 0.0, "activation_prob": 1.0}
#: Weights learned by straight-through gradients, with GLF-Q's rates and steps. Its paper does not
#: say how inputs are mixed and activations dropped: both are left at one half, as in QDrop.
_GLFQ: Changes = {**_PER_TENSOR, "weight_learning": "straight-through", "lr_weight": 2e-5}
_GLFQ |= {"lr_scale": 2e-4, "steps": 3000, "loss": "glf"}
_FINISH: Changes = {"finish_steps": 2000, "finish_held_out": 128}
#: APHQ-ViT's code divides all losses by half of their starts.
_APHQ: Changes = {**_PER_TENSOR, "loss_start": 2.0}

#: Changes to the defaults (FIMA-Q's released settings) by method. docs/methods.md describes each
#: method and its differences from the released code.
METHODS: dict[str, Changes] = {
    # APHQ-ViT's MLP reconstruction alone, in full precision.
    "mlp-recon": {**_NO_RECONSTRUCTION, "w_bits": OFF, "a_bits": OFF, "reconstruct_mlp": True},
    # Rounding to nearest with min-max ranges.
    "rtn": {**_NO_RECONSTRUCTION, "range_search": "minmax", "reparameterize": False},
    # Li et al., ICCV 2023 (arXiv:2212.08254).
    "repq": _REPQ,
    # Yuan et al., ECCV 2022 (arXiv:2111.12293); its twin quantizers in this framework's search.
    "ptq4vit": {**_FEW_IMAGES, **_TWIN, "reparameterize": False, "calibration_transform": "eval"},
    # Wu et al., ECCV 2024 (arXiv:2407.12951), calibrated only.
    "adalog": {**_FEW_IMAGES, **_ADALOG},
    # Zhong et al., ICML 2024 (arXiv:2407.06794).
    "erq": _ERQ,
    # Frantar et al., ICLR 2023 (arXiv:2210.17323); Li et al., ICML 2025 (arXiv:2504.02692).
    "gptq": {**_CLOSED_FORM, "start": "gptq"},
    "gptaq": {**_CLOSED_FORM, "start": "gptaq"},
    # Li et al., ICLR 2021 (arXiv:2102.05426), as released with these codes.
    "brecq": _BRECQ,
    # Wei et al., ICLR 2022 (arXiv:2203.05740): squared error, mixed inputs, dropping.
    "qdrop": {**_PER_TENSOR, "loss": "mse"},
    # Liu et al., CVPR 2023 (arXiv:2212.07048).
    "pdquant": {**_PER_TENSOR, "loss": "prediction_pdquant", "temperature": 4.0, "lr_alpha": 3e-3},
    # AdaLog with BRECQ's reconstruction.
    "adalog-recon": {**_ADALOG, **_BRECQ, "range_images": 32, "loss": "mse_adalog"},
    # Wu et al., CVPR 2025 (arXiv:2504.02508); and QDrop as its code runs it.
    "aphq": {**_APHQ, "loss": "perturb_mean", "reconstruct_mlp": True},
    "qdrop-aphq": {**_APHQ, "loss": "mse"},
    # Wu et al., CVPR 2025 (arXiv:2506.11543); alone, and after APHQ-ViT's MLP reconstruction.
    "fimaq": {},  # the defaults of all fields, which other methods share unless they change them
    "fimaq-mlp": {"reconstruct_mlp": True},
    # LS-ViT, CVPR 2026: its least-squares Hessian, otherwise FIMA-Q's settings.
    "lsvit": {"loss": "least_squares"},
    # GLF-Q (2026): a loss at the end of the model, on a rotated model with reconstructed MLPs.
    "glfq": {**_GLFQ, "rotate": "hadamard", "reconstruct_mlp": True},
    # Our own: MLP reconstruction, squared error with scales per token, joint finishing. No Fisher
    # passes: their time goes into the first and the last of these.
    "mlp-finish": {"reconstruct_mlp": True, "loss": "mse", **_FINISH, "range_grid": "extended"},
}
#: Further changes at some weight bits, as in the method's released configuration.
AT_BITS: dict[str, dict[int, Changes]] = {
    "aphq": {2: {"mlp_percentile": 0.98, "per_token": True}, 4: {"mlp_percentile": 0.98}}
}

#: Changes to all methods where weights or activations have 7 or 8 bits.
FROM_7_BITS: Changes = {"range_grid": "extended"}

#: Recipe fields of each budget. ``released`` keeps the method's own. Each method has the fields of
#: the stages that it runs, and the rates of blocks and MLPs follow the steps, see :data:`RATES`.
BUDGETS: dict[str, Changes] = {
    "fast": {"steps": 500, "mlp_steps": 500, "finish_steps": 200},
    "standard": {"steps": 2_000, "mlp_steps": 2_000, "finish_steps": 500},
    "released": {},
}
#: Learning rates by their steps, and the power of (own steps / steps of the budget) that multiplies
#: them. Adam moves a variable by at most steps x rate. The powers lead from the released rates at
#: 20,000 steps to those of the demo at 250 steps (0.024, 0.0006, 0.003).
RATES: dict[str, dict[str, float]] = {
    "steps": {"lr_alpha": 0.7, "lr_scale": 0.6, "lr_weight": 0.7},
    "mlp_steps": {"mlp_lr": 1.0},
}

#: Settings whose algorithm has changed, and the revision that changed it.
REVISED: dict[tuple[str, Any], int] = {
    ("range_search", "progressive"): 2,  # the grid has at most half as many zero points as levels
    ("gelu_quantizer", "adalog"): 2,  # q is searched at the present scale
    ("softmax_quantizer", "twin"): 2,  # the split is searched with the float values v
    ("reconstruct_mlp", True): 2,  # the clamp's quantile is that of all values
}
