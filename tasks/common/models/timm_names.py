"""Names of timm's models. Only names that are not in the list of short names import timm."""

from collections.abc import Iterable, Mapping

from fimaq_core.errors import ModelError, suggest


def full_name(name: str, short_names: Mapping[str, str], demo_names: Iterable[str]) -> str:
    """Return the full timm name, with a tag if the given name has one. Raises ModelError."""
    if name in short_names:
        return short_names[name]
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        known = [*short_names, *demo_names, *timm.list_models(["vit*", "deit*", "swin*"])]
        hint = suggest(name, known)
        hint = hint if len(hint) < 200 else " See `models` for short names."
        raise ModelError(f"Unknown model '{name}'.{hint}")
    if tag and tag not in timm_tags(name):
        raise ModelError(
            f"timm has no weights '{tag}' for {architecture}.{suggest(tag, timm_tags(name))}"
        )
    return name


def timm_tags(name: str) -> list[str]:
    """Return the tags of timm's pretrained weights for an architecture."""
    import timm

    return [found.partition(".")[2] for found in timm.list_pretrained(f"{name.split('.')[0]}.*")]
