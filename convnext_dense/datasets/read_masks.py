"""Reading and checking a segmentation data set: images and segmentation masks."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import UsageError
from .check_images import ImageInfo, MaskInfo, inspect_all, inspect_pair
from .check_masks import LabelSpec, infer_class_count, infer_label_spec, validate_labels, validate_pairs
from .class_names import class_files
from .diagnostics import Report
from .image_sizes import ResizeLimit
from .layouts import Pairing, SplitDirs, pair_files
from .request import (
    CheckedDataset,
    DatasetRequest,
    check_val_fraction,
    relative_to_root,
    report_duplicates,
    report_empty,
    select_splits,
    split_by_hash,
    summarize_classes,
)


def read_segmentation(
    request: DatasetRequest,
    layout: str,
    split_dirs: dict[str, SplitDirs],
    splits: Sequence[str],
    classes: Sequence[str] | None,
    limits: Mapping[str, ResizeLimit],
) -> CheckedDataset:
    """Read and check a segmentation data set; folders as of `find_folders`, the rest as of `custom.read_data`."""
    root, report = request.root, Report()
    main_split = next(split for split in ('train', 'all', *split_dirs) if split in split_dirs)
    mask_suffix = pair_files(split_dirs[main_split]).mask_suffix
    pairings = {split: pair_files(dirs, mask_suffix) for split, dirs in split_dirs.items()}
    if mask_suffix.startswith('_gtFine') and 'val' in pairings:
        pairings.pop('test', None)  # Cityscapes does not publish the masks of its test split
    spec = infer_label_spec(root, layout, mask_suffix, request.classes, request.ignore_labels)
    split_note = ''
    if main_split in ('train', 'all') and 'val' not in pairings:
        split_note = _split_pairings(pairings, main_split, request)
    check_val_fraction(request, split_note)
    pairings = select_splits(pairings, splits, root)
    report.facts.append(f'{root}: segmentation masks, layout {layout}{split_note}')

    pairs = [pair for pairing in pairings.values() for pair in pairing.pairs]
    items = [(str(image), str(mask)) for image, mask in pairs]
    infos = inspect_all(inspect_pair, items, 'images and segmentation masks')
    image_infos = {image: info for (image, _), (info, _) in infos.items()}
    mask_infos = {mask: info for (_, mask), (_, info) in infos.items()}
    if spec.names is None:
        spec = spec._replace(names=list(classes)) if classes else infer_class_count(mask_infos, spec, root)
    if classes and list(classes) != spec.names:
        raise UsageError(
            f"{root} has {summarize_classes(spec.names)}; the checkpoint's are {summarize_classes(classes)}"
        )
    validate_labels(mask_infos, spec, report)
    apply_exif = decide_exif_handling(pairs, image_infos, mask_infos)
    contents, pixels = {}, {}
    for split, pairing in pairings.items():
        _report_pairing(pairing, split, report)
        usable, pixels[split] = validate_pairs(
            pairing.pairs, image_infos, mask_infos, spec, apply_exif, split, report, limits.get(split, ResizeLimit())
        )
        contents[split] = [[relative_to_root(path, root) for path in pair] for pair in usable]
        report.facts.append(f'{split}: {len(usable):,} images with segmentation masks')
        report_empty(report, split, len(usable), root)
    report_class_usage(pixels, spec, report)
    image_names = {split: [image for image, _ in content] for split, content in contents.items()}
    report_duplicates(image_names, {relative_to_root(path, root): i for path, i in image_infos.items()}, report)
    report.facts.append(_describe_labels(spec))
    watched = [*class_files(root, request.classes), *{path for dirs in split_dirs.values() for path in dirs[:2]}]
    return CheckedDataset(
        'segmentation',
        os.path.abspath(root),
        spec.names,
        contents,
        report,
        palette=spec.palette,
        apply_exif=apply_exif,
        dataset_kwargs=spec.dataset_kwargs,
        watched_paths=[os.path.abspath(path) for path in watched],
    )


def _split_pairings(pairings: dict[str, Pairing], main_split: str, request: DatasetRequest) -> str:
    """Split the pairs of `main_split` into train and val, in place; return a note for the report."""
    pairing = pairings[main_split]
    val_names, split_note = split_by_hash([str(image) for image, _ in pairing.pairs], request, request.root)
    train, val = ([p for p in pairing.pairs if (str(p[0]) in val_names) == is_val] for is_val in (False, True))
    pairings['train'] = pairing._replace(pairs=train)
    pairings['val'] = Pairing(val, [], [], pairing.mask_suffix)  # what has no pair is reported once, for train
    return split_note


def _report_pairing(pairing: Pairing, split: str, report: Report) -> None:
    """Report files without a pair, and names that do not match as they are written."""
    for code, paths in (
        ('unmatched-image', pairing.unmatched_images),
        ('unmatched-mask', pairing.unmatched_masks),
        ('duplicate-stem', pairing.duplicate_stems),
    ):
        for path in paths:
            report.add(split, code, path.name)
    for code, examples in (
        ('name-spelling-mismatch', pairing.respelled),
        ('ambiguous-name', pairing.ambiguous),
    ):
        for example in examples:
            report.add(split, code, example)


def _describe_labels(spec: LabelSpec) -> str:
    """Return the classes, the labels of the first and the last one, and the ignored labels."""
    ends = {spec.labels[0]: spec.names[0], spec.labels[-1]: spec.names[-1]}
    labels = ', '.join(f'label {label} is {name}' for label, name in ends.items())
    ignored = ', '.join(map(str, sorted(spec.ignored)))
    return f'{summarize_classes(spec.names)}; {labels}; ignored labels: {ignored}'


def decide_exif_handling(
    pairs: list[tuple[Path, Path]], images: Mapping[str, ImageInfo], masks: Mapping[str, MaskInfo]
) -> bool:
    """Return whether images are to be rotated as EXIF says, which is what training does by default.

    They are not if sizes of masks fit images as they are stored, and none fits a rotated one.
    """
    infos = [(images[str(image)], masks[str(mask)]) for image, mask in pairs if images[str(image)].exif_swapped]
    infos = [(image, mask) for image, mask in infos if image.width != image.height]
    fits_rotated = any((i.width, i.height) == (m.width, m.height) for i, m in infos)
    return fits_rotated or not any((i.height, i.width) == (m.width, m.height) for i, m in infos)


def report_class_usage(pixels: dict[str, np.ndarray], spec: LabelSpec, report: Report) -> None:
    """Report classes without pixels, in all splits or in train.

    Args:
        pixels: number of pixels of each class, by split.
        spec: the classes.
        report: to add to.
    """
    for i, name in enumerate(spec.names):
        if not any(counts[i] for counts in pixels.values()):
            report.add('all', 'class-never-annotated', name)
        elif 'train' in pixels and not pixels['train'][i]:
            report.add(next(split for split in pixels if pixels[split][i]), 'class-not-in-train', name)
    trained = np.flatnonzero(pixels.get('train', ())).tolist()
    if len(trained) == 1 < len(spec.names):
        report.add('train', 'single-class-in-train', spec.names[trained[0]])
