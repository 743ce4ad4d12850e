"""Names of CLIP models and of caption files, and what a run still needs.

The import is fast. A name that is not short imports open_clip, which takes seconds.
"""

import os.path
from pathlib import Path

from fimaq_core.errors import ModelError, suggest
from tasks.common.data.imagenet import missing_imagenet
from tasks.common.models.hub import Catalogue, Repository, cached_file, hub_answers, not_fetched
from tasks.common.request import DataRequest, Missing, ModelRequest

COCO_FILE, FLICKR30K_FILE = "dataset_coco.json", "dataset_flickr30k.json"
FREE_FILE = "captions.json"

#: Kinds of caption files, each with its file names; a folder holds one kind.
KINDS = (
    (COCO_FILE,),
    (FLICKR30K_FILE,),
    (FREE_FILE,),
    ("captions.csv",),
    ("captions.jsonl",),
    ("train.csv", "test.csv"),
    ("train.jsonl", "test.jsonl"),
)

LAYOUT = (
    f"A folder with images and one of these is expected: {COCO_FILE} (MS-COCO) or {FLICKR30K_FILE} "
    f"(Flickr30k), with Karpathy's splits; {FREE_FILE} of the same format; captions.csv or "
    "captions.jsonl (image, caption, split); train.csv and test.csv, or train.jsonl and test.jsonl "
    "(image, caption)"
)

