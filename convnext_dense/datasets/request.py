"""What the user asks for, what comes of it, and what reading both kinds of data shares."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError
from .check_images import ImageInfo
from .diagnostics import UNTRAINABLE_CODES, Report
from .files import as_bytes

CAUSES = 3  # that are named where nothing is left
HELD_OUT = 0.1  # of the images, where nothing says which are for evaluation


@dataclass
class DatasetRequest:
    """What the user asks for. `path` is the folder; `files` and `images` are explicit COCO json and folders of images
    by split; `classes` a file or a known name; `ignore` labels that are no class; `held_out` the share of images for
    evaluation where the data are not split."""

    path: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    images: dict[str, str] = field(default_factory=dict)
    classes: str | None = None
    ignore: Sequence[int] | None = None
    held_out: float | None = None
    strict: bool = False

    @property
    def root(self) -> Path:
        return Path(self.path or os.path.dirname(next(iter(self.files.values()))) or '.')


@dataclass
class CheckedDataset:
    """Checked data: `splits` holds what is written for each, COCO's dict or a list of pairs; `turn` is whether images
    are turned as EXIF says; `masks` whether annotations have masks (detection); `settings` what PairedSegDataset is
    told of labels (segmentation); `places` are the files and folders that were read."""

    task: str
    root: str
    classes: list[str]
    splits: dict[str, object]
    report: Report
    palette: list | None = None
    turn: bool = True
    masks: bool = True
    settings: dict = field(default_factory=dict)
    places: list[str] = field(default_factory=list)


def split_by_hash(names: Sequence[str], request: DatasetRequest, root: Path | None = None) -> tuple[set[str], str]:
    """The names (relative to `root`) that are held out for evaluation, and what says so. A hash of each decides: data
    that grow move no image from one side to the other."""
    share = HELD_OUT if request.held_out is None else request.held_out
    if not 0 < share < 1:
        raise UsageError(f'--val-fraction {share}: give a share between 0 and 1, such as 0.1')

    def drawn(name: str) -> float:
        text = relative_to_root(name, root) if root else name
        digest = hashlib.sha256(as_bytes(text)).digest()
        return int.from_bytes(digest[:6], 'big') / 2**48

    out = {name for name in names if drawn(name) < share} or set(sorted(names, key=drawn)[:1])
    count = f'{len(out):,} of {len(names):,}'
    said = f'; nothing says what is for evaluation: {count} images are held out, by their names'
    return out, said


def check_val_fraction(request: DatasetRequest, said: str) -> None:
    """Raise UsageError where a share was asked for of data that nothing is held out of."""
    if request.held_out is not None and not said:
        raise UsageError('--val-fraction is for data without a split: these have one')


def select_splits(found: Mapping, splits: Sequence[str], root: Path) -> dict:
    """What was found of the splits, val's as 'test' where that alone is asked for; UsageError where none is."""
    if 'test' in splits and 'val' not in splits and 'val' in found:
        found = {'test': found['val'], **found}
    kept = {split: found[split] for split in splits if split in found}
    if not kept:
        raise UsageError(f'{root} has no {" or ".join(splits)} data: it has {", ".join(found)}')
    return kept


def report_empty(report: Report, split: str, usable: int, folder: Path) -> None:
    """Report a split of which nothing is left, and what most of it was lost to."""
    if usable:
        return
    diagnostics = [d for d in report.by_action() if d.split in (split, 'all')]
    causes = [d for d in diagnostics if d.is_problem or d.code in UNTRAINABLE_CODES]
    causes = causes or [d for d in diagnostics if d.code == 'image-without-annotations']
    causes.sort(key=lambda diagnostic: diagnostic.count, reverse=True)
    said = '; '.join(cause.in_short() for cause in causes[:CAUSES]) or 'no images'
    report.add(split, 'nothing-to-train-on' if split == 'train' else 'nothing-to-evaluate', f'{folder}: {said}')


def report_duplicates(names: Mapping[str, Sequence[str]], seen: Mapping[str, ImageInfo], report: Report) -> None:
    """Report images that are there twice, in a split or in train and another."""
    first: dict[str, tuple[str, str]] = {}
    for split, of in names.items():
        for name in of:
            there = first.setdefault(seen[name].digest, (split, name))
            if there != (split, name):
                kind = 'duplicate-image' if there[0] == split else 'train-image-in-val'
                report.add(split, kind, f'{name} is {there[1]}')


def summarize_classes(classes: Sequence[str]) -> str:
    """How many classes there are, and the first few."""
    names = ', '.join(classes[:6]) + (', ...' if len(classes) > 6 else '')
    return f'{len(classes)} class{"" if len(classes) == 1 else "es"}: {names}'


def is_below(path: str | Path, folder: str | Path) -> bool:
    """Whether a path is a folder or lies in it, by names alone."""
    full, top = os.path.abspath(path), os.path.abspath(folder)
    return full == top or full.startswith(top.rstrip(os.sep) + os.sep)


def relative_to_root(path: str | Path, root: Path) -> str:
    """A path relative to the data's root, or absolute where it lies elsewhere."""
    full, top = os.path.abspath(path), os.path.abspath(root)
    return os.path.relpath(full, top) if is_below(full, top) and full != top else full
