"""Reading and checking a segmentation data set: images and segmentation masks."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np

from ..errors import UsageError
from .check_images import decide_exif_handling, inspect_all, inspect_pair
from .check_masks import LabelSpec, infer_class_count, infer_label_spec, validate_labels, validate_pairs
from .class_names import class_files
from .diagnostics import Report
from .layouts import Pairing, pair_files
from .request import CheckedDataset, DatasetRequest, relative_to_root, select_splits, split_by_hash, summarize_classes


def read_segmentation(
    request: DatasetRequest, layout: str, split_dirs: dict, splits: Sequence, classes: Sequence | None, limits: Mapping
) -> CheckedDataset:
    """Read and check a segmentation data set; folders as of `find_folders`, the rest as of `custom.read_data`."""
    root, report = request.root, Report()
    if request.classes is not None and not isinstance(request.classes, str):
        raise UsageError('--classes: for segmentation masks give one file, or one of ade20k, cityscapes, voc')
    main_split = next(split for split in ('train', 'all', *split_dirs) if split in split_dirs)
    mask_suffix = pair_files(split_dirs[main_split]).mask_suffix
    pairings = {split: pair_files(dirs, mask_suffix) for split, dirs in split_dirs.items()}
    if mask_suffix.startswith('_gtFine') and 'val' in pairings:
        pairings.pop('test', None)  # Cityscapes does not publish the masks of its test split
    spec = infer_label_spec(root, layout, mask_suffix, request.classes, request.ignore_labels)
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
    infos = inspect_all(inspect_pair, pairs, 'images and segmentation masks')
    image_infos = {image: info for (image, _), (info, _) in infos.items()}
    mask_infos = {mask: info for (_, mask), (_, info) in infos.items()}
    if spec.names is None:
        spec = spec._replace(names=list(classes)) if classes else infer_class_count(mask_infos, spec, root)
    if classes and list(classes) != spec.names:
        raise UsageError(
            f"{root} has {summarize_classes(spec.names)}; the checkpoint's are {summarize_classes(classes)}"
        )
    validate_labels(mask_infos, spec, report)
    apply_exif = decide_exif_handling((image, (mask.width, mask.height)) for image, mask in infos.values())
    contents, used = {}, {}
    for split, pairing in pairings.items():
        add = partial(report.add, split)
        for code, example in pairing.problems:
            add(code, example)
        usable, pixels = validate_pairs(pairing.pairs, image_infos, mask_infos, spec, apply_exif, limits[split], add)
        used[split] = set(np.flatnonzero(pixels).tolist())
        contents[split] = [[relative_to_root(path, root) for path in pair] for pair in usable]
        report.facts.append(f'{split}: {len(usable):,} images with segmentation masks')
        report.add_if_empty(split, len(usable), root)
    report.add_unused_classes(used, spec.names)
    if len(used.get('train', ())) == 1 < len(spec.names):
        report.add('train', 'single-class-in-train', spec.names[min(used['train'])])
    image_names = {split: [image for image, _ in content] for split, content in contents.items()}
    report.add_duplicates(image_names, {relative_to_root(path, root): i for path, i in image_infos.items()})
    report.facts.append(_describe_labels(spec))
    watched = [*class_files(root, request.classes), *{path for dirs in split_dirs.values() for path in dirs[:2]}]
    settings = dict(palette=spec.palette, apply_exif=apply_exif, dataset_kwargs=spec.dataset_kwargs)
    return CheckedDataset('segmentation', str(root), spec.names, contents, report, watched_paths=watched, **settings)


def _describe_labels(spec: LabelSpec) -> str:
    """Return the classes, the labels of the first and the last one, and the ignored labels."""
    ends = {spec.labels[0]: spec.names[0], spec.labels[-1]: spec.names[-1]}
    labels = ', '.join(f'label {label} is {name}' for label, name in ends.items())
    ignored = ', '.join(map(str, sorted(spec.ignored)))
    return f'{summarize_classes(spec.names)}; {labels}; ignored labels: {ignored}'
