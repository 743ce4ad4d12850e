"""Captions to token ids, by open_clip's tokenizers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
import torch
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
from torch import Tensor

from fimaq_core.errors import ModelError
from tasks.common.hashing import file_sha256
from tasks.common.models.hub import Repository, cached_file, hub_answers
from tasks.retrieval.tags import VOCABULARIES

#: Captions on which a tokenizer is compared with its file.
_PROBES = (
    "a photo of a cat",
    "Two dogs, on the grass.",
    "The man's 3 red buses -- in 1984!",
    "  café\tmenu  ",
)


class Tokenizer:
    """open_clip's tokenizer of a model; ``origin`` tells records of its files."""

    def __init__(
        self,
        tokenizer: SimpleTokenizer | HFTokenizer,
        context_length: int,
        vocabulary: int,
        origin: str = "",
    ) -> None:
        self.tokenizer, self.context_length, self.vocabulary, self.origin = (
            tokenizer,
            context_length,
            vocabulary,
            origin,
        )

    def __call__(self, captions: list[str]) -> Tensor:
        """Token ids (n, L) int64. Raises ModelError for an id that the model does not know."""
        if not captions:
            return torch.zeros(0, self.context_length, dtype=torch.int64)
        ids: Tensor = self.tokenizer(captions, context_length=self.context_length)
        largest = int(ids.max())
        if largest >= self.vocabulary:
            raise ModelError(
                f"The tokenizer gives the id {largest}, the model knows {self.vocabulary} tokens: they do not fit."
            )
        return ids

    def lengths(self, captions: list[str]) -> list[int]:
        """Tokens of each caption, with start and end tokens, before it is cut."""
        own = self.tokenizer
        if isinstance(own, SimpleTokenizer):
            return [len(own.encode(caption)) + 2 for caption in captions]
        if not captions:
            return []
        class_tokens = (
            own.tokenizer_mode == "clips"
        )  # start, end and class token are added by open_clip
        found = own.tokenizer(
            [own.clean_fn(caption) for caption in captions],
            add_special_tokens=not class_tokens,
            padding=False,
            truncation=False,
            verbose=False,
        )
        return [len(ids) + (3 if class_tokens else 0) for ids in found["input_ids"]]


def build_tokenizer(
    model: str, text: Mapping[str, Any], folder: Path | None, vocabulary: int
) -> Tokenizer:
    """The tokenizer of ``model``, by the ``text`` part of its configuration. Raises ModelError."""
    context_length = int(text.get("context_length", DEFAULT_CONTEXT_LENGTH))
    settings = dict(text.get("tokenizer_kwargs") or {})
    repo = text.get("hf_tokenizer_name")
    if repo:
        found = _hugging_face(
            model, str(repo), folder, context_length, text.get("tokenizer_mode"), settings
        )
        file = _vocabulary(folder, str(repo))
        origin = "" if file is None else f"; tokenizer {repo} sha256 {file_sha256(file)[:16]}"
        return Tokenizer(found, context_length, vocabulary, origin)
    if "siglip" in model.lower():  # open_clip would fetch a vocabulary from an address in its code
        raise ModelError(
            f"The configuration of {model} names no tokenizer: give hf_tokenizer_name in its text_cfg."
        )
    try:
        return Tokenizer(
            SimpleTokenizer(context_length=context_length, **settings), context_length, vocabulary
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ModelError(
            f"open_clip cannot build the tokenizer of {model} with {settings}: {error}"
        ) from error


def _hugging_face(
    model: str,
    repo: str,
    folder: Path | None,
    context_length: int,
    mode: str | None,
    settings: dict[str, Any],
) -> HFTokenizer:
    """A tokenizer that transformers builds, compared with its file."""
    complete = cached_file(Repository(repo, ("tokenizer.json",))) is not None
    source = str(folder) if folder is not None else repo
    try:
        found = HFTokenizer(
            source,
            context_length=context_length,
            tokenizer_mode=mode,
            trust_remote_code=False,
            local_files_only=folder is not None or complete or not hub_answers(),
            **settings,
        )
        found(["a photo"])  # says so here if it cannot pad
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError) as error:
        place = f"in {source}" if folder is not None else "in the Hugging Face cache or at its hub"
        raise ModelError(
            f"The tokenizer of {model} could not be read {place}: {' '.join(str(error).split())[:300]} Its files "
            f"(tokenizer.json, tokenizer_config.json) are those of the Hugging Face repository {repo}; beside local weights they "
            f"belong into <folder of weights>/{model}-tokenizer."
        ) from error
    _compare(found, _vocabulary(folder, repo), source)
    return found


def _vocabulary(folder: Path | None, repo: str) -> Path | None:
    if folder is None:
        return cached_file(Repository(repo, VOCABULARIES))
    return next((folder / name for name in VOCABULARIES if (folder / name).is_file()), None)


def _compare(built: HFTokenizer, file: Path | None, source: str) -> None:
    """Refuse a tokenizer without a vocabulary, or with other tokens than its file."""
    if file is None:
        raise ModelError(
            f"The tokenizer in {source} has no vocabulary: none of {', '.join(VOCABULARIES)} is there."
        )
    if file.name != "tokenizer.json":
        return
    own = tokenizers.Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    for caption in map(built.clean_fn, _PROBES):
        wanted = own.encode(caption, add_special_tokens=False).ids
        given = built.tokenizer(caption, add_special_tokens=False).input_ids
        if wanted != given:
            import transformers

            raise ModelError(
                f"transformers {transformers.__version__} changes the tokenizer in {source}: '{caption}' has the tokens {wanted} "
                f"by its tokenizer.json, but {given} as it is built. Install another version of transformers, or correct "
                "tokenizer_class in its tokenizer_config.json."
            )
