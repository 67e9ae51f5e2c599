"""Checks of segmentation masks: which label values are which classes, and which pairs of files are usable."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UsageError
from .check_images import MaskInfo
from .class_names import KNOWN_DATASETS, class_files, read_classes
from .diagnostics import Report
from .files import to_one_line
from .image_sizes import ResizeLimit, too_thin
from .mask_encoding import IGNORE_INDEX
from .request import DatasetRequest, summarize_classes
from .toy_shapes import LABEL_NAMES, PALETTE

BACKGROUND_NAMES = ('background', 'unlabeled', 'unlabelled', 'void', 'ignore')
MAX_LISTED_LABELS = 10  # labels that a message names
# Values between 0 and 255 belong to edges if there are many of them, each is rare, and most pixels are 0 or 255.
MIN_EDGE_VALUES, MAX_EDGE_FRACTION, MIN_ENDS_FRACTION = 8, 0.05, 0.7
MMSEG_DATASETS = dict(zip(KNOWN_DATASETS, ('ADE20KDataset', 'CityscapesDataset', 'PascalVOCDataset')))
# The labelIds of Cityscapes that are evaluated, in the order of their classes.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


class LabelSpec(NamedTuple):
    """What the label values of segmentation masks mean.

    Attributes:
        names (list[str] | None): class names; None until the masks are read, where nothing else names them.
        palette (list[list[int]] | None): RGB colors of the classes.
        ignored (frozenset[int]): label values that are no class.
        raw_values (Sequence[int] | None): label value of each class; None for 0, 1, ..., or 1, 2, ... if 0 is ignored.
    """

    names: list[str] | None
    palette: list[list[int]] | None = None
    ignored: frozenset[int] = frozenset({IGNORE_INDEX})
    raw_values: Sequence[int] | None = None

    @property
    def labels(self) -> Sequence[int]:
        """The label value of each class."""
        first_label = 1 if 0 in self.ignored else 0
        return range(first_label, first_label + len(self.names)) if self.raw_values is None else self.raw_values

    @property
    def label_to_class(self) -> dict[int, int]:
        """The class index, or `IGNORE_INDEX`, of each label value that may occur."""
        unused = range(max(self.raw_values or [0]) + 1 if self.raw_values else 0)
        classes = {label: i for i, label in enumerate(self.labels) if label not in self.ignored}
        return {**dict.fromkeys((*self.ignored, *unused), IGNORE_INDEX), **classes}

    @property
    def dataset_kwargs(self) -> dict:
        """Arguments of `PairedSegDataset`: `reduce_zero_label`, and `label_map` for what that does not cover."""
        reduces = self.raw_values is None and 0 in self.ignored
        labels = {label: i for label, i in self.label_to_class.items() if label >= reduces}
        if IGNORE_INDEX in self.ignored:
            del labels[IGNORE_INDEX]
        # label_map is applied after reduce_zero_label.
        label_map = [[label - reduces, index] for label, index in labels.items() if index != label - reduces]
        return dict(reduce_zero_label=reduces, label_map=label_map or None)


def infer_label_spec(request: DatasetRequest, layout: str, mask_suffix: str) -> LabelSpec:
    """Find the classes of a data set.

    Args:
        request: its `classes` are names, a file, or a key of `MMSEG_DATASETS`; None to look for a file in the root.
        layout: layout that `layouts.find_folders` returns.
        mask_suffix: what names of masks end with, as of `layouts.Pairing`.

    Raises:
        UsageError: a label value is out of range, or the file cannot be read.
    """
    root, classes, ignore_labels = request.root, request.classes, request.ignore_labels or ()
    invalid = next((label for label in ignore_labels if not 0 <= label <= IGNORE_INDEX), None)
    if invalid is not None:
        raise UsageError(f'--ignore {to_one_line(invalid, 20)}: labels are 0 to {IGNORE_INDEX}')
    file = next((f for f in class_files(root, None) if f.exists()), None)
    dataset_key = classes if classes in [*MMSEG_DATASETS] else None
    if not classes and not file:
        is_voc = layout == 'VOC' and re.fullmatch(r'VOC20\d\d', root.resolve().name) is not None
        is_ade, is_cityscapes = (root / 'objectInfo150.txt').exists(), mask_suffix.startswith('_gtFine')
        dataset_key = 'ade20k' if is_ade else 'cityscapes' if is_cityscapes else 'voc' if is_voc else None
    is_toy = (root / 'shapes.json').exists() and not classes
    if dataset_key:
        names, palette = mmseg_classes(dataset_key)
    elif classes:
        names, palette = read_classes(Path(classes)) if isinstance(classes, str) else (list(classes), None)
    elif is_toy:
        names, palette = list(LABEL_NAMES), PALETTE
    else:
        names, palette = read_classes(file) if file else (None, None)
    has_zero_ignored = dataset_key == 'ade20k' or is_toy
    ignored = frozenset({IGNORE_INDEX, *ignore_labels, *([0] if has_zero_ignored else [])})
    names_background = names and len(names) > 1 and names[0].strip('_').lower() in BACKGROUND_NAMES
    if not has_zero_ignored and 0 in ignored and names_background:  # the file also names the ignored label
        names, palette = names[1:], palette and palette[1:]
    is_label_ids = dataset_key == 'cityscapes' and mask_suffix.endswith(('labelIds', 'instanceIds'))
    return LabelSpec(names, palette, ignored, CITYSCAPES_IDS if is_label_ids else None)


def spec_of_table(names: list[str], colors: list[list[int]], ignore_labels: Sequence[int]) -> LabelSpec:
    """Return the classes of color-coded masks, whose labels are their places in the table, without ignored ones.

    Raises:
        UsageError: all are ignored.
    """
    labels = [label for label in range(len(names)) if label not in ignore_labels]
    if not labels:
        raise UsageError(f'--ignore leaves none of {summarize_classes(names)}: name fewer labels')
    names, colors = [names[label] for label in labels], [colors[label] for label in labels]
    return LabelSpec(names, colors, frozenset({IGNORE_INDEX, *ignore_labels}), labels if ignore_labels else None)


def mmseg_classes(dataset_key: str) -> tuple[list[str], list[list[int]]]:
    """Return the names and the RGB colors of the classes of a key of `MMSEG_DATASETS`."""
    from mmseg.registry import DATASETS  # this module must import without mmseg
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    meta = DATASETS.get(MMSEG_DATASETS[dataset_key]).METAINFO
    return list(meta['classes']), [list(color) for color in meta['palette']]


def as_binary(masks: Mapping[Path, MaskInfo], spec: LabelSpec) -> LabelSpec:
    """Return the classes of masks that have two values, 0 and 255 or 0 and 1; those of others unchanged.

    Of 0 and 255 the latter is no class as long as there are names for more than two; one name is that of 255.
    """
    values = np.flatnonzero(sum((info.counts for info in masks.values() if info.counts is not None), np.zeros(256)))
    names, is_named = spec.names or ['background', 'foreground'], spec.names is not None
    has_two = values.tolist() == [0, 255] or (values.tolist() == [0, 1] and not is_named)
    if 0 in spec.ignored or len(names) > 2 or not has_two:
        return spec
    if not is_named and any(info.palette for info in masks.values()):
        return spec
    if len(names) == 1:
        names = [*names, 'foreground'] if names[0].lower() in BACKGROUND_NAMES else ['background', *names]
    palette = spec.palette if spec.palette and len(spec.palette) == 2 else None
    if 255 not in values:
        return spec._replace(names=names, palette=palette)
    return LabelSpec(names, palette, spec.ignored - {IGNORE_INDEX}, (0, IGNORE_INDEX))


def infer_class_count(masks: Mapping[Path, MaskInfo], spec: LabelSpec, root: Path) -> LabelSpec:
    """Name classes by their label values, as many as occur, for masks with a palette and no file of names.

    Raises:
        UsageError: masks have no palette, so that their values may mean anything.
    """
    readable = [m for m in masks.values() if m.counts is not None]
    if not all(m.palette for m in readable):
        soft = _soft_edges(sum((m.counts for m in readable), np.zeros(256, int)))
        if soft:
            raise UsageError(f'{root}: {soft}')
        raise UsageError(
            f'{root} does not name its classes: give --classes FILE with one name per line, in the order of labels'
        )
    counts = np.sum([m.counts for m in readable], axis=0) if readable else np.zeros(256, int)
    labels = [label for label in np.flatnonzero(counts).tolist() if label not in spec.ignored]
    first_label = 1 if 0 in spec.ignored else 0
    return spec._replace(names=[f'class {i}' for i in range(first_label, max(labels, default=first_label) + 1)])


def validate_labels(masks: Mapping[Path, MaskInfo], spec: LabelSpec, report: Report) -> None:
    """Report label values without a class, and sets of classes from which nothing can be learned, in any mask."""
    readable = {path: info for path, info in masks.items() if info.counts is not None}
    counts = sum((info.counts for info in readable.values()), np.zeros(256, int))
    labels, label_to_class = np.flatnonzero(counts).tolist(), spec.label_to_class
    unnamed = [label for label in labels if label not in label_to_class]
    soft, other_colors = _soft_edges(counts) if len(spec.names) <= 2 else None, Counter()
    for info in readable.values():
        other_colors.update(info.other_colors or {})
    if other_colors:
        colors = other_colors.most_common(MAX_LISTED_LABELS)
        texts = [f'{r} {g} {b}: {100 * n / counts.sum():.2g} %' for (r, g, b), n in colors]
        texts += ['...'] if len(other_colors) > MAX_LISTED_LABELS else []
        report.add('all', 'color-not-in-table', ', '.join(texts), len(other_colors))
    elif soft and unnamed:
        report.add('all', 'mask-soft-edges', soft)
    elif labels and len(spec.names) == 1:
        report.add('all', 'single-class', _single_class_advice(spec, counts))
    elif IGNORE_INDEX in spec.ignored and IGNORE_INDEX in labels and set(labels) <= {0, IGNORE_INDEX}:
        report.add('all', 'mask-values-0-and-255', f'the pixels are {_format_fractions(counts, labels)}')
    elif unnamed:
        files = [path.name for path, info in readable.items() if info.counts[unnamed].any()]
        location = f'in {files[0]}' if len(files) == 1 else f'in {len(files):,} masks, such as {files[0]}'
        report.add('all', 'label-out-of-range', _unnamed_labels_advice(unnamed, spec, counts, location))


def _soft_edges(counts: np.ndarray) -> str | None:
    """Say that masks of black and white have gray edges; None where they have none."""
    total, between = counts.sum(), counts[1:IGNORE_INDEX]
    values, percent = np.count_nonzero(between), 100 * between.sum() / max(total, 1)
    are_edges = values >= MIN_EDGE_VALUES and between.max() <= MAX_EDGE_FRACTION * total and between[128:].any()
    if not are_edges or not counts[0] or not counts[IGNORE_INDEX] or percent > 100 * (1 - MIN_ENDS_FRACTION):
        return None
    edges = f'{percent:.1f} % of the pixels have {values} values between 0 and 255'
    causes = 'as JPEG, resizing or anti-aliasing make them: write masks without, or give --mask-threshold 128'
    return f'the masks are black and white with gray edges: {edges}, {causes}'


def _single_class_advice(spec: LabelSpec, counts: np.ndarray) -> str:
    """Say how to fix a set of one class, by the pixels of each label value."""
    all_labels = np.flatnonzero(counts).tolist()
    labels = [label for label in all_labels if label != IGNORE_INDEX]
    missing_names = 'the classes' if spec.names[0].lower() in BACKGROUND_NAMES else 'the background'
    if len(all_labels) == 1:
        fix = f'all pixels are {all_labels[0]}: give masks that show at least two classes'
    elif len(labels) > MAX_LISTED_LABELS:
        fix = 'name a class for each label, if these are segmentation masks'
    elif labels == list(range(len(labels))) and len(labels) > 1:
        fix = f'name {missing_names}, too: {len(labels)} names, for labels {_join(labels)}'
    elif len(labels) > 1:
        fix = f'name {missing_names}, too, and write the labels {_join(labels)} as 0 to {len(labels) - 1}'
    else:
        change = f'{labels[0]} and 255, which is ignored, as 0 and 1'
        change = f'255, which is ignored, as {1 - labels[0]}' if labels[0] < 2 else change
        fix = f'name {missing_names}, too: two names, for labels 0 and 1, and write {change}'
    fix += ', without --ignore 0' if 0 in spec.ignored and 0 in labels and len(all_labels) > 1 else ''
    return f'{spec.names[0]} alone, where the pixels are {_format_fractions(counts, all_labels)}: {fix}'


def _unnamed_labels_advice(unnamed: list[int], spec: LabelSpec, counts: np.ndarray, location: str) -> str:
    """Say which labels have no name and how to fix it, by the pixels of each label value."""
    num_classes, label_to_class, ignored = len(spec.names), spec.label_to_class, spec.ignored - {IGNORE_INDEX}
    named_labels = [v for v in np.flatnonzero(counts).tolist() if label_to_class.get(v, IGNORE_INDEX) != IGNORE_INDEX]
    is_next = unnamed == [num_classes]
    with_zero, with_unnamed = (' '.join(map(str, sorted({*ignored, *added_labels}))) for added_labels in ([0], unnamed))
    if is_next and not counts[0] and named_labels:
        fix = f'0 is not used: --ignore {with_zero}'
    elif len(named_labels) < 2:
        fix = f'write labels as the indices of their classes, {spec.labels[0]} to {spec.labels[-1]}'
    elif len(unnamed) > MAX_LISTED_LABELS:
        fix = 'name their classes in --classes FILE, if these are segmentation masks'
    else:
        classes = 'its class' if len(unnamed) == 1 else 'their classes'
        fix = f'name {classes} in --classes FILE, or --ignore {with_unnamed}'
        fix += f', or, if 0 is no class, --ignore {with_zero}' if is_next else ''
    if len(unnamed) > 1:
        fractions = f'{_format_fractions(counts, unnamed)} of the pixels, {location}'
        return f'{len(unnamed)} labels are used and have no names ({fractions}): {fix}'
    fractions = f'{_format_fraction(counts, unnamed[0])} of the pixels, {location}'
    fractions += f'; label 0 has {_format_fraction(counts, 0)}' if counts[0] and 0 not in ignored else ''
    return f'label {unnamed[0]} is used and has no name ({fractions}): {fix}'


def _join(labels: list[int]) -> str:
    return f'{", ".join(map(str, labels[:-1]))} and {labels[-1]}'


def _format_fraction(counts: np.ndarray, label: int) -> str:
    percent = 100 * counts[label] / counts.sum()
    return f'{percent:.1f} %' if percent >= 0.05 else 'under 0.1 %'


def _format_fractions(counts: np.ndarray, labels: list[int]) -> str:
    text = ', '.join(f'{label}: {_format_fraction(counts, label)}' for label in labels[:MAX_LISTED_LABELS])
    return text + ', ...' * (len(labels) > MAX_LISTED_LABELS)


def validate_pairs(
    pairs: list, images: Mapping, masks: Mapping, spec: LabelSpec, apply_exif: bool, limit: ResizeLimit, add: Callable
) -> tuple[list[tuple[Path, Path]], np.ndarray]:
    """Check the pairs of an image and its segmentation mask in a split; `images` and `masks` say what the files are.

    Returns:
        The usable pairs, and the number of their pixels by class, (num_classes,).
    """
    label_to_class, usable, total = spec.label_to_class, [], np.zeros(len(spec.names), int)
    for image, mask in pairs:
        image_info, mask_info = images[image], masks[mask]
        size = image_info.oriented_size(apply_exif)
        code, example = image_info.problem, image_info.describe(image.name)
        if not code and mask_info.problem:
            code, example = mask_info.problem, mask.name
        if not code and size != (mask_info.width, mask_info.height):
            code = 'mask-size-mismatch'
            example = f'{mask.name}: {mask_info.width} x {mask_info.height}, its image {size[0]} x {size[1]}'
        if not code and (thin := too_thin(size, limit)):
            code, example = thin[0], f'{image.name}: {thin[1]}'
        if code:
            add(code, example)
            continue
        if image_info.exif_swapped and not apply_exif:
            add('exif-rotated-image', image.name)
        pixels = np.array([0 if label in spec.ignored else mask_info.counts[label] for label in spec.labels])
        if not pixels.any() and all(label in label_to_class for label in np.flatnonzero(mask_info.counts).tolist()):
            add('mask-all-ignored', mask.name)
            continue
        total += pixels
        usable.append((image, mask))
    return usable, total
