"""The recipe: one frozen, validated object with all settings of a quantization.

The defaults are FIMA-Q's released settings. A method is a named set of changes to the defaults, see
:data:`METHODS`. :func:`make_recipe` merges defaults, method, file and command line.
"""

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from fimaq_core.documents import Strict, problems, read_yaml, shown
from fimaq_core.errors import RecipeError, suggest
from fimaq_core.methods import AT_BITS, REVISED
from fimaq_core.methods import METHODS as METHODS
from fimaq_core.methods import OFF as OFF

#: Names of block losses; :func:`fimaq_core.fisher.losses.register_loss` adds to them.
LOSSES = ["mse", "mae", "fisher_brecq", "fisher_diag", "fisher_lr", "fisher_dplr"]
LOSSES += ["perturb", "perturb_mean", "prediction", "least_squares", "mse_adalog"]
LOSSES += ["prediction_pdquant"]
#: Losses that compare predictions of the whole model; losses not divided by their first values.
PREDICTION = ("prediction", "prediction_pdquant")
UNDIVIDED = ("mse_adalog", "prediction_pdquant")

#: Kinds of activation quantizers.
Kind = Literal["uniform", "log2", "logsqrt2", "adalog", "twin"]
#: Fields that a file depends on: all fields, the fields that determine ranges, or the fields that
#: determine an MLP reconstruction.
Fields = Literal["all", "ranges", "mlp"]

_Arithmetic = Literal["float32", "tf32", "bfloat16"]
#: Fields that older recipes lack. The default of such a field is the older behaviour, and a digest
#: counts the field only if its value differs, so that older cells keep their folders.
_LATER = ["revision", "range_inputs", "reparameterize_merges", "refit_rule"]
_LATER += ["loss_start", "prediction_lambda"]


def _field(group: str, default: Any, help: str, **kwargs: Any) -> Any:
    if type(default) is int:
        kwargs.setdefault("le", 2**31 - 1)
    return Field(default, description=help, json_schema_extra={"group": group}, **kwargs)


_method, _bits, _range = (partial(_field, group) for group in ("method", "bits", "calibration"))
_mlp, _recon, _loss = (partial(_field, group) for group in ("mlp", "reconstruction", "loss"))
_numerics = partial(_field, "numerics")


