"""Reading and checking a detection data set: COCO json and its images."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UsageError
from . import SPLITS
from . import check_coco as checks
from .check_images import ImageInfo, inspect_all, inspect_image
from .diagnostics import Report
from .image_resolver import ImageResolver
from .image_sizes import ResizeLimit
from .request import (
    CheckedDataset,
    DatasetRequest,
    check_val_fraction,
    report_duplicates,
    report_empty,
    select_splits,
    split_by_hash,
    summarize_classes,
)


def read_detection(
    request: DatasetRequest,
    layout: str,
    files: dict[str, Path],
    splits: Sequence[str],
    classes: Sequence[str] | None,
    limits: Mapping[str, ResizeLimit],
) -> CheckedDataset:
    """Read and check a detection data set; files as of `layouts.find_coco_files`, the rest as of `custom.read_data`."""
    root, report = request.root, Report()
    if request.classes or request.ignore_labels is not None:
        raise UsageError('--classes and --ignore are for segmentation masks; COCO json names its own classes')
    if 'val' in request.ann_files or 'test' not in splits:  # a given file takes precedence over one that is found
        files.pop('test', None)
    cocos = {split: checks.read_coco(file, split) for split, file in files.items()}
    if 'test' in cocos and not cocos['test']['annotations']:  # published without annotations
        del cocos['test']
    resolvers = {
        split: ImageResolver(
            files[split],
            root,
            checks.image_names(coco),
            request.image_dirs.get(split),
            split if split in SPLITS else None,
        )
        for split, coco in cocos.items()
    }
    main_split = next(split for split in ('train', 'all', *cocos) if split in cocos)
    train = cocos[main_split]
    classes = [*(classes or checks.class_names(train, main_split, report))]
    if not classes:
        report.raise_if_errors()
        raise UsageError(f'{files[main_split]} has no categories, so there is nothing to learn')
    split_note = ''
    if main_split in ('train', 'all') and 'val' not in cocos:
        val_names, split_note = split_by_hash(checks.image_names(train), request)
        cocos['train'], cocos['val'] = checks.split_coco(train, val_names)
        resolvers['train'] = resolvers['val'] = resolvers[main_split]
    check_val_fraction(request, split_note)
    cocos, resolvers = (select_splits(by_split, splits, root) for by_split in (cocos, resolvers))
    report.facts.append(f'{root}: COCO json, layout {layout}{split_note}')

    infos = _inspect_images(cocos, resolvers, root)
    apply_exif = decide_exif_handling(cocos, resolvers, infos)
    has_masks = checks.most_have_masks(train, main_split, report)
    contents = {}
    for split, coco in cocos.items():
        if coco['categories'] != train['categories']:
            checks.class_names(coco, split, report)
        class_indices = checks.match_categories(coco, train, classes, split, report)
        limit = limits.get(split, ResizeLimit())
        images = checks.validate_images(coco, resolvers[split], infos, apply_exif, split, report, limit)
        annotations = checks.validate_annotations(coco, images, class_indices, has_masks, split, report)
        contents[split] = checks.build_coco(images, annotations, classes, split, report)
        report.facts.append(f'{split}: {len(images):,} images, {len(annotations):,} annotations')
        trainable = checks.trainable_annotations(annotations, images.values(), split)
        report_empty(report, split, len(trainable), resolvers[split].folder)
    checks.report_class_usage(contents, classes, report)
    report_duplicates({split: checks.image_names(coco) for split, coco in contents.items()}, infos, report)
    report.facts.append(f'{summarize_classes(classes)}; boxes {"and" if has_masks else "without"} masks')
    folders = {folder for resolver in resolvers.values() for folder in resolver.searched_folders}
    return CheckedDataset(
        'detection',
        os.path.abspath(root),
        classes,
        contents,
        report,
        apply_exif=apply_exif,
        has_masks=has_masks,
        watched_paths=[os.path.abspath(path) for path in (*files.values(), *folders)],
    )


def decide_exif_handling(
    cocos: Mapping[str, dict], resolvers: Mapping[str, ImageResolver], infos: Mapping[str, ImageInfo]
) -> bool:
    """Return whether images are to be rotated as EXIF says, which is what training does by default.

    They are not if annotated sizes fit images as they are stored, and none fits a rotated one.

    Args:
        cocos: COCO dict by split.
        resolvers: of the image files by split.
        infos: what the image files are, by path.
    """
    num_stored = num_rotated = 0
    for split, coco in cocos.items():
        for image in coco['images']:
            if isinstance(image.get('file_name'), str):
                info = infos.get(resolvers[split].find(image['file_name']).path, ImageInfo())
                size = (image.get('width'), image.get('height'))
                if info.exif_swapped and info.width != info.height:
                    num_rotated += size == info.oriented_size(True)
                    num_stored += size == info.oriented_size(False)
    return num_rotated > 0 or not num_stored


def _inspect_images(
    cocos: Mapping[str, dict], resolvers: Mapping[str, ImageResolver], root: Path
) -> dict[str, ImageInfo]:
    """Inspect the image files, by their paths as of `ImageResolver`."""
    found = {resolvers[split].find(name).path for split, coco in cocos.items() for name in checks.image_names(coco)}
    paths = sorted(found - {None})
    infos = inspect_all(inspect_image, [os.path.join(root, path) for path in paths], 'images')
    return {path: infos[os.path.join(root, path)] for path in paths}
