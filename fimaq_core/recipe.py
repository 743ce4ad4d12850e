"""The recipe: one frozen, validated object with all settings of a quantization.

The defaults are FIMA-Q's released settings. A method is a named set of changes to the defaults, see
:data:`METHODS`. :func:`make_recipe` merges defaults, method, file and command line.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError, field_validator, model_validator

from fimaq_core.bits_map import BitsMap
from fimaq_core.documents import problems, read_yaml, shown
from fimaq_core.errors import RecipeError, suggest
from fimaq_core.methods import AT_BITS, BUDGETS, FROM_7_BITS, RATES, REVISED
from fimaq_core.methods import METHODS as METHODS
from fimaq_core.methods import OFF as OFF
from fimaq_core.settings import LOSSES as LOSSES
from fimaq_core.settings import PREDICTION as PREDICTION
from fimaq_core.settings import UNDIVIDED as UNDIVIDED
from fimaq_core.settings import Kind as Kind
from fimaq_core.settings import Settings

#: Fields that a file depends on: all fields, the fields that determine ranges, or the fields that
#: determine an MLP reconstruction.
Fields = Literal["all", "ranges", "mlp"]

#: Fields that older recipes lack. The default of such a field is the older behaviour, and a digest
#: counts the field only if its value differs, so that older cells keep their folders.
_LATER = ["revision", "range_inputs", "reparameterize_merges", "refit_rule"]
_LATER += ["loss_start", "prediction_lambda", "rotate", "range_grid", "start", "start_damp"]
_LATER += ["weight_learning", "lr_weight", "glf_weight", "finish_steps", "finish_lr"]
_LATER += ["finish_lr_scale", "finish_batch", "finish_held_out", "finish_weight_scales"]
_LATER += ["bits_map"]


class Recipe(Settings):
    """Everything that determines a quantized model, given the float model and the images.

    Example::

        recipe = make_recipe("fimaq", {"w_bits": 3, "a_bits": 3})
        recipe.bits_name  # "w3a3"
    """

    @field_validator("w_bits", "a_bits", "s_bits", "head_bits", "patch_input_bits")
    @classmethod
    def _check_bits(cls, value: int | None) -> int | None:
        if value is not None and value != OFF and not 2 <= value <= 8:
            raise ValueError(f"{value} bits is outside 2 to 8 (or {OFF} for off)")
        return value

    @field_validator("bits_map")
    @classmethod
    def _check_bits_map(cls, value: BitsMap | None) -> BitsMap | None:
        return value or None

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
        if self.refit and self.start != "nearest":
            raise ValueError("refit decides all roundings: choose one of refit, start")
        if self.weight_learning == "straight-through" and self.start != "nearest":
            raise ValueError("start needs weight_learning rounding, whose variables it sets")
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

    def unfinished(self) -> "Recipe":
        """Return the recipe without joint finishing."""
        finish = {name: Recipe.model_fields[name].default for name in _names("finish")}
        return self.model_copy(update=finish)

    def names_of(self, fields: Fields) -> list[str]:
        """Return the names of ``fields``. Ranges depend on the MLPs if these are reconstructed."""
        if fields == "all":
            return list(Recipe.model_fields)
        mlp = [name for name in _names("mlp") if name != "reconstruct_mlp"]
        mlp += ["perturbation", "temperature", "divergence_batch", "detection_terms"]
        mlp += ["frozen_dtype", "calibration_images", "calibration_transform", "seed", "revision"]
        mlp += ["rotate"]
        if fields == "mlp":
            return mlp
        own = [name for name in _names("bits", "calibration") if name != "per_token"]
        own += ["reconstruct_mlp", *(mlp if self.reconstruct_mlp else ["seed"])]
        if self.start != "nearest" and not self.reconstruct:
            own += ["start", "start_damp"]  # calibration also rounds the weights
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

    The recipe gets the revision that this version runs. A mapping may also have the key ``budget``,
    a name of :data:`fimaq_core.methods.BUDGETS`: short for the steps and learning rates of this
    budget, over which the other fields of the same mapping win.

    Raises:
        RecipeError: unknown method or key (with a suggestion), a value that does not fit, or
            another revision.

    Example:
        >>> recipe = make_recipe("fimaq", {"budget": "fast"})
        >>> recipe.steps, recipe.lr_alpha
        (500, 0.0132)
    """
    if method not in METHODS:
        raise RecipeError(f"Unknown method {shown(method)}.{suggest(method, METHODS)}")
    given: dict[str, Any] = {"method": method}
    for override in overrides:
        _check_keys(override, "the recipe", "budget")
        fields = {name: value for name, value in override.items() if name != "budget"}
        if "budget" in override:
            given.update(_of_budget(override["budget"], given, fields))
        given.update(fields)
    if given["method"] != method:  # the other method's settings were not merged
        raise RecipeError(
            f"The recipe names method '{given['method']}', but method '{method}' is asked for: "
            "choose one."
        )
    bits = given.get("w_bits", Recipe.model_fields["w_bits"].default)
    many = any(given.get(name) in (7, 8) for name in ("w_bits", "a_bits"))
    usual = {**METHODS[method], **(FROM_7_BITS if many else {})}
    merged = {**usual, **AT_BITS.get(method, {}).get(bits, {}), **given}
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


def _of_budget(
    budget: object, given: Mapping[str, Any], beside: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the recipe fields of a budget, for the method in the fields ``given`` so far.

    Stages that the recipe does not run keep their fields. Rates follow the steps: those of the
    fields ``beside`` the budget, or its own. It never has more steps than the method itself.
    """
    if not isinstance(budget, str) or budget not in BUDGETS:
        raise RecipeError(f"Unknown budget {shown(budget)}: choose {', '.join(BUDGETS)}.")
    defaults = {name: field.default for name, field in Recipe.model_fields.items()}
    own = {**defaults, **METHODS[given["method"]]}
    now, found = {**own, **given, **beside}, dict(BUDGETS[budget])
    if own["finish_steps"] <= found.get("finish_steps", 0):
        found.pop("finish_steps", None)
    learned = "lr_weight" if now["weight_learning"] == "straight-through" else "lr_alpha"
    for stage, name in (("reconstruct", "steps"), ("reconstruct_mlp", "mlp_steps")):
        wanted = found.pop(name, own[name])
        if not now[stage] or wanted >= own[name]:
            continue
        steps = found[name] = beside.get(name, wanted)
        for rate, power in RATES[name].items():
            if rate in (learned, "lr_scale", "mlp_lr"):
                found[rate] = float(f"{own[rate] * (own[name] / steps) ** power:.3g}")
    return found


def read_recipe_file(path: Path) -> dict[str, Any]:
    """Read recipe fields from a YAML file: a flat mapping of field names to values.

    Raises:
        RecipeError: the file is missing, is not a YAML mapping, or names an unknown field.
    """
    content = read_yaml(path, "recipe file", RecipeError)
    _check_keys(content, str(path), "budget")
    return content


def _check_keys(content: Mapping[str, Any], where: str, *more: str) -> None:
    for key in content:
        if key not in Recipe.model_fields and key not in more:
            known = suggest(str(key), [*Recipe.model_fields, *more])
            raise RecipeError(f"Unknown key {shown(str(key))} in {where}.{known}")
