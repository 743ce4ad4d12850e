"""Names of CLIP models, files of captions, and what is missing; light for short and demo names."""

import os.path
from pathlib import Path

from fimaq_core.errors import ModelError, suggest
from tasks.common.data.imagenet import missing_imagenet
from tasks.common.models.hub import Catalogue, Repository, cached_file, hub_answers
from tasks.common.request import DataRequest, Missing, ModelRequest

COCO_FILE, FLICKR30K_FILE, FREE_FILE = (
    "dataset_coco.json",
    "dataset_flickr30k.json",
    "captions.json",
)

#: Kinds of caption files; a folder holds one kind.
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
    f"A folder with images and one of these is expected: {COCO_FILE} (MS-COCO) or {FLICKR30K_FILE} (Flickr30k), Karpathy's "
    f"splits; {FREE_FILE} of the same format; captions.csv or captions.jsonl (image, caption, split); train.csv and test.csv, or "
    "train.jsonl and test.jsonl (image, caption)"
)

#: Short names and the published checkpoints they mean, ``<open_clip model>.<open_clip's tag>``. OpenAI trained with QuickGELU.
#: open_clip has the tag ``openai`` under ``ViT-B-32`` too, whose configuration has the exact GELU: there it warns of the
#: mismatch and computes with the wrong activation. The ``-quickgelu`` configurations have what the weights were trained with.
SHORT_NAMES = {
    "clip_vit_b32": "ViT-B-32-quickgelu.openai",
    "clip_vit_b16": "ViT-B-16-quickgelu.openai",
    "clip_vit_l14": "ViT-L-14-quickgelu.openai",
    "laion_vit_b32": "ViT-B-32.laion2b_s34b_b79k",
    "laion_vit_b16": "ViT-B-16.laion2b_s34b_b88k",
    "laion_vit_h14": "ViT-H-14.laion2b_s32b_b79k",
    "siglip_b16": "ViT-B-16-SigLIP.webli",
    "siglip2_b16": "ViT-B-16-SigLIP2.webli",
}

DEMO_NAMES = ("demo_clip",)

#: What of a model can be quantized, and what can be measured; the usual first.
SCOPES = ("both", "vision", "text")
EVALUATIONS = ("retrieval", "zero-shot")


def parts(scope: str | None) -> dict[str, str]:
    """The towers of a scope; each is a scope of its own."""
    return {name: name for name in ("vision", "text") if scope in (None, SCOPES[0], name)}


#: What open_clip's registry says of the models with short names: importing it takes seconds, planning a grid must not.
_REPOSITORIES = {
    "ViT-B-32-quickgelu.openai": "timm/vit_base_patch32_clip_224.openai",
    "ViT-B-16-quickgelu.openai": "timm/vit_base_patch16_clip_224.openai",
    "ViT-L-14-quickgelu.openai": "timm/vit_large_patch14_clip_224.openai",
    "ViT-B-32.laion2b_s34b_b79k": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "ViT-B-16.laion2b_s34b_b88k": "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
    "ViT-H-14.laion2b_s32b_b79k": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "ViT-B-16-SigLIP.webli": "timm/ViT-B-16-SigLIP",
    "ViT-B-16-SigLIP2.webli": "timm/ViT-B-16-SigLIP2",
}
_TOKENIZERS = {
    "ViT-B-16-SigLIP": "timm/ViT-B-16-SigLIP",
    "ViT-B-16-SigLIP2": "timm/ViT-B-16-SigLIP2",
}

#: open_clip's names of checkpoints in a repository, best first.
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")

#: Files with a tokenizer's vocabulary.
VOCABULARIES = (
    "tokenizer.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
)


def full_name(name: str) -> str:
    """``<open_clip model>.<tag>``, or untagged as given. Raises ModelError for an unknown one."""
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    import open_clip

    model, _, tag = name.partition(".")
    if model not in open_clip.list_models():
        close = suggest(name, [*SHORT_NAMES, *DEMO_NAMES, *open_clip.list_models()])
        raise ModelError(
            f"Unknown model '{name}'.{close if len(close) < 200 else ' See `models` for short names.'}"
        )
    if not tag:
        return name
    tags = open_clip.list_pretrained_tags_by_model(model)
    if tag not in tags:
        known = (
            suggest(tag, tags)
            if tags
            else " It has none: give a local file with --weights and the name without a tag."
        )
        raise ModelError(f"open_clip has no weights '{tag}' for {model}.{known}")
    if _fits_activation(model, tag):
        return name
    # open_clip has weights for QuickGELU under the name for GELU too, where it computes with GELU
    fitting = [found for found in published(model) if found.endswith(f".{tag}")]
    if not fitting:
        raise ModelError(
            f"The weights '{tag}' were trained with another activation than {model} has: use other weights."
        )
    return fitting[0]