class Recipe(Strict, allow_inf_nan=False):
    """Everything that determines a quantized model, given the float model and the images.

    Example::

        recipe = make_recipe("fimaq", {"w_bits": 3, "a_bits": 3})
        recipe.bits_name  # "w3a3"
    """

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

    calibration_images: int = _range(1024, "Images drawn for calibration and reconstruction.", ge=1)
    calibration_transform: Literal["eval", "train"] = _range(
        "train", "Transform of the calibration images: 'train' as released (seeded), or 'eval'."
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
    range_inputs: Literal["float", "quantized"] = _range(
        "float",
        "Inputs for ranges: in the float model, or behind layers that are quantized already "
        "(RepQ-ViT).",
    )
    range_rounds: int = _range(3, "Rounds of alternating search.", ge=0)
    reparameterize: bool = _range(
        True,
        "Reparameterise LayerNorm and the linear layer behind it (if weight and activation bits "
        "agree; with percentile ranges always).",
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
    detection_terms: Literal["rpn", "rpn+roi"] = _loss(
        "rpn",
        "Divergence of a detector: class and box maps of its region proposals, or these and the "
        "classes of the full-precision model's proposals (detection).",
    )
    temperature: float = _loss(20.0, "Temperature of a classifier's divergence.", gt=0)
    divergence_batch: int = _loss(
        32, "Consecutive samples that a divergence compares with each other (retrieval).", ge=2
    )

    step_dtype: _Arithmetic = _numerics(
        "float32", "Arithmetic of the steps' matrix products; on CPUs tf32 is float32."
    )
    frozen_dtype: _Arithmetic = _numerics(
        "float32", "Arithmetic of full-precision parts (tape, Fisher passes), as step_dtype."
    )

    @field_validator("w_bits", "a_bits", "s_bits", "head_bits", "patch_input_bits")
    @classmethod
    def _check_bits(cls, value: int | None) -> int | None:
        if value is not None and value != OFF and not 2 <= value <= 8:
            raise ValueError(f"{value} bits is outside 2 to 8 (or {OFF} for off)")
        return value

    @field_validator("loss")
    @classmethod
    def _check_loss(cls, value: str) -> str:
        if value not in LOSSES:
            raise ValueError(f"there is no loss '{value}'.{suggest(value, LOSSES)}")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> "Recipe":
        if self.refit and self.reconstruct:
            raise ValueError("refit decides all roundings: choose one of refit, reconstruct")
        if self.refit and self.range_search != "percentile":
            raise ValueError("refit needs range_search percentile")
        if self.refit and self.w_bits == OFF:
            raise ValueError("refit writes the weights' codes, so w_bits must not be 32")
        if self.loss in UNDIVIDED and self.loss_start is not None:
            raise ValueError(f"the loss {self.loss} is not divided, so loss_start has no meaning")
        if self.loss_start is not None and not self.fisher_p1 + self.fisher_p2:
            raise ValueError("loss_start needs a positive fisher_p1 or fisher_p2")
        for name in ("softmax_quantizer", "gelu_quantizer"):
            kind = getattr(self, name)
            if self.range_search == "percentile" and kind in ("adalog", "twin"):
                problem = f"range_search percentile has no range for {name} {kind}"
                raise ValueError(f"{problem}: choose another of the two")
        if self.reconstruct_mlp and self.gelu_quantizer != "uniform":
            raise ValueError("reconstruct_mlp leaves no GELU, so gelu_quantizer must be uniform")
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

    def digest(self, fields: Fields = "all") -> str:
        """Return the sha256 (hex) of ``fields``; of all fields it is the recipe's identity."""
        dump, defaults = self.model_dump(mode="json"), Recipe.model_fields
        own = {name: dump[name] for name in self.names_of(fields)}
        own = {k: v for k, v in own.items() if k not in _LATER or v != defaults[k].default}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()

    def names_of(self, fields: Fields) -> list[str]:
        """Return the names of ``fields``. Ranges depend on the MLPs if these are reconstructed."""
        if fields == "all":
            return list(Recipe.model_fields)
        mlp = [name for name in _names("mlp") if name != "reconstruct_mlp"]
        mlp += ["perturbation", "temperature", "divergence_batch", "detection_terms"]
        mlp += ["frozen_dtype", "calibration_images", "calibration_transform", "seed", "revision"]
        if fields == "mlp":
            return mlp
        own = [name for name in _names("bits", "calibration") if name != "per_token"]
        own += ["reconstruct_mlp", *(mlp if self.reconstruct_mlp else ["seed"])]
        return list(dict.fromkeys(own))

    def changes(self, usual: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the fields that differ from the method's own settings.

        Method, ``w_bits``, ``a_bits``, seed and scope are left out. ``usual`` holds fields that the
        task sets for every method.
        """
        own = {name: getattr(self, name) for name in ("w_bits", "a_bits", "seed", "scope")}
        base = {**dict(make_recipe(self.method, usual or {}, own)), "revision": _revision(self)}
        return {name: value for name, value in self if value != base[name]}


def _revision(recipe: Recipe) -> int:
    """Return the revision of the algorithms that this version runs for a recipe."""
    raised = (new for (name, value), new in REVISED.items() if getattr(recipe, name) == value)
    return max(raised, default=1)


def _names(*groups: str) -> list[str]:
    """Return the names of the fields in ``groups``, in order."""
    extras = ((name, field.json_schema_extra) for name, field in Recipe.model_fields.items())
    return [name for name, extra in extras if isinstance(extra, dict) and extra["group"] in groups]


def register_method(name: str, changes: Mapping[str, Any]) -> None:
    """Add a method: a name and its changes to the defaults.

    Raises:
        RecipeError: the name is taken or a field does not exist.
    """
    if name in METHODS:
        raise RecipeError(f"A method named '{name}' exists already: choose another name.")
    _check_keys(changes, f"method '{name}'")
    METHODS[name] = dict(changes)


def make_recipe(method: str = "fimaq", *overrides: Mapping[str, Any]) -> Recipe:
    """Merge defaults, the method's settings and ``overrides`` into a recipe; later ones win.

    The recipe gets the revision that this version runs.

    Raises:
        RecipeError: unknown method or key (with a suggestion), a value that does not fit, or
            another revision.
    """
    if method not in METHODS:
        raise RecipeError(f"Unknown method {shown(method)}.{suggest(method, METHODS)}")
    given: dict[str, Any] = {"method": method}
    for override in overrides:
        _check_keys(override, "the recipe")
        given.update(override)
    if given["method"] != method:  # the other method's settings were not merged
        raise RecipeError(
            f"The recipe names method '{given['method']}', but method '{method}' is asked for: "
            "choose one."
        )
    bits = given.get("w_bits", Recipe.model_fields["w_bits"].default)
    merged = {**METHODS[method], **AT_BITS.get(method, {}).get(bits, {}), **given}
    try:
        recipe = Recipe(**merged)
    except ValidationError as error:
        raise RecipeError(f"The recipe does not make sense: {problems(error, Recipe)}") from error
    revision = _revision(recipe)
    if given.get("revision", revision) != revision:
        raise RecipeError(
            f"The recipe has revision {recipe.revision} of the algorithms of {method}, but this "
            f"version runs revision {revision}: leave the revision out and run everything anew."
        )
    return recipe.model_copy(update={"revision": revision})


def read_recipe_file(path: Path) -> dict[str, Any]:
    """Read recipe fields from a YAML file: a flat mapping of field names to values.

    Raises:
        RecipeError: the file is missing, is not a YAML mapping, or names an unknown field.
    """
    content = read_yaml(path, "recipe file", RecipeError)
    _check_keys(content, str(path))
    return content


def _check_keys(content: Mapping[str, Any], where: str) -> None:
    for key in content:
        if key not in Recipe.model_fields:
            known = suggest(str(key), Recipe.model_fields)
            raise RecipeError(f"Unknown key {shown(str(key))} in {where}.{known}")
