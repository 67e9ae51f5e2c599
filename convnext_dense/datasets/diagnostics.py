"""What a check of data finds: kinds of problems, what is done about each, and the text that says so."""

from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import UsageError
from .check_images import MAX_BYTES, MAX_PIXELS
from .files import in_bytes, shown
from .image_sizes import STRIDE

# What is done about a kind of problem. The first two are errors, which --strict refuses.
REFUSED, LEFT_OUT, MENDED, NOTED = 'refused', 'left out', 'mended', 'noted'
EXAMPLES = 3


class Kind(NamedTuple):
    done: str
    then: str = ''  # what is done, or the way out, where the word is not enough


TOO_LARGE = f'left out: over {MAX_PIXELS:,} pixels, which Pillow refuses: cut it into tiles'
KINDS = {
    # images, of both tasks
    'missing image': Kind(LEFT_OUT),
    'not a regular file': Kind(LEFT_OUT, 'left out: a folder, a device or a pipe has its name'),
    'file too large': Kind(LEFT_OUT, f'left out: over {in_bytes(MAX_BYTES)}'),
    'pointer of Git LFS': Kind(LEFT_OUT, 'left out: its content was not fetched: run git lfs pull where it is from'),
    'image too large': Kind(LEFT_OUT, TOO_LARGE),
    'empty file': Kind(LEFT_OUT),
    'not an image': Kind(LEFT_OUT),
    'image cut short': Kind(LEFT_OUT),
    'unreadable image': Kind(LEFT_OUT, 'left out: OpenCV, which reads in training, cannot'),
    'image resized to nothing': Kind(
        LEFT_OUT, 'left out: in the size that the recipe gives it a side is less than a pixel: cut it into tiles'
    ),
    'image under the stride': Kind(
        LEFT_OUT,
        f'left out: in the size that the recipe gives it a side is under {STRIDE} pixels, of which the backbone leaves '
        'nothing: cut it into tiles',
    ),
    'name in other case': Kind(MENDED, 'the name on the disk is taken'),
    'image turned by EXIF': Kind(MENDED, 'its annotation is of the image as stored: read without turning'),
    'the same image twice': Kind(NOTED, 'kept: the same bytes under two names'),
    'image of train in val': Kind(NOTED, 'kept: the same bytes in both, so figures on val are too good'),
    'nothing to train on': Kind(REFUSED, 'no usable annotation is left'),
    'nothing to evaluate': Kind(REFUSED, 'no usable annotation is left'),
    # COCO's images
    'image without id or name': Kind(LEFT_OUT),
    'image id twice': Kind(LEFT_OUT, 'the later one is left out, the annotations stay with the first'),
    'file name twice': Kind(LEFT_OUT, 'the later one is left out, with its annotations'),
    'name leads out of the folder': Kind(LEFT_OUT),
    'name written otherwise': Kind(MENDED, 'the name on the disk is taken, which differs in Unicode form or escapes'),
    'name found by its ending': Kind(MENDED, 'no such folder is here: the one file is taken that ends like the name'),
    'ambiguous name': Kind(
        REFUSED, 'write names with their folders as they are here, or give --train-images, --val-images'
    ),
    'size contradicts the image': Kind(LEFT_OUT),
    'no size given': Kind(MENDED, "the image's own is taken"),
    'image without annotations': Kind(NOTED, 'kept: the recipes train without them, and evaluate with them'),
    'image under 32 pixels': Kind(NOTED, 'kept: the recipes train without them (filter_cfg.min_size)'),
    # COCO's categories
    'category id twice': Kind(REFUSED, 'give each category an id of its own'),
    'category without id or name': Kind(REFUSED, 'give each a name and an id: true and false are none'),
    'category name twice': Kind(MENDED, 'taken as one class'),
    'category named otherwise': Kind(
        REFUSED, 'the same id has two names in train and here: name it alike, or number it anew'
    ),
    'category without a class': Kind(LEFT_OUT, "none of train's, or of the checkpoint's: its annotations are left out"),
    'category with other id': Kind(MENDED, 'matched with train by its name'),
    'class never annotated': Kind(NOTED, 'kept as a class'),
    'class never trained': Kind(NOTED, 'kept: annotated here, never in train'),
    'id as text or float': Kind(MENDED, 'taken as the number that it is'),
    'image id numbered anew': Kind(MENDED, 'all images are: pycocotools and mmdet want whole numbers up to 2**53'),
    'supercategory that is no text': Kind(NOTED, 'left aside: nothing is learnt of it'),
    'gaps in category ids': Kind(NOTED, 'classes are counted without them'),
    'group of classes': Kind(MENDED, 'no class: nothing is annotated with it, the others name it as their group'),
    # COCO's annotations
    'annotation of no image': Kind(LEFT_OUT),
    'unknown category': Kind(LEFT_OUT),
    'not an annotation': Kind(LEFT_OUT),
    'annotation there twice': Kind(LEFT_OUT, 'the later one is left out'),
    'annotation id twice': Kind(MENDED, 'numbered anew'),
    'no box': Kind(LEFT_OUT),
    'box from the mask': Kind(MENDED, 'there is no box: taken from the mask'),
    'box is not four numbers': Kind(LEFT_OUT),
    'box of NaN or Inf': Kind(LEFT_OUT),
    'box without area': Kind(LEFT_OUT),
    'box under a pixel': Kind(NOTED, 'kept: mmdet trains without them'),
    'box outside the image': Kind(LEFT_OUT),
    'box far outside': Kind(LEFT_OUT),
    'box partly outside': Kind(NOTED, 'kept: training cuts it at the border, the evaluation takes it as it is'),
    'box written as corners': Kind(LEFT_OUT, 'left out: its mask says x1, y1, x2, y2: write x, y, width, height'),
    'boxes written as corners': Kind(REFUSED, 'most are x1, y1, x2, y2: write x, y, width, height'),
    'box apart from its mask': Kind(LEFT_OUT, 'left out: it has nothing to do with its mask'),
    'box unlike its mask': Kind(NOTED, 'kept: the mask is of another size or elsewhere'),
    'area that cannot be': Kind(MENDED, 'taken from the mask or the box'),
    'no area given': Kind(MENDED, 'taken from the mask or the box'),
    'no mask': Kind(LEFT_OUT, 'left out: most others have one'),
    'masks of few': Kind(NOTED, 'most annotations have no mask: all are taken as boxes'),
    'mask left aside': Kind(NOTED, 'it is none: a mask is a list of polygons, or an RLE; boxes alone are taken'),
    'mask of no known form': Kind(LEFT_OUT, 'left out: a mask is a list of polygons, or an RLE'),
    'polygon under three points': Kind(LEFT_OUT),
    'polygon of an odd count': Kind(LEFT_OUT, 'left out: x and y do not pair up'),
    'polygon of no numbers': Kind(LEFT_OUT),
    'polygon outside the image': Kind(LEFT_OUT),
    'polygon far outside': Kind(LEFT_OUT),
    'polygon without an end': Kind(LEFT_OUT, 'left out: its outline is over ten million pixels long'),
    'polygon not in a list': Kind(MENDED, 'put into one'),
    'RLE of another size': Kind(LEFT_OUT),
    'RLE that does not add up': Kind(LEFT_OUT),
    'iscrowd as text': Kind(MENDED, "'0' and 'false' are no crowd, '1' and 'true' are one"),
    'iscrowd is neither 0 nor 1': Kind(LEFT_OUT),
    'crowd': Kind(NOTED, 'kept: not trained on, ignored in the evaluation (CVAT marks what was painted so)'),
    'crowd with polygons': Kind(NOTED, 'kept: not trained on, ignored in the evaluation'),
    # label maps
    'image without label map': Kind(LEFT_OUT),
    'two images of one name': Kind(LEFT_OUT, 'the later one is left out: a label map belongs to one image'),
    'masks of 0 and 255': Kind(
        REFUSED, '255 is ignored, so that nothing is learnt: where it is a class, write it as 1'
    ),
    'a single class': Kind(REFUSED, 'of one class nothing is learnt: the loss is always 0'),
    'one class in all of train': Kind(NOTED, 'kept: nothing is learnt but that all is of this class'),
    'label map without image': Kind(LEFT_OUT),
    'unreadable label map': Kind(LEFT_OUT),
    'label map too large': Kind(LEFT_OUT, TOO_LARGE),
    'label map of one row': Kind(LEFT_OUT, 'left out: mmseg cannot read one of a single row or column'),
    'label map in a lossy file': Kind(REFUSED, 'JPEG and the like smear labels: write PNGs, from the original ones'),
    'label map of another size': Kind(LEFT_OUT),
    'label map of ignored pixels': Kind(LEFT_OUT),
    'label map in colours': Kind(REFUSED, 'write index PNGs: one channel, in which a pixel is the number of its class'),
    'labels beyond 255': Kind(REFUSED, 'write 8-bit PNGs: in 16 bits mmseg would cut labels off'),
    'label out of range': Kind(REFUSED),
}
ERRORS = (REFUSED, LEFT_OUT)
UNLEARNT = ('crowd', 'crowd with polygons', 'box under a pixel', 'image under 32 pixels')  # kept, and not trained on


