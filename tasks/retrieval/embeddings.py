"""Embeddings of images and texts, in batches, at unit length."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fimaq_core.errors import DataError, ModelError, NumericsError
from tasks.common.images import Images
from tasks.common.outputs import image_outputs

#: Images (n, C, H, W) or token ids (n, L) to embeddings (n, d) of any length.
Encode = Callable[[Tensor], Tensor]
#: Texts to token ids (n, L) int64.
Tokenizer = Callable[[list[str]], Tensor]


def normalised(embeddings: Tensor) -> Tensor:
    """Embeddings (n, d) at unit length, in float32. Raises NumericsError for NaN, infinity or zero."""
    embeddings = embeddings.float()
    lengths = embeddings.norm(dim=-1, keepdim=True)
    if not bool(torch.isfinite(lengths).all()):
        raise NumericsError("The embeddings have NaN or infinite values: check the weights and the recipe.")
    if not bool((lengths > 0).all()):
        raise NumericsError("An embedding is zero, so that it is similar to nothing: check the weights and the recipe.")
    return embeddings / lengths


def embed_images(
    encode_image: Encode, images: Images, device: torch.device, batch_size: int, workers: int, advance: Callable[[int], None]
) -> tuple[Tensor, Tensor]:
    """Embed all images: positions (n,) of those not skipped, and embeddings. Raises DataError."""
    positions, embeddings = [], []
    for batch in image_outputs(encode_image, images, device, batch_size, workers):
        positions.append(batch.positions)
        embeddings.append(normalised(batch.values))
        advance(batch.done)
    if not positions:
        raise DataError("None of the images could be read.")
    return torch.cat(positions), torch.cat(embeddings)


#: Texts that are tokenized at a time.
_TEXTS = 4096


@torch.no_grad()
def embed_texts(
    encode_text: Encode,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    device: torch.device,
    batch_size: int,
    advance: Callable[[int], None],
) -> Tensor:
    """Embed ``texts`` as (n, d) on ``device``; ``advance`` gets the number of those done.

    Texts of equal tokens are encoded once: the last bits of an embedding depend on its place in the
    batch, and these shall tie. Raises ModelError, NumericsError.
    """
    rows = torch.cat([tokenizer(list(texts[start : start + _TEXTS])) for start in range(0, len(texts), _TEXTS)])
    distinct, place = torch.unique(rows, dim=0, return_inverse=True)
    embeddings = []
    for tokens in torch.split(distinct, batch_size):
        try:
            values = encode_text(tokens.to(device))
        except (RuntimeError, AssertionError, IndexError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise ModelError(f"The model does not take tokens of shape {tuple(tokens.shape[1:])}: {error}") from error
        embeddings.append(normalised(values))
        advance(len(texts) - len(distinct) + sum(len(part) for part in embeddings))
    return torch.cat(embeddings)[place.to(device)]
