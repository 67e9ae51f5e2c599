"""What the user asks for, the checked data set that results, and what detection and segmentation share on the way."""

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError, count
from .diagnostics import Report
from .file_names import encode_name
from .files import is_below

DEFAULT_VAL_FRACTION = 0.1  # fraction of the images if the data set has no validation split


@dataclass
class DatasetRequest:
    """A data set as the command line names it.

    Attributes:
        path (str | None): folder of the data set, or its data.yaml of YOLO.
        ann_files (dict[str, str]): annotations by split, a file or a folder of labels; these take precedence over what
            `path` holds.
        image_dirs (dict[str, str]): folder of the images by split of `ann_files` or `mask_dirs`.
        classes (str | Sequence[str] | None): segmentation: a file of class names, or 'ade20k', 'cityscapes', 'voc';
            detection: such a file, or entries as of `select_classes.parse_entries`.
        ignore_labels (Sequence[int] | None): segmentation: label values to ignore in addition to 255.
        val_fraction (float | None): fraction of the images used for validation when the data set has no split.
        strict (bool): whether to raise if anything has to be dropped.
        mask_dirs (dict[str, str]): folder of the segmentation masks by split.
        format (str | None): detection: one of `box_formats.FORMAT_KEYS`; None for the first that is found.
        class_attribute (str | None): detection: the attribute of VIA's regions that is the class; None if it is the
            only one.
        data_yaml (str | None): the data.yaml that says all of this, in which `path` is the root.
        mask_threshold (int | None): segmentation: gray value of the masks from which on a pixel is of the second class.
        ignore_other_colors (bool): segmentation: whether colors of the masks that are in no table are ignored.
        channels (tuple[int, ...] | None): numbers of the channels of the images, from 1, in the order of the model's
            input; None for RGB, or all channels of images that are not RGB.
    """

    path: str | None = None
    ann_files: dict[str, str] = field(default_factory=dict)
    image_dirs: dict[str, str] = field(default_factory=dict)
    classes: str | Sequence[str] | None = None
    ignore_labels: Sequence[int] | None = None
    val_fraction: float | None = None
    strict: bool = False
    format: str | None = None
    mask_dirs: dict[str, str] = field(default_factory=dict)
    class_attribute: str | None = None
    data_yaml: str | None = None
    mask_threshold: int | None = None
    ignore_other_colors: bool = False
    channels: tuple[int, ...] | None = None

    @property
    def root(self) -> Path:
        """The folder to which paths of the data set are relative."""
        if self.path and not os.path.isfile(self.path):
            return Path(self.path)
        if self.mask_dirs:
            folders = [*self.mask_dirs.values(), *self.image_dirs.values()]
            return Path(os.path.commonpath([os.path.abspath(folder) for folder in folders]))
        return Path(os.path.dirname(self.path or next(iter(self.ann_files.values()))) or '.')

    def needs_val_split(self, splits: Collection[str]) -> bool:
        """Return whether a validation split has to be chosen, as a data set has none among its splits.

        Raises:
            UsageError: it has one, and a fraction is given.
        """
        if 'val' not in splits and {'train', 'all'} & {*splits}:
            return True
        if self.val_fraction is not None:
            text = '--val-fraction is for a data set without a validation split; this one has one: leave it out'
            raise UsageError(text)
        return False


@dataclass
class CheckedDataset:
    """A data set of which only usable images and annotations are left.

    Attributes:
        task (str): 'detection' or 'segmentation'.
        root (str): absolute path to which file names are relative.
        classes (list[str]): class names, in the order of their indices.
        splits (dict[str, object]): COCO dict (detection) or list of [image, segmentation mask] of each split.
        report (Report): what the data set holds, and what is wrong with it.
        palette (list | None): RGB colors of the classes.
        apply_exif (bool): whether images are rotated as EXIF says.
        has_masks (bool): detection: whether annotations have masks.
        dataset_kwargs (dict): segmentation: arguments of `PairedSegDataset` that map labels to classes.
        mask_encoding (dict | None): segmentation: fields of `MaskEncoding` if masks have to be converted.
        channels (dict | None): fields of `ChannelReader` if images are not read as RGB.
        watched_paths (list[str]): files, folders of images and `folder/*.suffix` whose changes invalidate the cache.
    """

    task: str
    root: str
    classes: list[str]
    splits: dict[str, object]
    report: Report
    palette: list | None = None
    apply_exif: bool = True
    has_masks: bool = True
    dataset_kwargs: dict = field(default_factory=dict)
    mask_encoding: dict | None = None
    channels: dict | None = None
    watched_paths: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.root = os.path.abspath(self.root)
        self.watched_paths = [os.path.abspath(path) for path in self.watched_paths]


def split_by_hash(names: Sequence[str], request: DatasetRequest, root: Path | None = None) -> tuple[set[str], str]:
    """Choose a random validation split.

    Those images are used for validation whose names have the lowest hashes. When others are added, only a few near the
    limit change their split.

    Args:
        names: names of the images.
        request: gives the fraction.
        root: if given, names are hashed relative to it.

    Returns:
        The names of the validation split (at least one, and not all of several), and a note for the report.

    Raises:
        UsageError: the fraction is not between 0 and 1.
    """
    fraction = DEFAULT_VAL_FRACTION if request.val_fraction is None else request.val_fraction
    if not 0 < fraction < 1:
        raise UsageError(f'--val-fraction {fraction}: give a fraction between 0 and 1, such as 0.1')

    def hash_of(name: str) -> float:
        text = relative_to_root(name, root) if root else name
        digest = hashlib.sha256(encode_name(text)).digest()
        return int.from_bytes(digest[:6], 'big') / 2**48

    num_val = min(max(round(fraction * len(names)), 1), max(len(names) - 1, 1))
    val_names = set(sorted(names, key=lambda name: (hash_of(name), name))[:num_val])
    num_val = f'{len(val_names):,} of {len(names):,}'
    return val_names, f'; random validation split: {num_val} images, chosen by the hash of the file name'


def select_splits(by_split: Mapping, splits: Sequence[str], root: Path) -> dict:
    """Select the requested splits that exist; 'test' is val's where val itself is not requested.

    Raises:
        UsageError: none exists.
    """
    if 'test' in splits and 'val' not in splits and 'val' in by_split:
        by_split = {'test': by_split['val'], **by_split}
    selected = {split: by_split[split] for split in splits if split in by_split}
    if not selected:
        raise UsageError(f'{root} has no {" or ".join(splits)} data; it has {", ".join(by_split)}')
    return selected


def summarize_classes(classes: Sequence[str]) -> str:
    """Return how many classes there are, and the first six names."""
    names = ', '.join(classes[:6]) + (', ...' if len(classes) > 6 else '')
    return f'{count(len(classes), "class", "classes")}: {names}'


def relative_to_root(path: str | Path, root: Path) -> str:
    """Return a path relative to the data set's root, or absolute where it lies elsewhere."""
    full, top = os.path.abspath(path), os.path.abspath(root)
    return os.path.relpath(full, top) if is_below(full, top) and full != top else full
