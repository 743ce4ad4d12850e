"""Names, weight files and the Hugging Face hub: what ``tags.py`` of the tasks have in common. Imports nothing heavy."""

import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from fimaq_core.errors import ModelError
from tasks.common.hashing import SUFFIXES, file_sha256
from tasks.common.request import Missing, ModelRequest

_NOT_AT_THE_HUB = "The Hugging Face hub does not have them, and nothing is fetched from elsewhere: give the file with --weights."


@dataclass(frozen=True)
class Repository:
    """A repository at the hub, and the names its file may have, in the order in which they are tried."""

    repo: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Catalogue:
    """What the models of a task are called, and where their weights are.

    Attributes:
        demo_names: models that come with this repository.
        demo_folder: holds ``<demo name>.safetensors`` and ``<demo name>.json`` (``tag``, ``sha256``).
        full_name: ``model.tag`` or the untagged model of a name; raises ModelError for unknown ones.
        choices: ``model.tag`` of the weights that an untagged name may mean.
        untagged: why an untagged name is refused, for people.
        repository: of a ``model.tag``; None where no hub has it.
        repositories: their names for people; empty where names of models do not show them.
    """

    demo_names: tuple[str, ...]
    demo_folder: Path
    full_name: Callable[[str], str]
    choices: Callable[[str], list[str]]
    untagged: str
    repository: Callable[[str], Repository | None]
    repositories: str = ""

    def local_weights(self, request: ModelRequest) -> Path | None:
        """The weights file to use: as asked for, or the one in the weights folder that is called after the model."""
        if request.weights is not None:
            return request.weights
        if request.weights_folder is not None and request.name not in self.demo_names:
            name = self.full_name(request.name)
            files = (request.weights_folder / f"{name}{suffix}" for suffix in SUFFIXES)
            return next(filter(Path.is_file, files), None)
        return None

    def model_tag(self, request: ModelRequest) -> str:
        """The identity of model and weights, ``model.tag``.

        Weights from a file keep the published tag only if the file is called after it; else the tag is
        ``local-`` and the beginning of the file's sha256.

        Raises:
            ModelError: unknown model, or a name that names no weights.
        """
        weights = self.local_weights(request)
        if weights is not None and not weights.is_file():
            raise ModelError(f"There is no weights file {weights}.")
        if request.name in self.demo_names and weights is None:
            return f"{request.name}.{self._demo_metadata(request.name)['tag']}"
        name = request.name if request.name in self.demo_names else self.full_name(request.name)
        model, _, tag = name.partition(".")
        if weights is not None and (weights.stem.removesuffix(".pth") != name or not tag):
            return f"{model}.local-{file_sha256(weights)[:12]}"
        if weights is None and not tag:
            choices = " or ".join(self.choices(name)) or "a local file with --weights"
            raise ModelError(f"'{name}' names no weights, and {self.untagged}: choose {choices}.")
        return name

    def weights_digest(self, request: ModelRequest) -> str | None:
        """The sha256 of weights that are a file here (demo weights: by their metadata); None for the hub's."""
        weights = self.local_weights(request)
        if weights is not None:
            return file_sha256(weights)
        if request.name in self.demo_names:
            return str(self._demo_metadata(request.name)["sha256"])
        return None

    def missing_weights(self, request: ModelRequest) -> Missing | None:
        """The weights, if they are not here and the hub that has them does not answer."""
        if request.name in self.demo_names and self.local_weights(request) is None:
            path = self.demo_folder / f"{request.name}.safetensors"
            advice = (
                "They belong to the repository; `python scripts/train_demo.py` makes them anew."
            )
            return None if path.is_file() else Missing(f"the weights of {request.name}", advice)
        tag, weights = self.model_tag(request), self.local_weights(request)
        if weights is not None:
            return None
        found = self.repository(tag)
        if found is None:
            return Missing(f"the weights of {tag}", _NOT_AT_THE_HUB)
        if cached_file(found) is not None or hub_answers():
            return None
        folder = (
            f"in the folder {request.weights_folder}, "
            if request.weights_folder is not None
            else ""
        )
        place = f" ({self.repositories})" if self.repositories else ""
        return Missing(
            f"the weights of {tag}"
            if self.repositories
            else f"the weights of {tag} (repository {found.repo})",
            f"Looked for {folder}in the Hugging Face cache and at its hub{place}, which does not answer. Run once with a "
            "network, or give a folder with <name>.safetensors: WEIGHTS=/path for make, --weights for a grid, --weights-folder "
            "for an adapter.",
        )

    def fetch(self, tag: str) -> Path:
        """The published weights of ``model.tag``: from the cache, else downloaded. Raises ModelError."""
        found = self.repository(tag)
        if found is None:
            raise ModelError(f"Missing: the weights of {tag}. {_NOT_AT_THE_HUB}")
        return cached_file(found) or download(found, f"weights of {tag}")

    def _demo_metadata(self, name: str) -> dict[str, Any]:
        path = self.demo_folder / f"{name}.json"
        if not path.is_file():
            raise ModelError(
                f"There are no demo weights of {name}: run `python scripts/train_demo.py`."
            )
        state = path.stat()
        return _read_metadata(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=64)
def _read_metadata(path: Path, changed: int, size: int) -> dict[str, Any]:
    """Read once while the file stays as it is: a plan asks for it several times a cell."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def cached_file(repository: Repository) -> Path | None:
    """The file in the local Hugging Face cache, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    for file in repository.files:
        found = try_to_load_from_cache(repository.repo, file)
        if isinstance(found, str):
            return Path(found)
    return None


def download(repository: Repository, what: str) -> Path:
    """Return the first file that the repository has, from the hub; ``what`` names it for people. Raises ModelError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
    )

    for file in repository.files:
        try:
            return Path(hf_hub_download(repository.repo, file))
        except RemoteEntryNotFoundError:
            continue  # the repository is there, this file is not
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ModelError(
                f"The {what} could not be downloaded from the Hugging Face hub: {error}"
            ) from error
    raise ModelError(
        f"The {what} are not in the Hugging Face repository {repository.repo}: no {' or '.join(repository.files)}."
    )


@lru_cache(maxsize=1)
def hub_answers(seconds: float = 5.0) -> bool:
    """Return True if a connection to the Hugging Face hub can be opened; nothing is downloaded."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(
        os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    ):
        return True  # only a real request could tell
    address = urlparse(constants.ENDPOINT)
    try:
        with socket.create_connection(
            (address.hostname, address.port or (443 if address.scheme == "https" else 80)), seconds
        ):
            return True
    except OSError:
        return False
