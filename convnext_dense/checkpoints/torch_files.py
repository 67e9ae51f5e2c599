"""Read files of `torch.save`: zip archives since torch 1.6, and the format before that.

Offset and length of each tensor are checked against the file before it is read.
"""

import io
import mmap
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from .unpickler import Storage, StorageType, Unpickler, UnsafeCheckpointError

ZIP_MAGIC = b'PK\x03\x04'  # first bytes of an archive
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle in an older file
PICKLE_FIX = (
    "where you trust it: weights = pickle.load(open('{file}', 'rb'))['model']; "
    "torch.save({{name: torch.as_tensor(array) for name, array in weights.items()}}, 'weights.pth')"
)
MAX_RATIO, MAX_UNPACKED = 20, 2**28  # limits of unpacked entries: multiple of the file's size, or bytes


def load(file: Path) -> object:
    """Read a file of `torch.save`.

    Args:
        file: Path of the file.

    Returns:
        Its content, with tensors on the CPU. Uncompressed and aligned tensors stay on disk until they are used.

    Raises:
        UnsafeCheckpointError: If the file requests anything that weights do not need, or contradicts itself.
        Exception: If the file is damaged; any exception is possible.
    """
    with open(file, 'rb') as f:
        memory = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    return (_load_zip if memory[:4] == ZIP_MAGIC else _load_legacy)(file, memory)


def _load_zip(file: Path, memory: mmap.mmap) -> object:
    with zipfile.ZipFile(file) as archive:
        entries = _check_entries(archive, memory)
        root = _archive_root(entries)
        order = entries.get(f'{root}byteorder')
        order = sys.byteorder.encode() if order is None else _read_record(archive, memory, order)
        if order not in (b'little', b'big'):
            raise UnsafeCheckpointError(f'its byteorder is {order[:40]!r}, neither little nor big')
        swap = order != sys.byteorder.encode()
        storages = {}

        def find_storage(kind: StorageType, key: str, location: str, numel: int, *_) -> Storage:
            entry = entries.get(f'{root}data/{key}')
            if entry is None or entry.file_size != numel * kind.dtype.itemsize:
                size = 'none' if entry is None else f'{entry.file_size} bytes'
                raise UnsafeCheckpointError(f'its storage {key} should hold {numel} values and has {size}')
            if key not in storages:
                is_stored = entry.compress_type == zipfile.ZIP_STORED
                content = memory if is_stored else bytearray(archive.read(entry))
                start = _data_offset(memory, entry) if is_stored else 0
                storages[key] = _load_storage(content, start, entry.file_size, kind.dtype, swap)
            return Storage(kind.dtype, storages[key])

        return Unpickler(io.BytesIO(_read_record(archive, memory, entries[f'{root}data.pkl'])), find_storage).load()


def _check_entries(archive: zipfile.ZipFile, memory: mmap.mmap) -> dict[str, zipfile.ZipInfo]:
    """Return the entries of an archive by name, after checking them.

    Names are unique, no entry overlaps another one or exceeds the file, none unpacks without bound, and all match their
    checksums, which torch does not verify (`ZipFile.read` does for compressed entries).
    """
    infos = archive.infolist()
    entries = {entry.filename: entry for entry in infos}
    packed = [entry for entry in infos if entry.compress_type != zipfile.ZIP_STORED]
    unpacked, limit = sum(entry.file_size for entry in packed), max(MAX_UNPACKED, MAX_RATIO * len(memory))
    if len(entries) < len(infos) or sum(entry.compress_size for entry in infos) > len(memory):
        raise UnsafeCheckpointError('its zip entries overlap')
    if unpacked > limit:
        raise UnsafeCheckpointError(f'it unpacks to {unpacked / 2**20:,.0f} MiB, the limit is {limit / 2**20:,.0f}')
    for entry in infos:
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or entry.flag_bits & 1:
            raise UnsafeCheckpointError(f'its zip entry {entry.filename} is encrypted or compressed in a rare way')
        if entry.compress_type == zipfile.ZIP_STORED and entry.CRC:  # some writers leave it at 0
            start = _data_offset(memory, entry)
            with memoryview(memory) as view, view[start : start + entry.file_size] as content:
                if zlib.crc32(content) != entry.CRC:
                    raise UnsafeCheckpointError(f'its entry {entry.filename} is damaged: Bad CRC-32')
    return entries


def _data_offset(memory: mmap.mmap, entry: zipfile.ZipInfo) -> int:
    """Return the offset of the content of an uncompressed entry.

    It follows from the local header, which has to match the central directory.
    """
    at = entry.header_offset
    method = int.from_bytes(memory[at + 8 : at + 10], 'little')
    name, extra = (int.from_bytes(memory[at + i : at + i + 2], 'little') for i in (26, 28))
    start = at + 30 + name + extra
    written = memory[at + 30 : at + 30 + name].decode('utf-8' if entry.flag_bits & 0x800 else 'cp437')
    is_valid = memory[at : at + 4] == ZIP_MAGIC and method == zipfile.ZIP_STORED and written == entry.orig_filename
    if not is_valid or entry.compress_size != entry.file_size or start + entry.file_size > len(memory):
        raise UnsafeCheckpointError(f'its entry {entry.filename} is not where, or not what, its list of entries says')
    return start


