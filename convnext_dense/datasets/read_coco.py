"""Detection data: COCO json and its images, wherever they lie, read and checked."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError
from . import check_coco as checks
from .check_images import ImageInfo, inspect_all, inspect_image
from .diagnostics import Report
from .files import Files, files_below, folders_in, path_in, shown, spelled
from .image_sizes import Limit
from .layouts import IMAGES, LABELS, SPLITS, find_annotations
from .request import (
    CheckedDataset,
    DatasetRequest,
    check_val_fraction,
    is_below,
    relative_to_root,
    report_duplicates,
    report_empty,
    select_splits,
    split_by_hash,
    summarize_classes,
)

NAMES_TRIED = 50
MAX_NAME = 4096  # characters of a name, of which no system has more
MOST_FOLDERS = 200  # that are tried in a folder
LEAVES = 'name-outside-root'
DIGITS, WORDS = re.compile('[0-9]+'), re.compile('[a-z]+')


def read_detection(
    request: DatasetRequest, splits: Sequence[str], classes: Sequence[str] | None, limits: Mapping[str, Limit]
) -> CheckedDataset:
    """As asking.read_data, of COCO json."""
    root, report = request.root, Report()
    if request.classes or request.ignore is not None:
        raise UsageError('--classes and --ignore are for label maps: COCO json names its own classes')
    layout, files = find_files(request)
    if 'val' in request.files or 'test' not in splits:  # what was asked for goes before what is found
        files.pop('test', None)
    cocos = {split: checks.read_coco(file, split) for split, file in files.items()}
    if 'test' in cocos and not cocos['test']['annotations']:  # given out without them
        del cocos['test']
    images = {
        s: ImageResolver(
            files[s], root, checks.image_names(cocos[s]), request.images.get(s), s if s in SPLITS else None
        )
        for s in cocos
    }
    main = next(split for split in ('train', 'all', *cocos) if split in cocos)
    train = cocos[main]
    classes = [*(classes or checks.class_names(train, main, report))]
    if not classes:
        report.raise_if_errors()
        raise UsageError(f'{files[main]} has no categories: nothing to learn')
    said = ''
    if main in ('train', 'all') and 'val' not in cocos:
        names, said = split_by_hash(checks.image_names(train), request)
        cocos['train'], cocos['val'] = checks.split_coco(train, names)
        images['train'] = images['val'] = images[main]
    check_val_fraction(request, said)
    cocos, images = (select_splits(by_split, splits, root) for by_split in (cocos, images))
    report.facts.append(f'{root}: COCO json, laid out as {layout}{said}')
    seen = _inspect_images(cocos, images, root)
    turn, masks = decide_exif_handling(cocos, images, seen), checks.has_masks(train, main, report)
    made = {}
    for split, coco in cocos.items():
        if coco['categories'] != train['categories']:
            checks.class_names(coco, split, report)
        categories = checks.match_categories(coco, train, classes, split, report)
        usable = checks.validate_images(coco, images[split], seen, turn, split, report, limits.get(split, Limit()))
        annotations = checks.validate_annotations(coco, usable, categories, masks, split, report)
        made[split] = checks.build_coco(usable, annotations, classes, split, report)
        report.facts.append(f'{split}: {len(usable):,} images, {len(annotations):,} annotations')
        report_empty(
            report, split, len(checks.trainable_annotations(annotations, usable.values(), split)), images[split].folder
        )
    checks.report_class_usage(made, classes, report)
    report_duplicates(
        {split: [image['file_name'] for image in coco['images']] for split, coco in made.items()}, seen, report
    )
    report.facts.append(f'{summarize_classes(classes)}; boxes {"and" if masks else "without"} masks')
    places = [
        *map(os.path.abspath, files.values()),
        *{os.path.abspath(at) for of in images.values() for at in of.searched},
    ]
    return CheckedDataset(
        'detection', os.path.abspath(root), classes, made, report, turn=turn, masks=masks, places=places
    )


def find_files(request: DatasetRequest) -> tuple[str, dict[str, Path]]:
    """The layout of the data and the COCO json of each split; those that were given take the place of what is found."""
    given = {split: Path(file) for split, file in request.files.items()}
    layout, files = (find_annotations(request.root, given) if request.path and len(given) < 2 else None) or (
        'given',
        {},
    )
    return layout, {**files, **given}


class Place(NamedTuple):
    """Where the image of a name is: its path relative to the data's root, absolute elsewhere, None where there is none;
    `kind` is what is wrong with the name or was mended, as in report.KINDS, and `example` how the report names it."""

    path: str | None
    kind: str | None = None
    example: str = ''


class Fit(NamedTuple):
    """The files that have the longest ending in common with a name, in how many parts that is, and those before it."""

    files: list[str]
    parts: int = 0
    cut: tuple[str, ...] = ()


class ImageResolver:
    """Where the images of a COCO file are. Its names do not say in which folder they begin, so that folders are tried
    with some of them; names of another machine are found by their longest ending that a file has.

    Args:
        given: the folder of the images, where it is known.
        split: whose images they are, None for all.
    """

    def __init__(
        self, file: Path, root: Path, names: Sequence[str], given: str | None = None, split: str | None = None
    ):
        names = list(dict.fromkeys(names))
        self.root, self.split = root, None if given else split
        own, folders = ([], [Path(given)]) if given else _folders(file, root)
        self.tops = [Path(given)] if given else _tops(file, root)
        tried = names[:: max(1, len(names) // NAMES_TRIED)]
        # Label maps have the names of their images; the file's own folder is one of annotations by its name alone.
        folder = _likeliest([f for f in folders if f == file.parent or not _of_labels(f, root)], tried)
        self.folder, self.known = folder or self.tops[0], folder is not None
        self.own, self.prefix = tuple(map(self._prefix, own)), self._prefix(self.folder)
        self.begins = [os.path.abspath(folder) for folder in (file.parent, self.folder)]  # of names that lead upwards
        self.inside = tuple(os.path.join(os.path.abspath(top), '') for top in (*self.tops, root))
        found = {name: self._in_full(name) for name in names}
        self.places = {**found, **self._by_endings(found)}
        if names and not any(place.path or place.kind == 'ambiguous-name' for place in self.places.values()):
            raise UsageError(
                f'{file}: none of its images (such as {shown(names[0])}) is in {given or root}: '
                'give --train-images and --val-images'
            )

    def find(self, name: str) -> Place:
        """Where the image of one of the names is."""
        return self.places[name]

    @property
    def searched(self) -> list[Path]:
        """The folders whose files say where images are."""
        return [self.folder, *(self.tops if 'everywhere' in self.__dict__ else [])]

    @cached_property
    def near(self) -> Files:
        """The files in and below the folder in which names begin."""
        return Files(self.prefix + path for path in files_below(self.folder))

    @cached_property
    def everywhere(self) -> Files:
        """All files of the data."""
        return Files(self._prefix(top) + path for top in self.tops for path in files_below(top, hidden=False))

    @cached_property
    def own_files(self) -> Files:
        """Those of the folders that bear the name of the split."""
        return Files(path for path in self.everywhere.exact if self.own and path.startswith(self.own))

    def _prefix(self, folder: str | Path) -> str:
        """What paths of images in and below a folder begin with."""
        same = os.path.abspath(folder) == os.path.abspath(self.root)
        return '' if same else f'{relative_to_root(folder, self.root)}/'

    def _in_full(self, name: str) -> Place | None:
        """Where an image is by all of its name, or that it cannot be anywhere; None where it is not there."""
        path, machine = path_in(name)
        if len(name) > MAX_NAME:
            return Place(None, 'missing-image', name)
        if machine or path.startswith('../'):
            begins = (os.sep,) if machine else self.begins
            paths = [os.path.normpath(os.path.join(begin, path)) for begin in begins]
            inside = [path for path in paths if path.startswith(self.inside)]
            there = next(filter(os.path.isfile, inside), None)
            if there:
                return Place(relative_to_root(there, self.root))
            return None if inside or machine else Place(None, LEAVES, name)
        if not self.known:
            return None
        for exact in (self.prefix + name, self.prefix + path):
            if exact in self.near.exact:
                return Place(exact)
        files = self.near.alike(self.prefix + path)
        same = files and files[0].lower() == f'{self.prefix}{path}'.lower()
        return _place(name, files, 'name-case-mismatch' if same else 'name-spelling-mismatch') if files else None

    def _by_endings(self, found: dict[str, Place | None]) -> dict[str, Place]:
        """Where the images are that are not where their names say: by the longest ending of a name that a file has, and
        never by less of it than names of the same origin have in common with their files."""
        users, begins = defaultdict(list), Counter()
        for name, place in found.items():
            if place and place.path:
                users[place.path].append(name)
                begins['',] += 1
        fits = {name: self._fit(name, bool(begins)) for name, place in found.items() if place is None}
        begins.update(fit.cut for fit in fits.values() if fit.parts > 1)
        lengths = {len(begin) for begin in begins}
        for name, fit in fits.items():
            files = [] if _is_anothers(fit, begins, lengths) else fit.files
            fits[name] = fit._replace(files=files)
            if len(files) == 1:
                users[files[0]].append(name)
        of_a_machine = any(path_in(name)[1] for name in chain(*users.values()))
        return {
            name: _place(name, fit.files, 'name-matched-by-suffix', users)
            if fit.files
            else Place(None, 'missing-image' if of_a_machine or not path_in(name)[1] else LEAVES, name)
            for name, fit in fits.items()
        }

    def _fit(self, name: str, some_in_full: bool) -> Fit:
        path, machine = path_in(name)
        path = re.sub(r'^(\.\./)+', '', path)
        if some_in_full and '/' not in path:
            return Fit([])
        parts, files = self.own_files.ending(path)
        anywhere, others = self.everywhere.ending(path)
        if anywhere > parts:
            parts, files = anywhere, others
        split_up = [machine, *spelled(path).split('/')]
        cut = tuple(split_up[: len(split_up) - parts])
        files = [file for file in files if not _among_labels(file)] or (files if parts > 1 else [])
        if parts == 1:
            files = [file for file in files if not _contradict(cut[1:], file, self.split)]
        return Fit(files, parts, cut)


def decide_exif_handling(splits: dict[str, dict], images: dict[str, ImageResolver], seen: dict[str, ImageInfo]) -> bool:
    """Whether images are to be turned as EXIF says, which is what training does by itself: yes, unless sizes in the
    files fit images as they are stored, and none fits a turned one."""
    stored = turned = 0
    for split, coco in splits.items():
        for image in coco['images']:
            if isinstance(image.get('file_name'), str):
                facts = seen.get(images[split].find(image['file_name']).path, ImageInfo())
                given = (image.get('width'), image.get('height'))
                if facts.turned and facts.width != facts.height:
                    turned += given == (facts.width, facts.height)
                    stored += given == (facts.height, facts.width)
    return turned > 0 or not stored


def _inspect_images(cocos: Mapping[str, dict], images: Mapping[str, ImageResolver], root: Path) -> dict[str, ImageInfo]:
    """What the image files are, by their paths as `Images` gives them."""
    places = {images[split].find(name).path for split, coco in cocos.items() for name in checks.image_names(coco)}
    paths = sorted(places - {None})
    seen = inspect_all(inspect_image, [os.path.join(root, path) for path in paths], 'images')
    return {path: seen[os.path.join(root, path)] for path in paths}


def _place(name: str, files: list[str], kind: str, users: Mapping[str, list[str]] | None = None) -> Place:
    """The place of an image that some files may be: the one, if there is but one, and no other name that is it, too."""
    if len(files) > 1:
        return Place(None, 'ambiguous-name', f'{name} may be {" or ".join(files[:2])}')
    other = next((user for user in (users or {}).get(files[0], ()) if user != name), None)
    if other is not None:
        return Place(None, 'ambiguous-name', f'{name} and {other} may both be {files[0]}')
    return Place(files[0], kind, f'{name} is {files[0]}')


def _is_anothers(fit: Fit, begins: Counter, lengths: set[int]) -> bool:
    """Whether a name is known to be of another file than those whose ending it has. `begins` counts what is before the
    endings of names that have more than their last part in common with a file, of these `lengths`: where most names
    that begin like this one have more of themselves on the disk, so would its own file."""
    if fit.parts < 2:
        return bool(begins)
    return any(begins[fit.cut[:n]] >= begins[fit.cut] for n in lengths if 0 < n < len(fit.cut))


def _contradict(folders: Sequence[str], file: str, split: str | None) -> bool:
    """Whether the folders of a name and those of a file are of different splits, or differ by a number."""
    others = spelled(file).split('/')[:-1]
    named, there = _splits_in(folders) or {split} - {None}, _splits_in(others)
    mine, theirs = ({DIGITS.sub('#', f) for f in a if f not in b} for a, b in ((folders, others), (others, folders)))
    return bool(named and there and not named & there) or bool(mine & theirs)


def _splits_in(folders: Sequence[str]) -> set[str]:
    words = {word for folder in folders for word in WORDS.findall(folder)}
    return {split for split, names in SPLITS.items() if words & set(names)}


def _among_labels(file: str) -> bool:
    """Whether a file lies where label maps do."""
    folders = set(spelled(file).split('/')[:-1])
    return bool(folders & set(LABELS)) and not folders & set(IMAGES)


def _of_labels(folder: Path, root: Path) -> bool:
    return _among_labels(f'{os.path.relpath(folder, root)}/')


def _tops(file: Path, root: Path) -> list[Path]:
    """The folders in and below which the images of a COCO file are."""
    beside = _beside(file)
    if is_below(beside, root):
        return [root]
    return [beside] if is_below(root, beside) else [root, beside]


def _beside(file: Path) -> Path:
    return file.parent.parent if file.parent.name.lower() == 'annotations' else file.parent


def _likeliest(folders: Sequence[Path], names: Sequence[str]) -> Path | None:
    """The likeliest of some folders in which most of the names begin, as others may have files of these names as well;
    None where no name begins in any."""
    paths = [path for path, machine in map(path_in, names) if not machine and not path.startswith('../')]
    listing = cache(_listing)

    def is_there(folder: Path, path: str) -> bool:
        parent, _, last = f'{folder}/{path}'.rpartition('/')
        # Links may show one folder many times. Of what is none each part would be looked for.
        return os.path.isdir(parent) and spelled(last) in listing(os.path.realpath(parent))

    hits = [sum(is_there(folder, path) for path in paths) for folder in folders]
    most = max(hits, default=0)
    return next(folder for folder, n in zip(folders, hits) if 2 * n >= most) if most else None


def _folders(file: Path, root: Path) -> tuple[list[Path], list[Path]]:
    """Where the images of a COCO file may be: beside it, in folders beside it, and below the root, two levels down;
    those that bear the split's name, and all."""
    near = [file.parent, file.parent / 'images', root / 'images', root]
    split = next((s for s, names in SPLITS.items() if any(n in file.stem.lower() for n in names)), None)
    below = [*_subfolders(root), *_subfolders(_beside(file))]
    below += [inner for folder in below for inner in _subfolders(folder)]
    # Those that bear the split's name come first: names of files are often the same in all.
    own = [f for f in below if split and any(n in f.name.lower() for n in SPLITS[split]) and not _of_labels(f, root)]
    own.sort(key=lambda folder: _dir_score(folder, file), reverse=True)
    # And where there are such, images of the same names in the folder of another split are other ones.
    others = [f for f in below if f not in own and not (own and _splits_in([f.name.lower()]) - {split})]
    beside = [file.parent] if split and any(n in file.parent.name.lower() for n in SPLITS[split]) else []
    return [*beside, *own], list(dict.fromkeys([*beside, *own, *near, *others]))


def _dir_score(folder: Path, file: Path) -> tuple[bool, int]:
    """How likely a folder holds the images of a COCO file: by the file's name, and as images or label maps."""
    near = {path.name.lower() for path in (folder, folder.parent)}
    return folder.name.lower() == file.stem.lower(), bool(near & {*IMAGES}) - bool(near & {*LABELS})


def _subfolders(folder: Path) -> list[Path]:
    return [Path(path) for path in folders_in(folder, MOST_FOLDERS)]


def _listing(folder: str) -> set[str]:
    """The spellings of the names in a folder."""
    try:
        return set(map(spelled, os.listdir(folder)))
    except (OSError, ValueError):
        return set()
