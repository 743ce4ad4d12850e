"""Records of older schemas, brought to the present one when they are read; their files stay as they are.

A step a version. To change the schema: raise ``SCHEMA_VERSION`` in :mod:`tasks.common.record`, add the step from the version
before to :data:`STEPS`, and keep a record of that version among the tests' data.
"""

from collections.abc import Callable, Mapping
from typing import Any

Content = dict[str, Any]

#: Fields that version 2 brought.
_NEW_IN_2 = ("stage_memory_bytes", "blocks", "outcomes_sha256", "examples", "fingerprint")


def _from_1(content: Content) -> Content:
    """Memory a stage, figures of blocks, examples, hash and fingerprint: not known of version 1, so left empty."""
    foreign = [name for name in _NEW_IN_2 if name in content]
    if foreign:
        raise ValueError(f"version 1 has no field '{foreign[0]}'")
    return {**content, "schema_version": 2}


def _from_2(content: Content) -> Content:
    """Fields of version 3 have defaults that mean "not recorded"."""
    return {**content, "schema_version": 3}


#: From each older version to the next.
STEPS: Mapping[int, Callable[[Content], Content]] = {1: _from_1, 2: _from_2}


def migrated(content: Content, version: int, present: int) -> Content:
    """``content`` of a record of an older ``version`` as one of version ``present``.

    Raises:
        ValueError: it is not what its version says.
    """
    for number in range(version, present):
        content = STEPS[number](content)
    return content