@dataclass
class Finding:
    """A kind of problem in a split: how often, and the first few by name."""

    split: str
    kind: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def done(self) -> str:
        return KINDS[self.kind].done

    def in_short(self) -> str:
        """As a part of one line."""
        return f'{self.kind}, {self.count:,} ({", ".join(shown(example, 60) for example in self.examples[:2])})'

    def __str__(self) -> str:
        then = KINDS[self.kind].then
        more = ', ...' if self.count > len(self.examples) else ''
        text = f'{self.done:<8}  {self.split}: {self.kind}, {self.count:,} ({", ".join(self.examples)}{more})'
        return f'{text}: {then}' if then else text


@dataclass
class Report:
    """What is there (`facts`, a line each) and what is wrong with it."""

    facts: list[str] = field(default_factory=list)
    findings: dict[tuple[str, str], Finding] = field(default_factory=dict)

    def add(self, split: str, kind: str, example: object, count: int = 1) -> None:
        finding = self.findings.setdefault((split, kind), Finding(split, kind))
        finding.count += count
        if len(finding.examples) < EXAMPLES:
            finding.examples.append(shown(example))

    def of(self, *done: str) -> list[Finding]:
        """The findings about which this is done, the most serious first, and as they were found."""
        return [f for word in (REFUSED, LEFT_OUT, MENDED, NOTED) if word in done for f in self.findings.values()
                if f.done == word]  # fmt: skip

    @property
    def errors(self) -> list[Finding]:
        return self.of(*ERRORS)

    def lines(self) -> list[str]:
        found = self.of(REFUSED, LEFT_OUT, MENDED, NOTED)
        return [*map(shown, self.facts), *map(str, found or ['nothing is wrong'])]

    def as_data(self) -> dict:
        """For machines: facts and findings as plain data."""
        found = self.of(REFUSED, LEFT_OUT, MENDED, NOTED)
        keys = ('split', 'kind', 'done', 'count', 'examples')
        return dict(facts=self.facts, findings=[{key: getattr(f, key) for key in keys} for f in found])

    def refuse(self, strict: bool = False) -> None:
        """Raise UsageError where something cannot be left out or mended, or `strict` and something is left out."""
        found = self.of(REFUSED) or (self.errors if strict else [])
        if found:
            others = len(self.findings) - 1
            more = f' ({others} more finding{"s" * (others > 1)}: tools/check_data.py lists them)' if others else ''
            raise UsageError(f'the data: {str(found[0]).split(maxsplit=1)[1] if not strict else found[0]}{more}')