def _archive_root(entries: dict[str, zipfile.ZipInfo]) -> str:
    """Return the folder of the checkpoint in an archive."""
    roots = [name.removesuffix('data.pkl') for name in entries if name.split('/')[-1] == 'data.pkl']
    if len(roots) != 1:
        raise UnsafeCheckpointError(
            'it is a zip archive of something else: unpack it' if not roots else 'it holds several'
        )
    if f'{roots[0]}constants.pkl' in entries:
        fix = "torch.save(torch.jit.load('{file}').state_dict(), 'weights.pth')"
        raise UnsafeCheckpointError('it is a TorchScript archive', fix)
    return roots[0]


def _read_record(archive: zipfile.ZipFile, memory: mmap.mmap, entry: zipfile.ZipInfo) -> bytes:
    if entry.compress_type != zipfile.ZIP_STORED:
        return archive.read(entry)
    start = _data_offset(memory, entry)
    return memory[start : start + entry.file_size]


class StorageLocation(NamedTuple):
    """Offset of a storage in an older file in bytes, its number of values, and their dtype."""

    start: int
    numel: int
    dtype: torch.dtype


def _load_legacy(file: Path, memory: mmap.mmap) -> object:
    def pickled(find_storage: Callable[..., Storage] | None = None) -> object:
        return Unpickler(memory, find_storage or _refuse_storage).load()

    magic = LEGACY_MAGIC.to_bytes(10, 'little') in memory[:32]
    if memory[:1] == b'\x80' and not (magic and pickled() == LEGACY_MAGIC):
        raise UnsafeCheckpointError('it is a pickle that torch.save did not write, as detectron2 has them', PICKLE_FIX)
    if memory[:1] != b'\x80':
        raise UnsafeCheckpointError('torch.save did not write it')
    pickled()  # the version of the format
    swap = pickled().get('little_endian', True) != (sys.byteorder == 'little')
    content_at = memory.tell()
    expected: dict[str, StorageLocation] = {}

    def request_storage(kind: StorageType, key: str, location: str, numel: int, view=None) -> Storage:
        expected.setdefault(key, StorageLocation(0, numel, kind.dtype))
        return Storage(kind.dtype, None)

    pickled(request_storage)
    places = _storage_locations(memory, pickled(), expected)
    storages = {}

    def find_storage(kind: StorageType, key: str, location: str, numel: int, view=None) -> Storage:
        place, size = places[key], kind.dtype.itemsize
        if numel != place.numel or kind.dtype != place.dtype:
            raise UnsafeCheckpointError(f'its storage {key} is described in two ways')
        if key not in storages:
            storages[key] = _load_storage(memory, place.start, numel * size, kind.dtype, swap)
        if view is None:
            return Storage(kind.dtype, storages[key])
        _, view_start, length = view  # the part of it to which offsets of tensors refer
        if not 0 <= view_start <= view_start + length <= numel:
            raise UnsafeCheckpointError(f'it holds a view beyond its storage {key}')
        return Storage(kind.dtype, storages[key][view_start * size : (view_start + length) * size])

    memory.seek(content_at)
    return pickled(find_storage)


def _storage_locations(
    memory: mmap.mmap, keys: list[str], expected: dict[str, StorageLocation]
) -> dict[str, StorageLocation]:
    """Return the locations of the storages after the pickles, each of which follows its number of values."""
    if sorted(keys) != sorted(expected):
        raise UnsafeCheckpointError('its list of storages is not that of its tensors')
    places = {}
    for key in keys:
        numel = int.from_bytes(memory.read(8), 'little')
        start = memory.tell()
        place = places[key] = expected[key]._replace(start=start)
        end = start + place.numel * place.dtype.itemsize
        if numel != place.numel or end > len(memory):
            raise UnsafeCheckpointError(f'its storage {key} of {place.numel} values is cut short or has {numel}')
        memory.seek(end)
    return places


def _refuse_storage(*_) -> Storage:
    raise UnsafeCheckpointError('it has a storage where none is due')


def _load_storage(
    memory: mmap.mmap | bytearray, start: int, size: int, dtype: torch.dtype, swap: bool
) -> torch.UntypedStorage:
    """Return `size` bytes from offset `start`: mapped if the values are aligned there, otherwise copied.

    The bytes of each value are reversed if `swap`, in a file from a machine with the other byte order.
    """
    if not size:
        return torch.UntypedStorage(0)
    mapped = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start)
    storage = (mapped if start % dtype.itemsize == 0 else mapped.clone()).untyped_storage()
    if swap and dtype.itemsize > 1:
        storage.byteswap(dtype)
    return storage
