"""The sources of ConvNeXt weights: one small entry each, how to recognise it and how to rename it."""

import re
from collections.abc import Callable
from dataclasses import dataclass

NORMS = re.compile(r'norm\d+\.(weight|bias)')
TRUNK = re.compile(r'(downsample_layers|stages)\.(\d+)\.')


@dataclass(frozen=True)
class Format:
    """`recognise(names)` says whether a file with these parameter names is of this source; `rename(name)` gives our
    name of one of its parameters, or None for what belongs to no backbone."""

    title: str
    recognise: Callable[[set[str]], bool]
    rename: Callable[[str], str | None]


def _ours(name: str) -> str | None:
    """The original's names are ours; its final norm and classifier belong to no backbone."""
    return name if TRUNK.match(name) or NORMS.fullmatch(name) else None


FORMATS = (
    Format('ImageNet weights of the original code', lambda names: 'downsample_layers.0.0.weight' in names, _ours),
    Format(
        'the backbone of a detector or segmentor',
        lambda names: 'backbone.downsample_layers.0.0.weight' in names,
        lambda name: _ours(name.removeprefix('backbone.')) if name.startswith('backbone.') else None,
    ),
)
