"""Tokenizers of open_clip, which turn captions into token ids."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from open_clip.tokenizer import DEFAULT_CONTEXT_LENGTH, HFTokenizer, SimpleTokenizer
from torch import Tensor

from fimaq_core.errors import ModelError
from tasks.common.hashing import file_sha256
from tasks.common.models.hub import Repository, cached_file, hub_answers
from tasks.retrieval.tags import VOCABULARIES

#: Bound on a file of a tokenizer, in bytes. The largest of open_clip's models has 34 million.
_MOST_BYTES = 2**27
#: Captions for the check that a tokenizer agrees with its file.
_PROBES = (
    "a photo of a cat",
    "Two dogs, on the grass.",
    "The man's 3 red buses -- in 1984!",
    "  café\tmenu  ",
)


@dataclass(frozen=True)
class Tokenizer:
    """open_clip's tokenizer of a model: captions to token ids (n, L) int64."""

    tokenizer: SimpleTokenizer | HFTokenizer
    context_length: int  # L
    vocabulary: int  # number of tokens that the model knows
    origin: str = ""  # repository and sha256 of the tokenizer's file, for records

    def __call__(self, captions: list[str]) -> Tensor:
        """Return token ids (n, L) int64. Raises ModelError: the model does not know an id."""
        if not captions:
            return torch.zeros(0, self.context_length, dtype=torch.int64)
        ids: Tensor = self.tokenizer(captions, context_length=self.context_length)
        largest = int(ids.max())
        if largest >= self.vocabulary:
            raise ModelError(
                f"The tokenizer gives the id {largest}, but the model knows {self.vocabulary} "
                "tokens: use the tokenizer of this model."
            )
        return ids

    def lengths(self, captions: list[str]) -> list[int]:
        """Return the number of tokens of each whole caption, including start and end tokens."""
        own = self.tokenizer
        if isinstance(own, SimpleTokenizer):
            return [len(own.encode(caption)) + 2 for caption in captions]
        if not captions:
            return []
        classed = own.tokenizer_mode == "clips"  # open_clip adds start, end and class token
        texts = [own.clean_fn(caption) for caption in captions]
        options = {"padding": False, "truncation": False, "verbose": False}
        found = own.tokenizer(texts, add_special_tokens=not classed, **options)
        return [len(ids) + (3 if classed else 0) for ids in found["input_ids"]]


def build_tokenizer(
    model: str, text: Mapping[str, Any], folder: Path | None, vocabulary: int, local: bool = False
) -> Tokenizer:
    """Return the tokenizer of ``model``; ``text`` is the text part of open_clip's configuration.

    ``folder`` holds the files of the tokenizer; None takes those of the Hugging Face hub, and
    ``local`` takes them only from its cache.
    Raises ModelError: the tokenizer is missing, does not work, or differs from its file.
    """
    length = int(text.get("context_length", DEFAULT_CONTEXT_LENGTH))
    settings = dict(text.get("tokenizer_kwargs") or {})
    if repo := text.get("hf_tokenizer_name"):
        settings |= {"context_length": length, "tokenizer_mode": text.get("tokenizer_mode")}
        found, file = _hugging_face(model, str(repo), folder, settings, local)
        origin = f"; tokenizer {repo} sha256 {file_sha256(file)[:16]}"
        return Tokenizer(found, length, vocabulary, origin)
    if "siglip" in model.lower():  # open_clip would download a vocabulary from a fixed address
        raise ModelError(f"{model} names no tokenizer: give hf_tokenizer_name in its text_cfg.")
    try:
        return Tokenizer(SimpleTokenizer(context_length=length, **settings), length, vocabulary)
    except (TypeError, ValueError, AssertionError) as error:
        raise ModelError(
            f"open_clip cannot build the tokenizer of {model} with {settings}: {error}"
        ) from error


def _hugging_face(
    model: str, repo: str, folder: Path | None, settings: dict[str, Any], local: bool
) -> tuple[HFTokenizer, Path]:
    """Return the tokenizer that transformers builds, and its file, which agrees with it."""
    complete = cached_file(Repository(repo, ("tokenizer.json",))) is not None
    local = local or folder is not None or complete or not hub_answers()
    source = repo if folder is None else str(folder)
    try:
        for part in [] if folder is None else folder.iterdir():
            if part.is_file() and part.stat().st_size > _MOST_BYTES:
                raise ValueError(f"{part.name} has more than {_MOST_BYTES} bytes.")
        found = HFTokenizer(source, trust_remote_code=False, local_files_only=local, **settings)
        found(["a photo"])  # fails if it cannot pad
    except Exception as error:  # damaged files end transformers in many ways
        place = f"in {source}" if folder is not None else "in the Hugging Face cache or at its hub"
        raise ModelError(
            f"The tokenizer of {model} could not be read {place}: "
            f"{' '.join(ascii(str(error))[1:-1].split())[:300]} Its files (tokenizer.json, "
            f"tokenizer_config.json) are in the Hugging Face repository {repo}; for local weights "
            f"copy them into <folder of weights>/{model}-tokenizer."
        ) from error
    if folder is None:
        file = cached_file(Repository(repo, VOCABULARIES))
    else:
        file = next((folder / name for name in VOCABULARIES if (folder / name).is_file()), None)
    if file is None:
        files = ", ".join(VOCABULARIES)
        raise ModelError(f"The tokenizer in {source} has no vocabulary: there is none of {files}.")
    if file.name != "tokenizer.json":
        return found, file
    try:
        own = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:
        raise ModelError(f"The tokenizer's file {file} is damaged: {error!a}.") from error
    own.no_truncation()
    own.no_padding()
    for caption in map(found.clean_fn, _PROBES):
        wanted = own.encode(caption, add_special_tokens=False).ids
        given = found.tokenizer(caption, add_special_tokens=False).input_ids
        if wanted != given:
            raise ModelError(
                f"transformers {transformers.__version__} changes the tokenizer in {source}: "
                f"'{caption}' has the tokens {wanted} in tokenizer.json, but {given} in "
                "transformers. Install another version of transformers, or correct tokenizer_class "
                "in tokenizer_config.json."
            )
    return found, file
