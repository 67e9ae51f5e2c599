"""Reading and checking a detection data set: boxes or instance masks in any format, and their images."""

import os
from collections.abc import Mapping, Sequence
from functools import partial

from ..errors import UsageError
from . import check_coco as checks
from .box_formats import BOX_FORMATS, COCO, BoxSources
from .channels import select_channels
from .check_images import ImageInfo, decide_exif_handling
from .diagnostics import Report
from .request import CheckedDataset, DatasetRequest, select_splits, split_by_hash, summarize_classes
from .select_classes import check_selection, parse_entries, select_classes
from .split_annotations import fill_sizes, scale_to_pixels


def read_detection(
    request: DatasetRequest, found: BoxSources, splits: Sequence, classes: list | None, limits: Mapping, trained: object
) -> CheckedDataset:
    """Read and check a detection data set; arguments as of `custom.read_data`, and what `find_boxes` found."""
    format, layout, sources, other_formats = found
    root, report = request.root, Report()
    for name in other_formats:
        report.add('all', 'other-format', f'{name}: --format {BOX_FORMATS[name].key}')
    if request.ignore_labels is not None:
        raise UsageError('--ignore is for segmentation masks; of boxes --classes selects some')
    if request.mask_threshold is not None or request.ignore_other_colors:
        raise UsageError('--mask-threshold and --ignore-other-colors are for segmentation masks: leave them out')
    selected = parse_entries(request.classes) if request.classes else None
    if 'val' in request.ann_files or 'test' not in splits:  # a given file takes precedence over one that is found
        sources.pop('test', None)
    parts = BOX_FORMATS[format].read(root, sources, report, request)
    if 'test' in parts and not parts['test'].coco['annotations']:  # published without annotations
        del parts['test']
    cocos = {split: part.coco for split, part in parts.items()}
    main_split = next(split for split in ('train', 'all', *cocos) if split in cocos)
    if selected:
        check_selection(selected, cocos[main_split])
        cocos = {split: select_classes(coco, selected, partial(report.add, split)) for split, coco in cocos.items()}
    train, add = cocos[main_split], partial(report.add, main_split)
    classes = [*(classes or checks.class_names(train, add))]
    if not classes:
        if format != COCO:
            for name in checks.image_names(train):
                add('image-without-annotations', name)
            report.add_if_empty('train' if main_split == 'all' else main_split, 0, root)
        report.raise_if_errors()
        raise UsageError(f'{sources[main_split]} has no categories, so there is nothing to learn')
    split_note = ''
    if request.needs_val_split(cocos):
        val_names, split_note = split_by_hash(checks.image_names(train), request)
        cocos['train'], cocos['val'] = checks.split_coco(train, val_names)
        parts['train'] = parts['val'] = parts[main_split]
    cocos, parts = (select_splits(by_split, splits, root) for by_split in (cocos, parts))
    report.facts.append(f'{root}: {format}, layout {layout}{split_note}')

    locations = {split: part.locations for split, part in parts.items()}
    paths = {split: {locations[split][n].path for n in checks.image_names(coco)} for split, coco in cocos.items()}
    full_paths = {path: os.path.join(root, path) for path in sorted(set().union(*paths.values()) - {None})}
    train_paths = sorted(paths.get('train', set()) - {None})
    selection = select_channels(map(full_paths.get, train_paths), request, trained, report)
    by_full_path = selection.inspect([*full_paths.values()], report)
    infos = {path: by_full_path[full] for path, full in full_paths.items()}
    apply_exif = decide_exif_handling(
        (infos.get(locations[split][image['file_name']].path, ImageInfo()), (image.get('width'), image.get('height')))
        for split, coco in cocos.items()
        for image in coco['images']
        if isinstance(image.get('file_name'), str)
    )
    for split, part in parts.items():
        if not part.has_sizes:
            fill_sizes(cocos[split], part.locations, infos, apply_exif)
        if part.is_relative:
            scale_to_pixels(cocos[split])
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
        report.add_if_empty(split, num_trainable, parts[split].folder)
    indices = {split: {a['category_id'] - 1 for a in content['annotations']} for split, content in contents.items()}
    report.add_unused_classes(indices, classes)
    report.add_duplicates({split: checks.image_names(coco) for split, coco in contents.items()}, infos)
    report.facts.append(f'{summarize_classes(classes)}; boxes {"and" if has_masks else "without"} masks')
    watched = list(dict.fromkeys(path for part in parts.values() for path in part.watched_paths))
    train_infos = [infos[image['file_name']] for image in contents.get('train', {}).get('images', ())]
    settings = dict(apply_exif=apply_exif, has_masks=has_masks, watched_paths=watched)
    settings['channels'] = selection.measure(train_infos, report)
    return CheckedDataset('detection', str(root), classes, contents, report, **settings)
