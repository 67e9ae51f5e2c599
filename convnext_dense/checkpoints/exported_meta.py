"""What an exported model (ONNX, OpenVINO, torch.export) says of itself: one JSON text in the file's metadata."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import UsageError

# Where the text lies: metadata_props of ONNX, rt_info of OpenVINO, extra file of torch.export with '.json' behind it.
KEY = 'convnext_dense'
FORMAT = 1
TASKS = ('detection', 'segmentation')
CHANNELS = 'channels'
INPUTS = ('uint8', 'float32', CHANNELS, 'raw')
MASKS = (None, 'image', 'box')


@dataclass(frozen=True)
class ExportedMeta:
    """What is known of an exported model.

    Attributes:
        task: 'detection' or 'segmentation'.
        classes: Names of the classes, in the order of the model's outputs.
        config: Text of the config of the model and of its test pipeline, as checkpoints hold it.
        palette: RGB color of each class; empty if none is known.
        input: What `images` holds: 'uint8' or 'float32', RGB from 0 to 255; 'channels', float32 values of the channels
            of an image file that `LoadImageChannels` of the config names, in its order; or 'raw', normalized and padded
            float32 in the model's order of channels.
        size: Height and width of `images` where they are fixed.
        masks: Detection: 'image', masks in the pixels of the image; 'box', probabilities in the box; None without any.
        mean: Mean that the model subtracts from each channel, in its channel order.
        std: Standard deviation by which it then divides each channel.
        recipe: Name of the recipe, such as 'mask_rcnn/convnext_t', if it is one.
        versions: Versions of the packages that wrote the file, by package name.
        channels: Number of channels of `images`; None in files of earlier versions.
    """

    task: str
    classes: tuple[str, ...]
    config: str
    palette: tuple[tuple[int, int, int], ...] = ()
    input: str = 'uint8'
    size: tuple[int, int] | None = None
    masks: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    recipe: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    channels: int | None = None

    def to_json(self) -> str:
        """Return the text for the file's metadata."""
        return json.dumps(dict(format=FORMAT, **dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, text: str | None, file: str) -> 'ExportedMeta':
        """Read the text out of a file's metadata.

        Args:
            text: The text; None if the file has none.
            file: Path of the file, for messages.

        Raises:
            UsageError: If there is no text, or it is not one of this format.
        """
        if not text:
            raise UsageError(f'{file} is not a model that tools/export.py wrote: its metadata have no {KEY}')
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{file}: the metadata '{KEY}' are not valid JSON: export the model again") from error
        number = values.get('format') if isinstance(values, dict) else None
        if number != FORMAT:
            raise UsageError(
                f'{file}: its metadata have the format {str(number)[:20]}, this version reads {FORMAT}: export the '
                'model again with this version'
            )
        values = {name: _freeze(values.get(name)) for name in CHECKS}
        invalid = next((name for name, is_valid in CHECKS.items() if not is_valid(values[name])), None)
        if invalid:
            value = repr(values[invalid])[:50]
            raise UsageError(f"{file}: '{invalid}' in its metadata cannot be {value}: export the model again")
        return cls(**values)


def _freeze(value: object) -> object:
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _tuple_of(is_valid: Callable, length: int | None = None) -> Callable:
    return lambda v: isinstance(v, tuple) and (length is None or len(v) == length) and all(map(is_valid, v))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_int(low: int, high: int) -> Callable:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


# Attribute -> whether it can have a value.
CHECKS = {
    'task': lambda value: value in TASKS,
    'classes': _tuple_of(_is_text),
    'config': _is_text,
    'palette': _tuple_of(_tuple_of(_is_int(0, 255), 3)),
    'input': lambda value: value in INPUTS,
    'size': lambda value: value is None or _tuple_of(_is_int(1, 2**16), 2)(value),
    'masks': lambda value: value in MASKS,
    'mean': _tuple_of(_is_number),
    'std': _tuple_of(_is_number),
    'recipe': lambda value: value is None or isinstance(value, str),
    'versions': lambda v: isinstance(v, dict) and all(map(_is_text, v.values())),
    'channels': lambda value: value is None or _is_int(1, 2**16)(value),
}
