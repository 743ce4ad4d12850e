"""Classifiers with weights and transforms: demo models, and timm's."""

from dataclasses import replace

from fimaq_core.errors import ModelError
from tasks.classification.demo import digit_pairs
from tasks.classification.demo.models import DEMO
from tasks.classification.tags import CATALOGUE, DEMO_NAMES
from tasks.common.models.timm_models import load_timm
from tasks.common.request import ModelRequest, describe_missing
from tasks.common.task import LoadedModel


def load_model(request: ModelRequest) -> LoadedModel:
    """Load a classifier with its weights and transforms. Raises ModelError, NumericsError."""
    missing = CATALOGUE.missing_weights(request)
    if missing is not None:
        raise ModelError(describe_missing([missing]))
    loaded = _demo(request) if request.name in DEMO_NAMES else load_timm(request, CATALOGUE)
    if request.head:
        return without_classifier(loaded, request.head)
    if not loaded.classes:
        raise ModelError(
            f"{loaded.tag} has no classifier: give --head knn or --head linear, or load it with "
            "its classes (num_classes > 0 in --model-args)."
        )
    return loaded


def _demo(request: ModelRequest) -> LoadedModel:
    """Load a demo model, which has the preprocessing of its data."""
    model, stored = DEMO.load(request, CATALOGUE.local_weights(request))
    tag = CATALOGUE.model_tag(request)
    facts = tag, f"file {stored.path.name}", stored.sha256(model, altered=False)
    own = digit_pairs.NUM_CLASSES, digit_pairs.eval_transform(), digit_pairs.train_transform()
    data = "digit-pairs", (1, *digit_pairs.CANVAS_SIZE)
    loaded = LoadedModel(model, *facts, *own, *data)
    return replace(loaded, entry=stored.entry, entries=stored.entries)


def without_classifier(loaded: LoadedModel, head: str) -> LoadedModel:
    """Remove the classifier, so that the model returns features (B, d). Raises ModelError."""
    model = loaded.model
    if hasattr(model, "head_dist"):
        raise ModelError(f"{loaded.tag} has two classifiers: --head is for models with one.")
    model.reset_classifier(0)
    return replace(loaded, classes=0, class_names=None, head=head)
