"""`--classes` for boxes: a subset of the classes, their order, and classes that become one."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..errors import UsageError
from .class_names import read_classes
from .coco_values import category_name, only_dicts, parse_id
from .files import to_one_line

FILE_SUFFIXES = ('.txt', '.json', '.csv')
MAX_NAMES_LISTED = 8  # classes of the data set that a message lists


def parse_entries(classes: str | Sequence[str]) -> dict[str, list[str]]:
    """Return the categories of each class, in the order of the classes.

    Args:
        classes: a file of class names; or entries, each a list of names with commas between them. `a,b` are two
            classes, `a,b=c` is the class c of both.

    Raises:
        UsageError: an entry has no name, more than one after the `=`, or a name occurs twice.
    """
    entries = [classes] if isinstance(classes, str) else list(classes)
    if len(entries) == 1 and (os.path.isfile(entries[0]) or entries[0].lower().endswith(FILE_SUFFIXES)):
        return {name: [name] for name in read_classes(Path(entries[0]))[0]}
    selected: dict[str, list[str]] = {}
    for entry in entries:
        sources, _, target = entry.partition('=')
        names = [name.strip() for name in sources.split(',') if name.strip()]
        target = target.strip()
        if not names or ('=' in entry and not target):
            raise UsageError(f"--classes '{to_one_line(entry, 60)}': give names such as car,bus or car,truck=vehicle")
        if ',' in target or '=' in target:
            text = 'put a space, not a comma, after a new name, such as car=vehicle man=person dog'
            raise UsageError(f"--classes '{to_one_line(entry, 60)}': {text}")
        for name in names:
            selected.setdefault(target or name, []).append(name)
    names = [name for sources in selected.values() for name in sources]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise UsageError(f"--classes names '{to_one_line(repeated, 60)}' twice: a category belongs to one class")
    return selected


def check_selection(selected: Mapping[str, Sequence[str]], coco: Mapping) -> None:
    """Raise UsageError if a training split (a COCO dict) lacks one of the categories that `parse_entries` returns."""
    names = [name for category in only_dicts(coco['categories']) if (name := category_name(category))]
    missing = next((name for sources in selected.values() for name in sources if name not in names), None)
    if missing is not None:
        similar_name = next((name for name in names if name.strip().lower() == missing.strip().lower()), None)
        known_names = ', '.join(to_one_line(name, 40) for name in names[:MAX_NAMES_LISTED])
        known_names += ', ...' if len(names) > MAX_NAMES_LISTED else ''
        text = f'it is called {to_one_line(similar_name, 60)}' if similar_name else f'the data set has {known_names}'
        raise UsageError(f"--classes: no class is called '{to_one_line(missing, 60)}'; {text}")


def select_classes(coco: dict, selected: Mapping[str, Sequence[str]], add: Callable) -> dict:
    """Return a COCO dict with the classes of `parse_entries` as categories, without annotations of others."""
    ids_by_name: dict[str | None, list] = {}
    for category in only_dicts(coco['categories']):
        ids_by_name.setdefault(category_name(category), []).append(parse_id(category.get('id')))
    categories, new_ids = [], {}
    for target, sources in selected.items():
        ids = [category_id for name in sources for category_id in ids_by_name.pop(name, ()) if category_id is not None]
        if ids:
            categories.append(dict(id=ids[0], name=target))
            new_ids |= dict.fromkeys(ids, ids[0])
    unselected = {category_id: name for name, ids in ids_by_name.items() for category_id in ids}
    annotations, counts = [], dict.fromkeys(ids_by_name, 0)
    for annotation in coco['annotations']:
        category_id = parse_id(annotation.get('category_id')) if isinstance(annotation, dict) else None
        if category_id in new_ids:
            annotations.append({**annotation, 'category_id': new_ids[category_id]})
        elif category_id is not None and category_id in unselected:
            counts[unselected[category_id]] += 1
        else:  # invalid annotations are reported later
            annotations.append(annotation)
    for name, count in counts.items():
        if count:
            add('class-not-selected', f'{name}: {count:,}', count)
    return {**coco, 'categories': categories, 'annotations': annotations}
