"""The recipe: one frozen, validated object that says everything a run does to a model.

Defaults are FIMA-Q's released settings. Methods (:data:`METHODS`) are named sets of changes to
them. Merging happens in one place, :func:`make_recipe`: defaults, method, file, command line.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fimaq_core.documents import problems, read_yaml
from fimaq_core.errors import RecipeError, suggest

#: Bit-width that switches a quantizer off.
OFF = 32

#: Names of block losses; :func:`fimaq_core.fisher.losses.register_loss` adds to them.
LOSSES = ["mse", "mae", "fisher_brecq", "fisher_diag", "fisher_lr", "fisher_dplr"]
LOSSES += ["perturb", "perturb_mean", "prediction", "least_squares"]

#: Kinds of activation quantizers.
Kind = Literal["uniform", "log2", "logsqrt2", "adalog", "twin"]


def _field(group: str, default: Any, help: str, **kwargs: Any) -> Any:
    return Field(default, description=help, json_schema_extra={"group": group}, **kwargs)


_method, _width, _range, _mlp = (
    partial(_field, name) for name in ("method", "bits", "calibration", "mlp")
)
_recon, _objective, _numerics = (
    partial(_field, name) for name in ("reconstruction", "loss", "numerics")
)


class Recipe(BaseModel):
    """Everything that determines the numbers of a quantized model, given model, weights and images."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: str = _method("fimaq", "Name of the method the recipe started from.")
    seed: int = _method(
        3407, "Seed of the calibration sample, batches, dropping and Fisher passes.", ge=0
    )
    scope: str | None = _method(
        None,
        "What of the model is quantized, as the task names it (retrieval: both, vision, text; "
        "detection: backbone+fpn+rpn+roi or some of them); none: its usual.",
    )

    w_bits: int = _width(4, "Bits of weights, 2 to 8, or 32 for off.")
    a_bits: int = _width(
        4, "Bits of activations (linear inputs, attention operands), 2 to 8, or 32 for off."
    )
    s_bits: int | None = _width(None, "Bits of softmax outputs; as a_bits if not given.")
    head_bits: int | None = _width(None, "Bits of the classifier's input; as a_bits if not given.")
    patch_input_bits: int = _width(
        OFF, "Bits of the patch embedding's input; 32 (off) as in the released code."
    )

    calibration_images: int = _range(1024, "Images drawn for calibration and reconstruction.", ge=1)
    calibration_transform: Literal["eval", "train"] = _range(
        "train",
        "Transform of the calibration images: 'train' as released (seeded here), or 'eval'.",
    )
    softmax_quantizer: Kind = _range("uniform", "Quantizer of softmax outputs.")
    gelu_quantizer: Kind = _range("uniform", "Quantizer of GELU outputs.")
    range_search: Literal["minmax", "percentile", "output-error", "progressive"] = _range(
        "output-error",
        "How scales and zero points are found: min-max; the best of three percentiles by own error "
        "(RepQ-ViT); a grid by error of the layer's output; that grid refined step by step (AdaLog).",
    )
    range_images: int = _range(128, "The first of the calibration images, used for ranges.", ge=1)
    range_candidates: int = _range(128, "Candidates tried per search.", ge=16)
    range_rounds: int = _range(3, "Rounds of alternating search.", ge=0)
    reparameterize: bool = _range(
        True,
        "Reparameterise LayerNorm and the linear layer behind it (where weight and activation bits "
        "agree; with percentile ranges always).",
    )
    refit: bool = _range(
        False, "Refit weights to quantized inputs by ridge regression, refine roundings (ERQ)."
    )
    refit_ridge: float = _range(1000.0, "Ridge of the refit, added to sums over all tokens.", ge=0)
    refit_flips: int = _range(100, "Roundings changed per row and half at most.", ge=0)
    per_token: bool = _range(True, "Expand activation scales to one per token position (FIMA-Q).")

    reconstruct_mlp: bool = _mlp(
        False, "First replace GELU by ReLU and train every MLP to give what it gave (APHQ-ViT)."
    )
    mlp_steps: int = _mlp(20_000, "Optimisation steps per MLP.", ge=1)
    mlp_batch: int = _mlp(32, "Images per step of an MLP's optimisation.", ge=1)
    mlp_lr: float = _mlp(4e-5, "Learning rate of an MLP's weights (Adam, cosine to 0).", gt=0)
    mlp_percentile: float = _mlp(
        0.99, "Quantile of positive hidden values at which the second term clamps.", gt=0, le=1
    )
    mlp_loss: Literal["perturb_mean", "mse"] = _mlp(
        "perturb_mean", "What weighs the MLP's output error."
    )

    reconstruct: bool = _recon(True, "Reconstruct blocks after calibration.")
    reconstruct_parts: Literal["all", "blocks"] = _recon(
        "all", "What is reconstructed: everything, or transformer blocks and patch mergings only."
    )
    steps: int = _recon(20_000, "Optimisation steps per block.", ge=1)
    batch_size: int = _recon(32, "Images per step.", ge=1)
    prefix_prob: float = _recon(
        0.5, "Share of the block's input from the quantized prefix, in 1/256.", ge=0, le=1
    )
    activation_prob: float = _recon(
        0.5,
        "Share of activations quantized while a block trains (QDrop), in 1/256; 1 = no dropping.",
        ge=0,
        le=1,
    )
    lr_alpha: float = _recon(1e-3, "Learning rate of the rounding variables (Adam).", gt=0)
    lr_scale: float = _recon(4e-5, "Learning rate of activation scales (Adam, cosine to 0).", gt=0)
    learn_scales: bool = _recon(True, "Learn activation scales.")
    round_weight: float = _recon(0.01, "Weight of the rounding regulariser.", ge=0)
    round_warmup: float = _recon(
        0.2, "Share of the steps before the regulariser starts.", ge=0, lt=1
    )
    beta_start: float = _recon(20.0, "Exponent of the regulariser at its start.", ge=1)
    beta_end: float = _recon(2.0, "Exponent of the regulariser at the end.", ge=1)

    loss: str = _objective("fisher_dplr", f"Block loss: {', '.join(LOSSES)}.")
    fisher_k: int = _objective(
        5, "Fisher passes per block, the rank of the low-rank part.", ge=1, le=64
    )
    fisher_mode: Literal["q", "qf"] = _objective(
        "q", "Fisher passes spread over the steps (q) or before the first k (qf)."
    )
    fisher_p1: float = _objective(1.0, "Weight of the low-rank part.", ge=0)
    fisher_p2: float = _objective(1.0, "Weight of the diagonal part.", ge=0)
    fisher_drop: bool = _objective(
        True, "Keep random dropping active in Fisher passes, as released."
    )
    perturbation: float = _objective(1e-6, "ε of the perturbation Hessian.", gt=0)
    prediction_share: float = _objective(
        0.5,
        "Share of the prediction difference in the loss 'prediction'; the rest is squared error.",
        ge=0,
        le=1,
    )
    detection_terms: Literal["rpn", "rpn+roi"] = _objective(
        "rpn",
        "Divergence of a detector: class and box maps of its region proposals, or these and the "
        "classes of the full-precision model's proposals (detection).",
    )
    temperature: float = _objective(
        20.0, "Temperature of a classifier's divergence behind the Fisher information.", gt=0
    )
    divergence_batch: int = _objective(
        32, "Samples in a row that a divergence compares with each other (retrieval).", ge=2
    )

    step_dtype: Literal["float32", "tf32", "bfloat16"] = _numerics(
        "float32",
        "Arithmetic of the steps' matrix products (values stay float32); tf32 is float32 on CPUs.",
    )
    frozen_dtype: Literal["float32", "tf32", "bfloat16"] = _numerics(
        "float32",
        "Arithmetic of full-precision parts (tape, Fisher passes); tf32 is float32 on CPUs.",
    )

    @field_validator("w_bits", "a_bits", "s_bits", "head_bits", "patch_input_bits")
    @classmethod
    def _bits(cls, value: int | None) -> int | None:
        if value is not None and value != OFF and not 2 <= value <= 8:
            raise ValueError(f"{value} bits is outside 2 to 8 (or {OFF} for off)")
        return value

    @field_validator("loss")
    @classmethod
    def _loss(cls, value: str) -> str:
        if value not in LOSSES:
            raise ValueError(f"there is no loss '{value}'.{suggest(value, LOSSES)}")
        return value

    @model_validator(mode="after")
    def _together(self) -> "Recipe":
        if self.refit and self.reconstruct:
            raise ValueError(
                "refit decides all roundings, so nothing is left to reconstruct: choose one of refit, reconstruct"
            )
        if self.refit and self.range_search != "percentile":
            raise ValueError("refit needs range_search percentile")
        if self.refit and self.w_bits == OFF:
            raise ValueError(
                "refit keeps what it finds in the weights' codes, so w_bits must not be 32"
            )
        if self.range_search == "percentile":
            for name in ("softmax_quantizer", "gelu_quantizer"):
                if (kind := getattr(self, name)) in ("adalog", "twin"):
                    raise ValueError(
                        f"range_search percentile has no range for {name} {kind}: choose another of the two"
                    )
        if self.reconstruct_mlp and self.gelu_quantizer != "uniform":
            raise ValueError(
                "reconstruct_mlp replaces GELU by ReLU, so gelu_quantizer must be uniform"
            )
        return self

    @property
    def softmax_bits(self) -> int:
        """Bits of softmax outputs."""
        return self.a_bits if self.s_bits is None else self.s_bits

    @property
    def classifier_bits(self) -> int:
        """Bits of the classifier's input."""
        return self.a_bits if self.head_bits is None else self.head_bits

    @property
    def bits_name(self) -> str:
        """Short name of the bit-widths, such as ``w3a3``."""
        return f"w{self.w_bits}a{self.a_bits}"

    def digest(self) -> str:
        """The sha256 (hex) of all fields: the recipe's identity."""
        return self._digest_of(tuple(Recipe.model_fields))

    def calibration_digest(self) -> str:
        """The sha256 (hex) of :meth:`range_fields`: recipes that share it share a calibration."""
        return self._digest_of(self.range_fields())

    def mlp_digest(self) -> str:
        """The sha256 (hex) of :meth:`mlp_fields`."""
        return self._digest_of(self.mlp_fields())

    def range_fields(self) -> tuple[str, ...]:
        """Names of the fields that determine the calibrated ranges, and the MLPs if reconstructed."""
        own = [name for name in _names("bits", "calibration") if name != "per_token"]
        mlp = self.mlp_fields() if self.reconstruct_mlp else ("seed",)
        return tuple(dict.fromkeys([*own, "reconstruct_mlp", *mlp]))

    @staticmethod
    def mlp_fields() -> tuple[str, ...]:
        """Names of the fields that determine an MLP reconstruction."""
        own = tuple(name for name in _names("mlp") if name != "reconstruct_mlp")
        shared = (
            "perturbation",
            "temperature",
            "divergence_batch",
            "detection_terms",
            "frozen_dtype",
        )
        return (*own, *shared, "calibration_images", "calibration_transform", "seed")

    def _digest_of(self, names: tuple[str, ...]) -> str:
        dump = self.model_dump(mode="json")
        content = json.dumps({name: dump[name] for name in names}, sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def changes(self, usual: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The fields, but method, bits, seed and scope, that differ from the method's own settings.

        ``usual`` are fields that the task sets for every method alike.
        """
        base = make_recipe(
            self.method,
            usual or {},
            {"w_bits": self.w_bits, "a_bits": self.a_bits, "seed": self.seed},
        )
        return {
            name: value for name, value in self if value != getattr(base, name) and name != "scope"
        }


def _names(*groups: str) -> list[str]:
    """Names of the fields of some groups, in order."""
    extras = {name: field.json_schema_extra for name, field in Recipe.model_fields.items()}
    return [
        name
        for name, extra in extras.items()
        if isinstance(extra, dict) and extra["group"] in groups
    ]


_CALIBRATION_ONLY: dict[str, Any] = {
    "reconstruct": False,
    "per_token": False,
    "calibration_images": 32,
    "range_images": 32,
}
_ADALOG: dict[str, Any] = {
    "softmax_quantizer": "adalog",
    "gelu_quantizer": "adalog",
    "range_search": "progressive",
}
_REPQ: dict[str, Any] = {
    **_CALIBRATION_ONLY,
    "range_search": "percentile",
    "softmax_quantizer": "logsqrt2",
}
#: Squared error, full-precision inputs, no dropping.
_BRECQ: dict[str, Any] = {
    "loss": "mse",
    "prefix_prob": 0.0,
    "activation_prob": 1.0,
    "per_token": False,
}

#: Each method as changes to the defaults (FIMA-Q's released settings). docs/methods.md says what each is and where it
#: differs from its released code.
METHODS: dict[str, dict[str, Any]] = {
    # APHQ-ViT's MLP reconstruction alone, in full precision.
    "mlp-recon": {
        "w_bits": OFF,
        "a_bits": OFF,
        "reconstruct_mlp": True,
        "reconstruct": False,
        "per_token": False,
    },
    # Rounding to nearest with min-max ranges.
    "rtn": {
        "reconstruct": False,
        "range_search": "minmax",
        "reparameterize": False,
        "per_token": False,
    },
    # Li et al., ICCV 2023 (arXiv:2212.08254).
    "repq": _REPQ,
    # Yuan et al., ECCV 2022 (arXiv:2111.12293); its twin uniform quantizers in this framework's range search.
    "ptq4vit": {
        **_CALIBRATION_ONLY,
        "softmax_quantizer": "twin",
        "gelu_quantizer": "twin",
        "reparameterize": False,
    },
    # Wu et al., ECCV 2024 (arXiv:2407.12951), calibrated only.
    "adalog": {**_CALIBRATION_ONLY, **_ADALOG},
    # Zhong et al., ICML 2024 (arXiv:2407.06794).
    "erq": {**_REPQ, "refit": True},
    # Li et al., ICLR 2021 (arXiv:2102.05426), as released with these codes.
    "brecq": _BRECQ,
    # Wei et al., ICLR 2022 (arXiv:2203.05740): squared error, mixed inputs, dropping.
    "qdrop": {"loss": "mse", "per_token": False},
    # Liu et al., CVPR 2023 (arXiv:2212.07048).
    "pdquant": {"loss": "prediction", "per_token": False},
    # AdaLog with BRECQ's reconstruction.
    "adalog-recon": {**_ADALOG, **_BRECQ, "range_images": 32},
    # Wu et al., CVPR 2025 (arXiv:2504.02508).
    "aphq": {"loss": "perturb_mean", "per_token": False, "reconstruct_mlp": True},
    # Wu et al., CVPR 2025 (arXiv:2506.11543), and with APHQ-ViT's MLP reconstruction before it.
    "fimaq": {},
    "fimaq-mlp": {"reconstruct_mlp": True},
    # LS-ViT, CVPR 2026: its least-squares Hessian, otherwise FIMA-Q's settings.
    "lsvit": {"loss": "least_squares"},
}

#: Settings that a method's released configuration changes at some weight bits.
_AT_BITS: dict[str, dict[int, dict[str, Any]]] = {
    "aphq": {2: {"mlp_percentile": 0.98, "per_token": True}, 4: {"mlp_percentile": 0.98}}
}


def register_method(name: str, changes: Mapping[str, Any]) -> None:
    """Add a method: a name and its changes to the defaults.

    Raises:
        RecipeError: if the name is taken or a field does not exist.
    """
    if name in METHODS:
        raise RecipeError(f"A method named '{name}' exists already: choose another name.")
    _check_keys(changes, f"method '{name}'")
    METHODS[name] = dict(changes)


def make_recipe(method: str = "fimaq", *overrides: Mapping[str, Any]) -> Recipe:
    """Merge defaults, method (at its weight bits) and overrides (later ones win) into a recipe.

    Raises:
        RecipeError: unknown method or key (with a suggestion), or a value that does not fit.
    """
    if method not in METHODS:
        raise RecipeError(f"Unknown method '{method}'.{suggest(method, METHODS)}")
    given: dict[str, Any] = {}
    for override in overrides:
        _check_keys(override, "the recipe")
        given.update(override)
    bits = given.get("w_bits", Recipe.model_fields["w_bits"].default)
    merged = {
        "method": method,
        **METHODS[method],
        **_AT_BITS.get(method, {}).get(bits, {}),
        **given,
    }
    if merged["method"] != method:
        # Its settings were not merged: the result would carry a name that is not its own.
        raise RecipeError(
            f"The recipe names method '{merged['method']}', but method '{method}' is asked for: choose one."
        )
    try:
        return Recipe(**merged)
    except ValidationError as error:
        raise RecipeError(f"The recipe does not make sense: {problems(error, Recipe)}") from error


def read_recipe_file(path: Path) -> dict[str, Any]:
    """Read recipe fields from a YAML file: a flat mapping of field names to values.

    Raises:
        RecipeError: the file is missing, is no YAML mapping, or names an unknown field.
    """
    content = read_yaml(path, "recipe file", RecipeError)
    _check_keys(content, str(path))
    return content


def _check_keys(content: Mapping[str, Any], where: str) -> None:
    for key in content:
        if key not in Recipe.model_fields:
            raise RecipeError(
                f"Unknown key '{key}' in {where}.{suggest(str(key), Recipe.model_fields)}"
            )
