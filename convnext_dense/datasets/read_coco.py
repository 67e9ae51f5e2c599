"""Reading and checking a detection data set: COCO json and its images."""

import os
from collections.abc import Mapping, Sequence
from functools import partial

from ..errors import UsageError
from . import check_coco as checks
from .check_images import ImageInfo, decide_exif_handling, inspect_all, inspect_image
from .diagnostics import Report
from .image_resolver import ImageResolver
from .request import CheckedDataset, DatasetRequest, select_splits, split_by_hash, summarize_classes


def read_detection(
    request: DatasetRequest, layout: str, files: dict, splits: Sequence, classes: Sequence | None, limits: Mapping
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
        split: ImageResolver(files[split], root, checks.image_names(coco), request.image_dirs.get(split), split)
        for split, coco in cocos.items()
    }
    main_split = next(split for split in ('train', 'all', *cocos) if split in cocos)
    train, add = cocos[main_split], partial(report.add, main_split)
    classes = [*(classes or checks.class_names(train, add))]
    if not classes:
        report.raise_if_errors()
        raise UsageError(f'{files[main_split]} has no categories, so there is nothing to learn')
    split_note = ''
    if request.needs_val_split(cocos):
        val_names, split_note = split_by_hash(checks.image_names(train), request)
        cocos['train'], cocos['val'] = checks.split_coco(train, val_names)
        resolvers['train'] = resolvers['val'] = resolvers[main_split]
    cocos, resolvers = (select_splits(by_split, splits, root) for by_split in (cocos, resolvers))
    report.facts.append(f'{root}: COCO json, layout {layout}{split_note}')

    locations = {split: resolver.locations for split, resolver in resolvers.items()}
    paths = {locations[split][name].path for split, coco in cocos.items() for name in checks.image_names(coco)}
    infos = inspect_all(lambda path: inspect_image(os.path.join(root, path)), sorted(paths - {None}), 'images')
    apply_exif = decide_exif_handling(
        (
            infos.get(locations[split][image['file_name']].path, ImageInfo()),
            (image.get('width'), image.get('height')),
        )
        for split, coco in cocos.items()
        for image in coco['images']
        if isinstance(image.get('file_name'), str)
    )
    has_masks = checks.most_have_masks(train, add)
    contents = {}
    for split, coco in cocos.items():
        add = partial(report.add, split)
        if coco['categories'] != train['categories']:
            checks.class_names(coco, add)
        class_indices = checks.match_categories(coco, train, classes, add)
        images = checks.validate_images(coco, locations[split], infos, apply_exif, limits[split], add)
        annotations = checks.validate_annotations(coco, images, class_indices, has_masks, split, report)
        contents[split] = checks.build_coco(images, annotations, classes, add)
        report.facts.append(f'{split}: {len(images):,} images, {len(annotations):,} annotations')
        num_trainable = checks.count_trainable(annotations, images.values(), split)
        report.add_if_empty(split, num_trainable, resolvers[split].folder)
    used = {split: {a['category_id'] - 1 for a in content['annotations']} for split, content in contents.items()}
    report.add_unused_classes(used, classes)
    report.add_duplicates({split: checks.image_names(coco) for split, coco in contents.items()}, infos)
    report.facts.append(f'{summarize_classes(classes)}; boxes {"and" if has_masks else "without"} masks')
    watched = [*files.values(), *{folder for resolver in resolvers.values() for folder in resolver.searched_folders}]
    settings = dict(apply_exif=apply_exif, has_masks=has_masks, watched_paths=watched)
    return CheckedDataset('detection', str(root), classes, contents, report, **settings)
