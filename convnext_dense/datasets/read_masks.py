"""Segmentation data: images and label maps, wherever they lie, read and checked."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import UsageError
from .check_images import ImageInfo, MaskInfo, inspect_all, inspect_pair
from .check_masks import LabelSpec, class_files, infer_class_count, infer_label_spec, validate_labels, validate_pairs
from .diagnostics import Report
from .image_sizes import Limit
from .layouts import find_folders, pair_files
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
    request: DatasetRequest, splits: Sequence[str], classes: Sequence[str] | None, limits: Mapping[str, Limit]
) -> CheckedDataset:
    """As asking.read_data, of label maps."""
    root, report = request.root, Report()
    layout, folders = find_folders(root)
    main, said = next(split for split in ('train', 'all', *folders) if split in folders), ''
    more = pair_files(folders[main]).more
    found = {split: pair_files(of, more) for split, of in folders.items()}
    if more.startswith('_gtFine') and 'val' in found:
        found.pop('test', None)  # Cityscapes' labels of it are not given out
    kinds = infer_label_spec(root, layout, more, request.classes, request.ignore)
    if main in ('train', 'all') and 'val' not in found:
        names, said = split_by_hash([str(image) for image, _ in found[main].pairs], request, root)
        train, val = ([p for p in found[main].pairs if (str(p[0]) in names) == second] for second in (False, True))
        found |= {
            'train': found[main]._replace(pairs=train),
            'val': found[main]._replace(pairs=val, bare=[], lone=[], twice=[], other=[], ambiguous=[]),
        }
    check_val_fraction(request, said)
    found = select_splits(found, splits, root)
    report.facts.append(f'{root}: label maps, laid out as {layout}{said}')
    pairs = [pair for of in found.values() for pair in of.pairs]
    both = inspect_all(inspect_pair, [(str(image), str(labels)) for image, labels in pairs], 'images and label maps')
    seen, maps = ({pair[i]: facts[i] for pair, facts in both.items()} for i in (0, 1))
    if kinds.names is None:
        kinds = kinds._replace(names=list(classes)) if classes else infer_class_count(maps, kinds, root)
    if classes and list(classes) != kinds.names:
        raise UsageError(
            f"{root} has {summarize_classes(kinds.names)}; the checkpoint's are {summarize_classes(classes)}"
        )
    validate_labels(maps, kinds, report)
    turn = decide_exif_handling(pairs, seen, maps)
    made, pixels = {}, {}
    for split, of in found.items():
        for kind, paths in (
            ('unmatched-image', of.bare),
            ('unmatched-mask', of.lone),
            ('duplicate-stem', of.twice),
        ):
            for path in paths:
                report.add(split, kind, path.name)
        for kind, names in (('name-spelling-mismatch', of.other), ('ambiguous-name', of.ambiguous)):
            for name in names:
                report.add(split, kind, name)
        limit = limits.get(split, Limit())
        kept, pixels[split] = validate_pairs(of.pairs, seen, maps, kinds, turn, split, report, limit)
        made[split] = [[relative_to_root(path, root) for path in pair] for pair in kept]
        report.facts.append(f'{split}: {len(kept):,} images with label maps')
        report_empty(report, split, len(kept), root)
    report_class_usage(pixels, kinds, report)
    by_name = {relative_to_root(path, root): facts for path, facts in seen.items()}
    report_duplicates({split: [image for image, _ in kept] for split, kept in made.items()}, by_name, report)
    ends = {kinds.labels[0]: kinds.names[0], kinds.labels[-1]: kinds.names[-1]}
    labels = ', '.join(f'label {label} is {name}' for label, name in ends.items())
    ignored = ', '.join(map(str, sorted(kinds.ignored)))
    report.facts.append(f'{summarize_classes(kinds.names)}; {labels}; labels that are ignored: {ignored}')
    places = [*class_files(root, request.classes), *{place for of in folders.values() for place in of[:2]}]
    common = dict(palette=kinds.palette, turn=turn, settings=kinds.settings, places=[*map(os.path.abspath, places)])
    return CheckedDataset('segmentation', os.path.abspath(root), kinds.names, made, report, **common)


def decide_exif_handling(pairs: list[tuple[Path, Path]], seen: dict[str, ImageInfo], maps: dict[str, MaskInfo]) -> bool:
    """As detection.turn_by_exif, by the sizes of the label maps."""
    turned = [(seen[str(i)], maps[str(m)]) for i, m in pairs if seen[str(i)].turned]
    odd = [(image, found) for image, found in turned if image.width != image.height]
    fits = any((i.width, i.height) == (m.width, m.height) for i, m in odd)
    return fits or not any((i.height, i.width) == (m.width, m.height) for i, m in odd)


def report_class_usage(totals: dict[str, np.ndarray], classes: LabelSpec, report: Report) -> None:
    """Report classes that no label map has, or none of train."""
    for i, name in enumerate(classes.names):
        if not any(total[i] for total in totals.values()):
            report.add('all', 'class-never-annotated', name)
        elif 'train' in totals and not totals['train'][i]:
            report.add(next(s for s in totals if totals[s][i]), 'class-not-in-train', name)
    trained = np.flatnonzero(totals.get('train', ())).tolist()
    if len(trained) == 1 < len(classes.names):
        report.add('train', 'single-class-in-train', classes.names[trained[0]])
