"""Detection data: COCO json and its images, wherever they lie, read and checked."""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from ..errors import UsageError
from . import coco as checks
from .asking import Data, Request, check_share, held_out, named, relative, say_empty, say_same, wanted
from .images import Seen, look, look_at_all
from .layouts import IMAGES, LABELS, SPLITS, find_annotations
from .report import Report

NAMES_TRIED = 50


def read_detection(request: Request, splits: Sequence[str], classes: Sequence[str] | None = None) -> Data:
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
    images = {s: Images(files[s], root, checks.names_in(cocos[s]), request.images.get(s)) for s in cocos}
    main = next(split for split in ('train', 'all', *cocos) if split in cocos)
    train = cocos[main]
    classes = [*(classes or checks.classes_of(train, main, report))]
    if not classes:
        raise UsageError(f'{files[main]} has no categories: nothing to learn')
    said = ''
    if main in ('train', 'all') and 'val' not in cocos:
        names, said = held_out(checks.names_in(train), request)
        cocos['train'], cocos['val'] = checks.divide(train, names)
        images['train'] = images['val'] = images[main]
    check_share(request, said)
    cocos, images = (wanted(by_split, splits, root) for by_split in (cocos, images))
    report.facts.append(f'{root}: COCO json, laid out as {layout}{said}')
    seen = _look(cocos, images, root)
    turn, masks = turn_by_exif(cocos, images, seen), checks.has_masks(train, main, report)
    made = {}
    for split, coco in cocos.items():
        if coco['categories'] != train['categories']:
            checks.classes_of(coco, split, report)
        categories = checks.match_categories(coco, train, classes, split, report)
        usable = checks.check_images(coco, images[split], seen, turn, split, report)
        annotations = checks.check_annotations(coco, usable, categories, masks, split, report)
        made[split] = checks.assembled(usable, annotations, classes, split, report)
        report.facts.append(f'{split}: {len(usable):,} images, {len(annotations):,} annotations')
        say_empty(report, split, len(checks.learnt(annotations, usable, split)), images[split].folder)
    checks.say_classes(made, classes, report)
    say_same({split: [image['file_name'] for image in coco['images']] for split, coco in made.items()}, seen, report)
    report.facts.append(f'{named(classes)}; boxes {"and" if masks else "without"} masks')
    places = [*map(os.path.abspath, files.values()), *{os.path.abspath(of.folder) for of in images.values()}]
    return Data('detection', os.path.abspath(root), classes, made, report, turn=turn, masks=masks, places=places)


def find_files(request: Request) -> tuple[str, dict[str, Path]]:
    """The layout of the data and the COCO json of each split; those that were given take the place of what is found."""
    given = {split: Path(file) for split, file in request.files.items()}
    layout, files = (find_annotations(request.root, given) if request.path and len(given) < 2 else None) or (
        'given',
        {},
    )
    return layout, {**files, **given}


