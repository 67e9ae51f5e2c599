"""Reading and checking a segmentation data set: images and segmentation masks."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import UsageError
from . import check_masks as checks
from .channels import select_channels
from .check_images import MaskInfo, decide_exif_handling, inspect_all, inspect_mask
from .class_names import class_files, find_color_table
from .diagnostics import Report
from .layouts import Pairing, pair_files
from .mask_encoding import DECODED_CODES, IGNORE_INDEX, MaskEncoding, inspect_encoded, is_decodable
from .panoptic import PANOPTIC, class_table, panoptic_json_files
from .request import CheckedDataset, DatasetRequest, relative_to_root, select_splits, split_by_hash, summarize_classes


def read_segmentation(
    request: DatasetRequest, found: tuple, splits: Sequence, classes: list | None, limits: Mapping, trained: object
) -> CheckedDataset:
    """Read and check a segmentation data set; arguments as of `custom.read_data`, and what `find_folders` found."""
    root, report, (layout, split_dirs) = request.root, Report(), found
    if isinstance(request.classes, list) and not request.data_yaml:
        raise UsageError('--classes: for segmentation masks give one file, or one of ade20k, cityscapes, voc')
    main_split = next(split for split in ('train', 'all', *split_dirs) if split in split_dirs)
    mask_suffix = pair_files(split_dirs[main_split]).mask_suffix
    pairings = {split: pair_files(dirs, mask_suffix) for split, dirs in split_dirs.items()}
    if mask_suffix.startswith('_gtFine') and 'val' in pairings:
        pairings.pop('test', None)  # Cityscapes does not publish the masks of its test split
    spec = checks.infer_label_spec(request, layout, mask_suffix)
    if request.mask_threshold is not None and not 1 <= request.mask_threshold <= 255:
        raise UsageError(f'--mask-threshold {request.mask_threshold}: give a gray value from 1 to 255, such as 128')
    split_note = ''
    if request.needs_val_split(pairings):
        pairing = pairings[main_split]
        val_names, split_note = split_by_hash([str(image) for image, _ in pairing.pairs], request, root)
        train, val = ([p for p in pairing.pairs if (str(p[0]) in val_names) == is_val] for is_val in (False, True))
        pairings['train'] = pairing._replace(pairs=train)
        pairings['val'] = Pairing(val, [], mask_suffix)  # problems are reported once, for train
    pairings = select_splits(pairings, splits, root)
    report.facts.append(f'{root}: segmentation masks, layout {layout}{split_note}')

    pairs = [pair for pairing in pairings.values() for pair in pairing.pairs]
    train_images = [image for image, _ in pairings.get('train', Pairing([], [], '')).pairs]
    selection = select_channels(train_images, request, trained, report)
    image_infos = selection.inspect([image for image, _ in pairs], report)
    mask_infos = inspect_all(inspect_mask, [mask for _, mask in pairs], 'segmentation masks')
    panoptic = panoptic_json_files(root, split_dirs) if layout == PANOPTIC else None
    table = class_table(next(iter(panoptic.values()))) if panoptic else _color_table(request, mask_infos, report)
    encoding = _decode(request, mask_infos, table, panoptic, report)
    if table:
        spec = checks.spec_of_table(*table, request.ignore_labels or ())
    else:
        spec = _name_classes(spec, mask_infos, classes, root, report)
    if classes and list(classes) != spec.names:
        named, trained_on = map(summarize_classes, (spec.names, classes))
        raise UsageError(f"{root} has {named}; the checkpoint's are {trained_on}")
    checks.validate_labels(mask_infos, spec, report)
    sizes = ((image_infos[image], mask_infos[mask]) for image, mask in pairs)
    apply_exif = decide_exif_handling((image, (mask.width, mask.height)) for image, mask in sizes)
    contents, used_classes = {}, {}
    for split, pairing in pairings.items():
        add = partial(report.add, split)
        for code, example in pairing.problems:
            add(code, example)
        usable, pixels = checks.validate_pairs(
            pairing.pairs, image_infos, mask_infos, spec, apply_exif, limits[split], add
        )
        used_classes[split] = set(np.flatnonzero(pixels).tolist())
        contents[split] = [[relative_to_root(path, root) for path in pair] for pair in usable]
        report.facts.append(f'{split}: {len(usable):,} images with segmentation masks')
        report.add_if_empty(split, len(usable), root)
    report.add_unused_classes(used_classes, spec.names)
    if len(used_classes.get('train', ())) == 1 < len(spec.names):
        report.add('train', 'single-class-in-train', spec.names[min(used_classes['train'])])
    image_names = {split: [image for image, _ in content] for split, content in contents.items()}
    report.add_duplicates(image_names, {relative_to_root(path, root): i for path, i in image_infos.items()})
    ends = {spec.labels[0]: spec.names[0], spec.labels[-1]: spec.names[-1]}
    labels = ', '.join(f'label {label} is {name}' for label, name in ends.items())
    ignored = ', '.join(map(str, sorted(spec.ignored))) or 'none'
    report.facts.append(f'{summarize_classes(spec.names)}; {labels}; ignored labels: {ignored}')
    watched = [*class_files(root, request.classes), *{path for dirs in split_dirs.values() for path in dirs[:2]}]
    watched += (panoptic or {}).values()
    settings = dict(palette=spec.palette, apply_exif=apply_exif, dataset_kwargs=spec.dataset_kwargs)
    settings['mask_encoding'] = encoding and encoding._asdict()
    used_images = {image for image, _ in contents.get('train', ())}
    train_infos = [image_infos[image] for image in train_images if relative_to_root(image, root) in used_images]
    settings['channels'] = selection.measure(train_infos, report)
    return CheckedDataset('segmentation', str(root), spec.names, contents, report, watched_paths=watched, **settings)


def _name_classes(
    spec: checks.LabelSpec, masks: Mapping[Path, MaskInfo], classes: Sequence | None, root: Path, report: Report
) -> checks.LabelSpec:
    """Return the classes of masks that are not color-coded, by their values if nothing else names them."""
    if spec.names is None and classes:
        spec = spec._replace(names=list(classes))
    spec = checks.as_binary(masks, spec)
    if IGNORE_INDEX in (spec.raw_values or ()):
        report.add('all', 'mask-0-and-255', spec.names[1], len(masks))
    return checks.infer_class_count(masks, spec, root) if spec.names is None else spec


def _color_table(
    request: DatasetRequest, masks: Mapping[Path, MaskInfo], report: Report
) -> tuple[list[str], list[list[int]]] | None:
    """Return the names and colors of the classes of color-coded masks; None if there are none, or no table."""
    if request.mask_threshold is not None or not any(info.problem == 'mask-in-color' for info in masks.values()):
        return None
    if isinstance(request.classes, list):
        return None
    if request.classes in checks.MMSEG_DATASETS:
        return checks.mmseg_classes(request.classes)
    file_table = find_color_table(request.root, request.classes)
    if file_table is None:
        return None
    file, *table = file_table
    report.facts.append(f'colors of the classes: {file}')
    return tuple(table)


def _decode(
    request: DatasetRequest, masks: dict[Path, MaskInfo], table: tuple | None, panoptic: Mapping | None, report: Report
) -> MaskEncoding | None:
    """Decode the masks that mmseg cannot read, in place; return how they have to be converted, None if none was."""
    encoding = MaskEncoding(table and table[1], request.ignore_other_colors, request.mask_threshold, panoptic)
    problems = {path: info.problem for path, info in masks.items() if is_decodable(path, info, encoding)}
    if not problems:
        return None
    masks |= inspect_all(partial(inspect_encoded, encoding=encoding), problems, 'segmentation masks to be converted')
    decoded_masks = {path: problem for path, problem in problems.items() if not masks[path].problem}
    for path, problem in decoded_masks.items():
        code = 'mask-of-segments' if panoptic else DECODED_CODES[problem or 'mask-lossy-format']
        if problem == 'mask-in-color' and table and not panoptic:
            code = 'mask-color-coded'
        report.add('all', code, path.name)
    return encoding if decoded_masks else None