#: Published checkpoints ``<open_clip model>.<open_clip's tag>`` and repositories, by short name.
#: OpenAI trained with QuickGELU, as in the ``-quickgelu`` configurations. open_clip also accepts
#: ``ViT-B-32.openai``, but then computes the exact GELU with a warning. The repositories are copied
#: from open_clip, because planning a grid must not import it.
_PUBLISHED = {
    "clip_vit_b32": ("ViT-B-32-quickgelu.openai", "timm/vit_base_patch32_clip_224.openai"),
    "clip_vit_b16": ("ViT-B-16-quickgelu.openai", "timm/vit_base_patch16_clip_224.openai"),
    "clip_vit_l14": ("ViT-L-14-quickgelu.openai", "timm/vit_large_patch14_clip_224.openai"),
    "laion_vit_b32": ("ViT-B-32.laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
    "laion_vit_b16": ("ViT-B-16.laion2b_s34b_b88k", "laion/CLIP-ViT-B-16-laion2B-s34B-b88K"),
    "laion_vit_h14": ("ViT-H-14.laion2b_s32b_b79k", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"),
    "siglip_b16": ("ViT-B-16-SigLIP.webli", "timm/ViT-B-16-SigLIP"),
    "siglip2_b16": ("ViT-B-16-SigLIP2.webli", "timm/ViT-B-16-SigLIP2"),
}
SHORT_NAMES = {short: full for short, (full, _) in _PUBLISHED.items()}
_REPOSITORIES = dict(_PUBLISHED.values())
_TOKENIZERS = {name: f"timm/{name}" for name in ("ViT-B-16-SigLIP", "ViT-B-16-SigLIP2")}
#: Metric that tables show.
MAIN_METRIC = "R@1"
DEMO_NAMES = ("demo_clip",)
#: Name of the data of the demo model.
DEMO_DATA = "digit-scenes"
#: Parts of a model that can be quantized, and kinds of evaluation; the default is first.
SCOPES = ("both", "vision", "text")
EVALUATIONS = ("retrieval", "zero-shot")

#: open_clip's names of checkpoints in a repository, best first.
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
#: Names of files that may hold the vocabulary of a tokenizer.
VOCABULARIES = (
    "tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "vocab.json",
    "vocab.txt",
)  # fmt: skip


def parts(scope: str | None) -> dict[str, str]:
    """Return {tower: scope} for the towers of a scope; the scope of one tower has its name."""
    return {name: name for name in ("vision", "text") if scope in (None, SCOPES[0], name)}


def full_name(name: str) -> str:
    """Return ``<open_clip model>.<tag>``, or the given name if it has no tag. Raises ModelError."""
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    import open_clip

    model, _, tag = name.partition(".")
    if model not in open_clip.list_models():
        close = suggest(name, [*SHORT_NAMES, *DEMO_NAMES, *open_clip.list_models()])
        hint = close if len(close) < 200 else " See `models` for short names."
        raise ModelError(f"Unknown model '{name}'.{hint}")
    if not tag:
        return name
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        local = " It has none: give a local file with --weights and the name without a tag."
        known = suggest(tag, tags) if tags else local
        raise ModelError(f"open_clip has no weights '{tag}' for {model}.{known}")
    if _fits_activation(model, tag):
        return name
    # open_clip also has weights for QuickGELU under the name for GELU, where it computes GELU.
    for other in published(model):
        if other.endswith(f".{tag}"):
            return other
    raise ModelError(f"The weights '{tag}' have another activation than {model}: use others.")


def published(model: str) -> list[str]:
    """Return each ``model.tag`` of open_clip for ``model`` and its ``-quickgelu`` variant.

    Tags with weights for the other activation are left out.
    """
    import open_clip

    return [
        f"{variant}.{tag}"
        for variant in (model, f"{model}-quickgelu")
        for tag in open_clip.list_pretrained_tags_by_model(variant)
        if _fits_activation(variant, tag)
    ]


def _fits_activation(model: str, tag: str) -> bool:
    import open_clip

    own = open_clip.get_model_config(model).get("quick_gelu", False)
    return bool(own == open_clip.get_pretrained_cfg(model, tag).get("quick_gelu", False))


def repository(tag: str) -> Repository | None:
    """Return the repository of ``model.tag`` at the hub; None if open_clip names no repository."""
    if tag in _REPOSITORIES:
        return Repository(_REPOSITORIES[tag], FILES)
    import open_clip

    model, _, name = tag.partition(".")
    # open_clip has "owner/repository/", or "owner/repository/file" if the file has another name.
    repo, file = os.path.split(open_clip.get_pretrained_cfg(model, name).get("hf_hub", ""))
    if not repo:
        return None
    return Repository(repo, (f"{Path(file).stem}.safetensors", file) if file else FILES)


CATALOGUE = Catalogue(
    demo_names=DEMO_NAMES,
    demo_folder=Path(__file__).parent / "demo" / "weights",
    full_name=full_name,
    choices=published,
    untagged="open_clip has no default among its trainings",
    repository=repository,
)

model_tag, weights_digest = CATALOGUE.model_tag, CATALOGUE.weights_digest


def preflight(model: ModelRequest, data: DataRequest) -> list[Missing]:
    """Return missing data, weights and tokenizer. Downloads nothing."""
    brings_data = model.name in DEMO_NAMES
    weights = CATALOGUE.missing_weights(model)
    return [*filter(None, (missing_data(data, brings_data), weights, missing_tokenizer(model)))]


def missing_data(data: DataRequest, brings_data: bool) -> Missing | None:
    """Return the missing captions or, for zero-shot classification, the missing ImageNet."""
    if data.calibration_data is not None and not data.calibration_data.is_dir():
        advice = f"You gave it as calibration data. {LAYOUT}."
        return Missing(f"the folder {data.calibration_data}", advice)
    calibrates = data.calibration_data is None
    if data.evaluation == "zero-shot":
        return missing_imagenet(data, brings_data, calibrates)
    if data.path is None:
        places = "COCO=/path or FLICKR=/path for make, --data for an adapter"
        advice = f"Give its folder: {places}. {LAYOUT}."
        return None if brings_data else Missing("a data set of captions", advice)
    if not data.path.is_dir():
        return Missing(f"the folder {data.path}", f"{LAYOUT}.")
    found = caption_kinds(data.path)
    if not found:
        return Missing(f"the captions in {data.path}", f"{LAYOUT}.")
    folders = ["train2014", "val2014"] if calibrates else ["val2014"]  # val2014: test images
    absent = [str(data.path / part) for part in folders if not (data.path / part).is_dir()]
    if found != [(COCO_FILE,)] or not absent:
        return None
    return Missing(f"the folder {' and the folder '.join(absent)}", f"{LAYOUT}.")


def caption_kinds(root: Path) -> list[tuple[str, ...]]:
    """Return the kinds of caption files of which a folder holds at least one file."""
    return [kind for kind in KINDS if any((root / name).is_file() for name in kind)]


def tokenizer_repository(model: str) -> str | None:
    """Return the repository of a model's tokenizer; None if open_clip contains the tokenizer."""
    if any(name.partition(".")[0] == model for name in SHORT_NAMES.values()):
        return _TOKENIZERS.get(model)
    import open_clip

    found: str | None = open_clip.get_model_config(model)["text_cfg"].get("hf_tokenizer_name")
    return found


def tokenizer_folder(request: ModelRequest) -> Path | None:
    """Return the folder ``<weights folder>/<model>-tokenizer`` if it exists."""
    if request.weights_folder is None:
        return None
    folder = request.weights_folder / f"{full_name(request.name).partition('.')[0]}-tokenizer"
    return folder if folder.is_dir() else None


def missing_tokenizer(request: ModelRequest) -> Missing | None:
    """Return the tokenizer if it is not in open_clip, not local, and cannot be fetched."""
    if request.name in DEMO_NAMES:
        return None
    model = full_name(request.name).partition(".")[0]
    repo = tokenizer_repository(model)
    if repo is None or tokenizer_folder(request) is not None:
        return None
    if cached_file(Repository(repo, VOCABULARIES)) is not None:
        return None
    what = f"the tokenizer of {model} (repository {repo})"
    if request.from_file:
        return not_fetched(what, "a folder <folder of weights>/<model>-tokenizer")
    if hub_answers():
        return None
    given = request.weights_folder
    folder = "the folder of weights" if given is None else f"the folder {given}"
    return Missing(
        what,
        f"Looked for <model>-tokenizer in {folder}, in the Hugging Face cache and at its hub, "
        "which does not answer. Run once with a network, or put the repository's tokenizer files "
        "(tokenizer.json, tokenizer_config.json) into <folder of weights>/<model>-tokenizer: "
        "WEIGHTS=/path for make, --weights for a grid, --weights-folder for an adapter.",
    )