class Images:
    """Where the images of a COCO file are: its names do not say it, so that folders are tried with some of them."""

    def __init__(self, file: Path, root: Path, names: Sequence[str], given: str | None = None):
        self.root = root
        tried = names[:: max(1, len(names) // NAMES_TRIED)]
        folders = [Path(given)] if given else _folders(file, root)
        listing = cache(_listing)

        def is_there(folder: Path, name: str) -> bool:
            parent, _, last = f'{folder}/{name}'.rpartition('/')
            return last.lower() in listing(parent)

        options = [(folder, short) for short in (_slashed, _last) for folder in folders]
        hits = [sum(is_there(folder, short(name)) for name in tried) for folder, short in options]
        # The likeliest place that has most of them: elsewhere there may be other files of these names, all of them.
        self.folder, self.short = next(o for o, n in zip(options, hits) if 2 * n >= max(hits))
        self.exact = _walk(self.folder)
        self.there = {path.lower(): path for path in self.exact}
        if tried and all(self.find(name)[1] == 'missing image' for name in tried):
            raise UsageError(
                f'{file}: none of its images (such as {tried[0]}) is in {given or root}: '
                'give --train-images and --val-images'
            )

    def find(self, name: str) -> tuple[str, str | None]:
        """The path of an image relative to the folder, and what is wrong with its name, as in report.KINDS."""
        path = self.short(name)
        if os.path.isabs(path) or '..' in path.split('/'):
            return path, 'name leads out of the folder'
        path = os.path.normpath(path)
        if path in self.exact:
            return path, None
        other = self.there.get(path.lower())
        return (other, 'name in other case') if other else (path, 'missing image')

    def path(self, name: str) -> str:
        """Relative to the data's root, or absolute where the folder is elsewhere."""
        return relative(os.path.join(self.folder, name), self.root)


def turn_by_exif(splits: dict[str, dict], images: dict[str, Images], seen: dict[str, Seen]) -> bool:
    """Whether images are to be turned as EXIF says, which is what training does by itself: yes, unless sizes in the
    files fit images as they are stored, and none fits a turned one."""
    stored = turned = 0
    for split, coco in splits.items():
        for image in coco['images']:
            if isinstance(image.get('file_name'), str):
                facts = seen.get(images[split].path(images[split].find(image['file_name'])[0]), Seen())
                given = (image.get('width'), image.get('height'))
                if facts.turned and facts.width != facts.height:
                    turned += given == (facts.width, facts.height)
                    stored += given == (facts.height, facts.width)
    return turned > 0 or not stored


def _look(cocos: Mapping[str, dict], images: Mapping[str, Images], root: Path) -> dict[str, Seen]:
    """What the image files are, by their paths as `Images.path` gives them."""
    names = [(images[split], name) for split, coco in cocos.items() for name in checks.names_in(coco)]
    paths = {of.path(of.find(name)[0]) for of, name in names}
    seen = look_at_all(look, [os.path.join(root, path) for path in sorted(paths)], 'images')
    return {relative(path, root): facts for path, facts in seen.items()}


def _folders(file: Path, root: Path) -> list[Path]:
    """Where the images of a COCO file may be: beside it, in folders beside it, and below the root, two levels down."""
    near = [file.parent, file.parent / 'images', root / 'images', root]
    split = next((s for s, names in SPLITS.items() if any(n in file.stem.lower() for n in names)), None)
    beside_it = file.parent.parent if file.parent.name.lower() == 'annotations' else file.parent
    below = [*_subfolders(root), *_subfolders(beside_it)]
    below += [inner for folder in below for inner in _subfolders(folder)]
    # Those that bear the split's name come first: names of files are often the same in all.
    own = [f for f in below if split and any(n in f.name.lower() for n in SPLITS[split])]
    own.sort(key=lambda folder: _likely(folder, file), reverse=True)
    others = [folder for folder in below if folder not in own]
    beside = [file.parent] if split and any(n in file.parent.name.lower() for n in SPLITS[split]) else []
    return list(dict.fromkeys([*beside, *own, *near, *others]))


def _likely(folder: Path, file: Path) -> tuple[bool, int]:
    """How likely a folder holds the images of a COCO file: by the file's name, and as images or label maps."""
    near = {path.name.lower() for path in (folder, folder.parent)}
    return folder.name.lower() == file.stem.lower(), bool(near & {*IMAGES}) - bool(near & {*LABELS})


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith('.'))[:200]
    except OSError:
        return []


def _listing(folder: str) -> set[str]:
    return {name.lower() for name in os.listdir(folder)} if os.path.isdir(folder) else set()


def _walk(folder: Path) -> set[str]:
    """The files in and below a folder, relative to it."""
    return {
        os.path.normpath(os.path.join(os.path.relpath(at, folder), name))
        for at, _, names in os.walk(folder, followlinks=True)
        for name in names
    }


def _slashed(name: str) -> str:
    return name.replace('\\', '/').removeprefix('./')


def _last(name: str) -> str:
    """The last part of a path or an address, for names that tell of another machine."""
    return _slashed(name).split('?d=')[-1].split('?')[0].rstrip('/').split('/')[-1]
