"""Metadata and outputs of exported models (ONNX, OpenVINO, torch.export), read without a runtime or the weights."""

import os
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO
from xml.etree import ElementTree

from ..errors import UsageError
from .exported_meta import KEY, ExportedMeta
from .io import file_state

AGAIN = 'export or copy it again'
MAX_META_BYTES = 64 << 20
MAX_CACHED = 2  # tools read one several times


@dataclass(frozen=True)
class ExportedFile:
    """An exported model before it is loaded.

    Attributes:
        path: Path of the file.
        meta: Metadata in the file.
        outputs: Names of the outputs; None if they are known only once the model is loaded.
    """

    path: str
    meta: ExportedMeta
    outputs: tuple[str, ...] | None = None


def is_exported(path: str | Path) -> bool:
    """Whether a path has the suffix of an exported model."""
    return Path(path).suffix.lower() in READERS


def read_exported(path: str | Path) -> ExportedFile:
    """Read what an exported model says of itself; nothing in the file is executed.

    The last `MAX_CACHED` are cached until their file changes.

    Args:
        path: .onnx, .xml or .pt2 file.

    Raises:
        UsageError: If the file is truncated, not a model, or not written by tools/export.py.
    """
    path = str(path)
    if not os.path.isfile(path):
        raise UsageError(f'{path} is not a regular file: give the file of a model')
    if not os.path.getsize(path):
        raise UsageError(f'{path} is empty: {AGAIN}')
    return _read_cached(os.path.abspath(path), file_state(path))


@lru_cache(MAX_CACHED)
def _read_cached(path: str, state: tuple[int, ...]) -> ExportedFile:
    text, outputs = READERS[Path(path).suffix.lower()](path)
    return ExportedFile(path, ExportedMeta.from_json(text, path), outputs)


# Numbers of fields in onnx.proto.
GRAPH, METADATA, GRAPH_OUTPUT, KEY_FIELD, VALUE_FIELD, NAME_FIELD = 7, 14, 12, 1, 2, 1


def _read_onnx(path: str) -> tuple[str | None, tuple[str, ...]]:
    """Walk over the fields of the model; the weights in its graph are not read, and need no memory.

    Not by `onnx`, which reads all weights, nor by ONNX Runtime, which knows the metadata only of a model that it has
    loaded (seconds, and gigabytes, of a large one): both are optional, and what is wrong with a file, or that its
    runtime is missing, is told before either is needed.
    """
    metadata, outputs, has_graph = {}, [], False
    try:
        with open(path, 'rb') as f:
            for number, start, end in _iter_fields(f, 0, os.path.getsize(path)):
                if number == METADATA:
                    entry = {n: _read_text(f, a, b) for n, a, b in _iter_fields(f, start, end)}
                    metadata[entry.get(KEY_FIELD)] = entry.get(VALUE_FIELD)
                elif number == GRAPH:
                    has_graph = True
                    outputs += [_first_text(f, a, b) for n, a, b in _iter_fields(f, start, end) if n == GRAPH_OUTPUT]
        if not has_graph:
            raise ValueError('no graph')
    except ValueError as error:  # UnicodeDecodeError is one
        raise UsageError(f'{path} is not an ONNX model, or is truncated: {AGAIN}') from error
    return metadata.get(KEY), tuple(outputs)


def _iter_fields(f: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Iterate over the fields of a protobuf message that lies from `start` to `end`: number, start and end of each."""
    while start < end:
        f.seek(start)
        tag = _read_varint(f)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value_start = f.tell()
            _read_varint(f)
            value_end = f.tell()
        elif wire_type in (1, 2, 5):
            length = {1: 8, 5: 4}.get(wire_type) or _read_varint(f)
            value_start = f.tell()
            value_end = value_start + length
        else:
            raise ValueError('no wire type of protobuf')
        if not number or value_end > end:
            raise ValueError('a field ends behind its message')
        yield number, value_start, value_end
        start = value_end


def _read_varint(f: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = f.read(1)
        if not byte:
            break
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
    raise ValueError('no number of protobuf')


def _read_text(f: BinaryIO, start: int, end: int) -> str:
    if end - start > MAX_META_BYTES:
        raise ValueError('too long for a text')
    f.seek(start)
    return f.read(end - start).decode()


def _first_text(f: BinaryIO, start: int, end: int) -> str:
    return next((_read_text(f, a, b) for n, a, b in _iter_fields(f, start, end) if n == NAME_FIELD), '')


def _read_openvino(path: str) -> tuple[str | None, tuple[str, ...] | None]:
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two: of its encoding
        raise UsageError(f'{path} is not an OpenVINO model, or is truncated: {AGAIN}') from error
    if root.tag != 'net':
        raise UsageError(f'{path} is not an OpenVINO model: {AGAIN}')
    weights = Path(path).with_suffix('.bin')
    if not weights.is_file():
        raise UsageError(f'{path} needs its weights, {weights.name}, next to it: copy both files')
    texts = [item.get('value') for item in root.findall(f'./rt_info/{KEY}')]
    results = [layer.get('output_names', '') for layer in root.iter('layer') if layer.get('type') == 'Result']
    names = tuple(name for text in results for name in text.split(',') if name)
    return next(iter(texts), None), names or None


def _read_pt2(path: str) -> tuple[str | None, None]:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [i for i in archive.infolist() if re.search(rf'(^|/)extra(_files)?/{KEY}\.json$', i.filename)]
            if entries and entries[0].file_size > MAX_META_BYTES:
                raise ValueError('too long for a text')
            return (archive.read(entries[0]).decode() if entries else None), None
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, RuntimeError) as error:
        raise UsageError(f'{path} is not a torch.export file, or is truncated: {AGAIN}') from error


READERS = {'.onnx': _read_onnx, '.xml': _read_openvino, '.pt2': _read_pt2}