def published(model: str) -> list[str]:
    """``model.tag`` of all weights of open_clip for a model, QuickGELU's as ``-quickgelu``."""
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
    """Repository of ``model.tag`` at the hub; None where open_clip names another address only."""
    if tag in _REPOSITORIES:
        return Repository(_REPOSITORIES[tag], FILES)
    import open_clip

    model, _, name = tag.partition(".")
    # open_clip writes "owner/repository/", or "owner/repository/file" for files with other names
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
    """List missing data, weights and tokenizer. Downloads nothing."""
    found = [
        missing_data(data, model.name in DEMO_NAMES),
        CATALOGUE.missing_weights(model),
        missing_tokenizer(model),
    ]
    return [item for item in found if item is not None]


def missing_data(data: DataRequest, brings_data: bool) -> Missing | None:
    """The data, if it is not there: captions, or ImageNet for zero-shot classification."""
    if data.calibration_data is not None and not data.calibration_data.is_dir():
        return Missing(
            f"the folder {data.calibration_data}", f"It was given as calibration data. {LAYOUT}."
        )
    if data.evaluation == "zero-shot":
        return missing_imagenet(data, brings_data, calibrates=data.calibration_data is None)
    if data.path is None:
        advice = f"Give its folder: COCO=/path or FLICKR=/path for make, --data for an adapter. {LAYOUT}."
        return None if brings_data else Missing("a data set of captions", advice)
    found, wanted = (
        caption_files(data.path),
        ["val2014"],
    )  # images of the test part are of val2014 all
    if data.calibration_data is None:
        wanted.insert(0, "train2014")
    folders = wanted if found == [(COCO_FILE,)] else []
    absent = [str(data.path / part) for part in folders if not (data.path / part).is_dir()]
    if not data.path.is_dir():
        return Missing(f"the folder {data.path}", f"{LAYOUT}.")
    if not found:
        return Missing(f"the captions in {data.path}", f"{LAYOUT}.")
    return (
        Missing(f"the folder {' and the folder '.join(absent)}", f"{LAYOUT}.") if absent else None
    )


def caption_files(root: Path) -> list[tuple[str, ...]]:
    """Kinds of caption files of which a folder holds at least one file."""
    return [kind for kind in KINDS if any((root / name).is_file() for name in kind)]


def tokenizer_repository(model: str) -> str | None:
    """The hub's repository of a model's tokenizer; None where open_clip brings it."""
    if any(name.partition(".")[0] == model for name in SHORT_NAMES.values()):
        return _TOKENIZERS.get(model)
    import open_clip

    found: str | None = open_clip.get_model_config(model)["text_cfg"].get("hf_tokenizer_name")
    return found


def tokenizer_folder(request: ModelRequest) -> Path | None:
    """The folder ``<weights folder>/<model>-tokenizer``, if it is there."""
    if request.weights_folder is None:
        return None
    folder = request.weights_folder / f"{full_name(request.name).partition('.')[0]}-tokenizer"
    return folder if folder.is_dir() else None


def missing_tokenizer(request: ModelRequest) -> Missing | None:
    """The tokenizer, if it is neither in open_clip nor here nor at the hub."""
    if request.name in DEMO_NAMES:
        return None
    repo = tokenizer_repository(full_name(request.name).partition(".")[0])
    if repo is None or tokenizer_folder(request) is not None:
        return None
    if cached_file(Repository(repo, VOCABULARIES)) is not None or hub_answers():
        return None
    folder = (
        f"the folder {request.weights_folder}"
        if request.weights_folder is not None
        else "the folder of weights"
    )
    return Missing(
        f"the tokenizer of {full_name(request.name).partition('.')[0]} (repository {repo})",
        f"Looked for <model>-tokenizer in {folder}, in the Hugging Face cache and at its hub, which does not answer. Run once "
        "with a network, or put the repository's tokenizer files (tokenizer.json, tokenizer_config.json) into "
        "<folder of weights>/<model>-tokenizer: WEIGHTS=/path for make, --weights for a grid, --weights-folder for an adapter.",
    )
