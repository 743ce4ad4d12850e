"""Names of models, their weight files, and the Hugging Face hub. The import is fast."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from fimaq_core.documents import read_json
from fimaq_core.errors import ModelError
from tasks.common.hashing import SUFFIXES, file_sha256, require_file
from tasks.common.request import Missing, ModelRequest

_NAMED_BY_A_FILE = (
    "A checkpoint names the model, so nothing is fetched from the Hugging Face hub, and its cache "
    "has no such file: give {}, or run once with --model."
)
_NOT_AT_THE_HUB = (
    "The Hugging Face hub does not have them, and there is no other place to fetch them from: "
    "give the file with --weights."
)


@dataclass(frozen=True)
class Repository:
    """A repository at the hub, and the possible names of its file; the first found is used."""

    repo: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Catalogue:
    """Names of the models of a task, and where their weights are."""

    demo_names: tuple[str, ...]  # models that come with this repository
    demo_folder: Path  # holds <demo name>.safetensors and <demo name>.json (tag, sha256)
    full_name: Callable[[str], str]  # returns model.tag, or a model without tag; ModelError
    choices: Callable[[str], list[str]]  # returns each model.tag that a name without tag may mean
    untagged: str  # reason, for messages, why a name without tag is not enough
    repository: Callable[[str], Repository | None]  # of a model.tag; None if the hub has none

    def local_weights(self, request: ModelRequest) -> Path | None:
        """Return the given weights file, or the file of the model in the weights folder."""
        if request.weights is not None:
            return request.weights
        if request.weights_folder is None or request.name in self.demo_names:
            return None
        name = self.full_name(request.name)
        files = (request.weights_folder / f"{name}{suffix}" for suffix in SUFFIXES)
        return next(filter(Path.is_file, files), None)

    def model_tag(self, request: ModelRequest) -> str:
        """Return ``model.tag``, which identifies model and weights.

        A local weights file has the published tag if the file is named ``model.tag``. Otherwise the
        tag is ``local-`` and the first 12 digits of its sha256.
        Raises ModelError: the model is unknown, or there is neither a tag nor a weights file.
        """
        weights = self.local_weights(request)
        if weights is not None:
            require_file(weights)
        demo = request.name in self.demo_names
        if demo and weights is None:
            return f"{request.name}.{demo_metadata(self.demo_folder, request.name)['tag']}"
        name = request.name if demo else self.full_name(request.name)
        model, _, tag = name.partition(".")
        if weights is not None and (weights.stem.removesuffix(".pth") != name or not tag):
            return f"{model}.local-{file_sha256(weights)[:12]}"
        if weights is None and not tag:
            choices = " or ".join(self.choices(name)) or "a local file with --weights"
            raise ModelError(f"'{name}' names no weights, and {self.untagged}: choose {choices}.")
        return name

    def weights_digest(self, request: ModelRequest) -> str | None:
        """Return the sha256 of local weights or of demo weights (from their metadata), or None."""
        weights = self.local_weights(request)
        if weights is not None:
            return file_sha256(weights)
        if request.name in self.demo_names:
            return str(demo_metadata(self.demo_folder, request.name)["sha256"])
        return None

    def missing_weights(self, request: ModelRequest) -> Missing | None:
        """Return the weights if they are neither local nor cached and cannot be fetched."""
        local = self.local_weights(request) is not None
        if request.name in self.demo_names and not local:
            path = self.demo_folder / f"{request.name}.safetensors"
            advice = "They belong to the repository; `python scripts/train_demo.py` makes new ones."
            return None if path.is_file() else Missing(f"the weights of {request.name}", advice)
        tag = self.model_tag(request)
        if local:
            return None
        found = self.repository(tag)
        if found is None:
            return Missing(f"the weights of {tag}", _NOT_AT_THE_HUB)
        if cached_file(found) is not None:
            return None
        what = f"the weights of {tag} (repository {found.repo})"
        if request.from_file:
            return not_fetched(what, "--weights or --weights-folder")
        if hub_answers():
            return None
        folder = f"in the folder {request.weights_folder}, " if request.weights_folder else ""
        return Missing(
            what,
            f"Looked {folder}in the Hugging Face cache and at its hub, which does not answer. Run "
            "once with a network, or give a folder with <name>.safetensors: WEIGHTS=/path for "
            "make, --weights for a grid, --weights-folder for an adapter.",
        )

    def fetch(self, tag: str) -> Path:
        """Return the published weights of ``model.tag``, downloaded if the cache lacks them."""
        found = self.repository(tag)
        if found is None:
            raise ModelError(f"Missing: the weights of {tag}. {_NOT_AT_THE_HUB}")
        return cached_file(found) or download(found, f"weights of {tag}")


def not_fetched(what: str, options: str) -> Missing:
    """Return a missing part that is not fetched, since a file asks for it and not the user."""
    return Missing(what, _NAMED_BY_A_FILE.format(options))


def demo_metadata(folder: Path, name: str) -> dict[str, Any]:
    """Return training settings, accuracies, tag and sha256 of demo weights. Raises ModelError."""
    path = folder / f"{name}.json"
    if not path.is_file():
        raise ModelError(f"No demo weights of {name}: run `python scripts/train_demo.py`.")
    content: dict[str, Any] = read_json(path, ModelError, "description of demo weights")
    return content


def cached_file(repository: Repository) -> Path | None:
    """Return the first file of the repository in the local Hugging Face cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    for file in repository.files:
        found = try_to_load_from_cache(repository.repo, file)
        if isinstance(found, str):
            return Path(found)
    return None


def download(repository: Repository, what: str) -> Path:
    """Download the first file that the repository has; ``what`` is its description in messages.

    Raises ModelError: the hub does not answer, or the repository has none of the files.
    """
    from huggingface_hub import errors, hf_hub_download

    for file in repository.files:
        try:
            return Path(hf_hub_download(repository.repo, file))
        except errors.RemoteEntryNotFoundError:
            continue  # the repository exists, this file does not
        except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
            raise ModelError(
                f"The {what} could not be downloaded from the Hugging Face hub: {error}"
            ) from error
    files = " or ".join(repository.files)
    repo = repository.repo
    raise ModelError(f"The {what} are not in the Hugging Face repository {repo}: no {files}.")


@lru_cache(maxsize=1)
def hub_answers(seconds: float = 5.0) -> bool:
    """Return True if a connection to the Hugging Face hub can be opened; downloads nothing."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    if any(os.environ.get(name) for name in proxies):
        return True  # behind a proxy, only a download can show it
    address = urlparse(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname, port), seconds):
            return True
    except OSError:
        return False
