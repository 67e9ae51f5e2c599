"""Malicious and damaged checkpoint files: none crashes, hangs, exhausts memory, runs code or loads wrong values."""

import io
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from convnext_dense.checkpoints import load_checkpoint
from convnext_dense.errors import UsageError
from helpers.paths import ROOT


class Op(bytes):
    """Pickle opcodes that push one value."""


def unicode_op(value: str) -> Op:
    content = value.encode('utf-8', 'surrogatepass')
    return Op(b'X' + struct.pack('<I', len(content)) + content)


def global_op(path: str) -> Op:
    return Op(b'c' + path.replace(' ', '\n').encode() + b'\n')


def int_op(value: int) -> Op:
    content = value.to_bytes(max(1, value.bit_length() // 8 + 1), 'little', signed=True)
    return Op(b'\x8a' + bytes([len(content)]) + content)


def make_tuple(*values: Op) -> Op:
    return Op(b'(' + b''.join(values) + b't')


def call_op(path: str, *args: Op) -> Op:
    return Op(global_op(path) + make_tuple(*args) + b'R')


def storage_op(numel: int, key: str = '0', kind: str = 'torch FloatStorage') -> Op:
    return Op(
        make_tuple(unicode_op('storage'), global_op(kind), unicode_op(key), unicode_op('cpu'), int_op(numel)) + b'Q'
    )


def tensor_op(base: Op, offset: int, size: tuple, stride: tuple) -> Op:
    sizes = (make_tuple(*map(int_op, numbers)) for numbers in (size, stride))
    return call_op('torch._utils _rebuild_tensor_v2', base, int_op(offset), *sizes, Op(b'\x89'), Op(b'N'))


def byte_string(content: bytes) -> Op:
    return call_op('_codecs encode', unicode_op(content.decode('latin1')), unicode_op('latin1'))


def array_op(code: str, shape: tuple, content: bytes) -> Op:
    start = call_op(
        'numpy.core.multiarray _reconstruct', global_op('numpy ndarray'), make_tuple(int_op(0)), byte_string(b'b')
    )
    dtype = call_op('numpy dtype', unicode_op(code))
    return Op(
        start + make_tuple(int_op(1), make_tuple(*map(int_op, shape)), dtype, Op(b'\x89'), byte_string(content)) + b'b'
    )


def save(file: Path, value: bytes, data: bytes = bytes(16), **zip_kwargs) -> Path:
    """Write an archive as torch.save does: a dict with an empty `state_dict` and the value as `meta`."""
    content = b'\x80\x02}(' + unicode_op('state_dict') + b'}' + unicode_op('meta') + value + b'u.'
    with zipfile.ZipFile(file, 'w', **zip_kwargs) as archive:
        archive.writestr('archive/data.pkl', content)
        archive.writestr('archive/version', '3')
        archive.writestr('archive/byteorder', 'little')
        archive.writestr('archive/data/0', data)
    return file


DEEP = b'(' * 200_000 + b't' * 200_000
OBJECT = call_op('numpy dtype', unicode_op('O'))
# Pickled value, and words of the error message (None: the file loads).
ATTACKS = {
    'a pointer as an object': (call_op('numpy ndarray', make_tuple(int_op(1)), OBJECT, byte_string(b'A' * 8)), 'dtype'),
    'a pointer by the state of an array': (array_op('O', (1,), b'A' * 8), "dtype 'O'"),
    'a pointer by a scalar': (call_op('numpy.core.multiarray scalar', OBJECT, byte_string(b'A' * 8)), "dtype 'O'"),
    'a dtype of a list': (call_op('numpy dtype', Op(b']' + array_op('f8', (1,), bytes(8)) + b'a')), 'dtype'),
    'a dtype of fields': (call_op('numpy dtype', unicode_op('i4,O')), 'dtype'),
    'a dtype with fields as its state': (
        call_op('numpy dtype', unicode_op('f8'))
        + make_tuple(int_op(3), unicode_op('<'), *[make_tuple(unicode_op('a'))] * 3)
        + b'b',
        'no numbers',
    ),
    'an array longer than its bytes': (array_op('f8', (1000,), bytes(8)), 'in 8 bytes'),
    'an array of negative length': (array_op('f8', (-1,), bytes(8)), 'impossible shape'),
    'the constructor of arrays': (call_op('numpy ndarray', make_tuple(int_op(2**40))), 'numpy.ndarray'),
    'text of no length': (array_op('U0', (2**40,), b''), "dtype 'U0'"),
    'a scalar longer than its bytes': (
        call_op('numpy.core.multiarray scalar', call_op('numpy dtype', unicode_op('f8')), byte_string(b'')),
        'in 0 bytes',
    ),
    'a storage beyond its record': (tensor_op(storage_op(5), 0, (5,), (1,)), 'should hold 5 values and has 16 bytes'),
    'a storage of another type': (tensor_op(storage_op(4, kind='torch DoubleStorage'), 0, (4,), (1,)), 'should hold 4'),
    'a storage that is not there': (tensor_op(storage_op(4, key='7'), 0, (4,), (1,)), 'has none'),
    'a tensor beyond its storage': (tensor_op(storage_op(4), 0, (5,), (1,)), 'larger than its storage of 4 values'),
    'an offset beyond the storage': (tensor_op(storage_op(4), 1, (4,), (1,)), 'larger than its storage'),
    'a stride beyond the storage': (tensor_op(storage_op(4), 0, (2, 2), (3, 1)), 'larger than its storage'),
    'an offset below zero': (tensor_op(storage_op(4), -1, (4,), (1,)), 'impossible shape'),
    'a stride below zero': (tensor_op(storage_op(4), 3, (4,), (-1,)), 'impossible shape'),
    'a size below zero': (tensor_op(storage_op(4), 0, (-4,), (1,)), 'impossible shape'),
    'more strides than sizes': (tensor_op(storage_op(4), 0, (4,), (1, 1)), 'impossible shape'),
    'a value repeated a trillion times': (tensor_op(storage_op(4), 0, (10**12,), (0,)), 'larger than its storage'),
    'sizes whose product overflows': (tensor_op(storage_op(4), 0, (2**40, 2**40), (0, 0)), 'larger than its storage'),
    'a tensor made by its class': (call_op('torch Tensor', int_op(2**34)), 'calls torch.Tensor'),
    'a storage made by its class': (call_op('torch FloatStorage', int_op(2**34)), 'calls StorageType'),
    'bytes by their number': (call_op('__builtin__ bytearray', int_op(2**36)), 'needs __builtin__.bytearray'),
    'a slow encoding': (
        call_op('_codecs encode', unicode_op('ä' * 100_000), unicode_op('punycode')),
        "encodes text as 'punycode'",
    ),
    'a hash of deep tuples': (b'}' + DEEP + b'Ns', 'a tuple as a key'),
    'a set of deep tuples': (call_op('__builtin__ set', Op(b'](' + DEEP + b'e')), 'a tuple as a key'),
    'an index of the memo': (b'Nr\xff\xff\xff\x7f', None),  # a large index must not allocate
    'an unset index of the memo': (b'j\xff\xff\xff\x7f', 'Memo value not found'),
    'a buffer of any length': (b'\x96' + struct.pack('<Q', 2**40), 'what torch.save does not write'),
    'a function': (call_op('os system', unicode_op('true')), 'needs os.system'),
    'an attribute': (
        call_op('__builtin__ getattr', global_op('argparse Namespace'), unicode_op('__init__')),
        'getattr',
    ),
    'an attribute of a history': (
        call_op(
            '__builtin__ getattr', global_op('mmengine.logging.history_buffer HistoryBuffer'), unicode_op('__init__')
        ),
        'getattr',
    ),
    'a class changed by its state': (
        global_op('argparse Namespace') + b'}' + unicode_op('a') + b'Nsb',
        'sets the state of a GlobalName',
    ),
    'a function changed by its state': (
        global_op('_codecs encode') + b'}' + unicode_op('call') + b'Nsb',
        'sets the state',
    ),
    'a sparse tensor': (global_op('torch._utils _rebuild_sparse_tensor'), 'sparse tensors: give dense ones'),
    'a quantized tensor': (global_op('torch._utils _rebuild_qtensor'), 'quantized tensors: give weights in fp16'),
    'methods of an OrderedDict': (
        call_op('collections OrderedDict') + b'}' + unicode_op('items') + int_op(1) + b'sb',
        None,  # attributes except `_metadata` are ignored
    ),
}


@pytest.mark.parametrize('attack', ATTACKS)
def test_malicious_pickle_is_refused(tmp_path, attack):
    value, words = ATTACKS[attack]
    file = save(tmp_path / 'w.pth', value)
    if words is None:
        meta = load_checkpoint(file)['meta']
        assert meta is None or list(meta.items()) == []
        return
    for mmap in (True, False):
        with pytest.raises(UsageError, match='cannot be read safely') as error:
            load_checkpoint(file, mmap)
        assert words in str(error.value) and '\n' not in str(error.value) and len(str(error.value)) < 600


def test_views_of_larger_tensors(tmp_path):
    """Valid sizes, strides and offsets, among them the stride 0 of an expanded tensor."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    views = {'t': base.t(), 'rows': base[::2], 'part': base[1:3, 2:4], 'expanded': base[:1, :1].expand(5, 5)}
    views |= {'none': base[:0], 'number': base[1, 1], 'parameter': torch.nn.Parameter(base)}
    for legacy in (False, True):
        torch.save(views, tmp_path / 'w.pth', _use_new_zipfile_serialization=not legacy)
        for mmap in (True, False):
            actual = load_checkpoint(tmp_path / 'w.pth', mmap)
            assert all(torch.equal(actual[key], views[key]) for key in views)
            assert type(actual['parameter']) is torch.nn.Parameter and actual['parameter'].requires_grad


def all_content() -> dict:
    """All kinds of content in checkpoints of torch, mmengine and the original code."""
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    dtypes += [torch.int8, torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn]
    generator = np.random.RandomState(0)
    history = HistoryBuffer(generator.rand(5), np.ones(5, int))
    weights = OrderedDict((str(d), torch.ones(3, 2).to(d)) for d in dtypes)
    weights._metadata = OrderedDict({'': {'version': 1}})
    return {
        'state_dict': weights,
        'message_hub': {'log_scalars': OrderedDict(loss=history), 'runtime_info': {'best': np.float64(3.5)}},
        'optimizer': {'state': {0: {'step': torch.tensor(2.0)}}, 'param_groups': [{'betas': (0.9, 0.999), 'lr': 1e-4}]},
        'param_schedulers': [{'milestones': Counter([27, 33]), 'last_step': -1}],
        'args': Namespace(lr=4e-3, model='convnext_tiny', nothing=None),
        'meta': {
            'cfg': 'model = dict()',
            'values': [np.float32(1), np.bool_(True), np.int32(3), np.str_('é'), np.ones((2, 3), order='F')],
            'big_endian': np.arange(3, dtype='>i4'),
            'names': np.array(['a', 'bc']),
            'bytes': b'\x00\xff',
            'others': [torch.float16, torch.device('cpu'), torch.Size([2, 3]), {1, 'a'}, 2**60, -1, 1j, (1, (2, 3))],
            ('a', 1): 'a tuple as a key',
        },
    }


def equal(a, b) -> bool:
    if isinstance(a, (dict, Namespace)):
        a, b = (vars(x) if isinstance(x, Namespace) else x for x in (a, b))
        return type(a) is type(b) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a[None].view(torch.uint8).equal(b[None].view(torch.uint8))
    if isinstance(a, HistoryBuffer):
        return all(np.array_equal(x, y) for x, y in zip(a.data, b.data)) and a.mean() == b.mean()
    if isinstance(a, np.ndarray):
        native = a.dtype.newbyteorder('=')  # as numpy reads it
        return native == b.dtype and np.array_equal(a, b) and a.flags.f_contiguous == b.flags.f_contiguous
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize('protocol', [2, 3, 4])
@pytest.mark.parametrize('legacy', [False, True])
def test_all_checkpoint_content_is_read(tmp_path, legacy, protocol):
    file = tmp_path / 'w.pth'
    torch.save(all_content(), file, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    for mmap in (True, False):
        actual = load_checkpoint(file, mmap)
        assert equal(all_content(), actual)
        assert actual['state_dict']._metadata == {'': {'version': 1}}


def test_pickle_protocol_5(tmp_path):
    content = {'state_dict': all_content()['state_dict'], 'meta': {'epoch': 3, 'large': 2**3000, 'names': {'a', 'b'}}}
    torch.save(content, tmp_path / 'w.pth', pickle_protocol=5)
    assert equal(content, load_checkpoint(tmp_path / 'w.pth'))
    torch.save({**content, 'array': np.ones(3)}, tmp_path / 'w.pth', pickle_protocol=5)
    with pytest.raises(UsageError, match=r"_frombuffer\): where you trust it: .*\['state_dict'\]"):
        load_checkpoint(tmp_path / 'w.pth')


def repack(source: Path, target: Path, chosen=lambda entry: True, method=zipfile.ZIP_DEFLATED) -> Path:
    """Copy an archive with the chosen entries compressed, as unzipping and zipping again does."""
    with zipfile.ZipFile(source) as source_zip, zipfile.ZipFile(target, 'w') as target_zip:
        for entry in source_zip.infolist():
            target_zip.writestr(entry.filename, source_zip.read(entry), method if chosen(entry) else zipfile.ZIP_STORED)
    return target


@pytest.mark.parametrize(
    'chosen',
    [
        lambda entry: True,
        lambda entry: '/data/' in entry.filename,
        lambda entry: entry.filename.endswith('data.pkl'),
        lambda entry: entry.filename.endswith('/3'),
        lambda entry: False,  # stored, but no longer aligned
    ],
)
def test_repacked_archive(tmp_path, chosen):
    torch.save(all_content(), tmp_path / 'saved.pth')
    file = repack(tmp_path / 'saved.pth', tmp_path / 'w.pth', chosen)
    for mmap in (True, False):
        assert equal(all_content(), load_checkpoint(file, mmap))


def test_big_endian_archive(tmp_path):
    values = {'f4': torch.arange(4.0), 'i8': torch.arange(4), 'u1': torch.arange(4, dtype=torch.uint8)}
    torch.save(values, tmp_path / 'saved.pth')
    with zipfile.ZipFile(tmp_path / 'saved.pth') as source_zip, zipfile.ZipFile(tmp_path / 'w.pth', 'w') as target_zip:
        sizes = dict(zip(('data/0', 'data/1', 'data/2'), (4, 8, 1)))
        for entry in source_zip.infolist():
            content = b'big' if entry.filename.endswith('byteorder') else source_zip.read(entry)
            size = sizes.get(entry.filename.split('/', 1)[1], 1)
            target_zip.writestr(
                entry.filename, b''.join(content[i : i + size][::-1] for i in range(0, len(content), size))
            )
    assert all(torch.equal(tensor_op, values[key]) for key, tensor_op in load_checkpoint(tmp_path / 'w.pth').items())


@pytest.mark.parametrize('word', [b'little\n', b'middle', b''])
def test_unknown_byte_order_is_refused(tmp_path, word):
    torch.save({'a': torch.ones(4)}, tmp_path / 'saved.pth')
    with zipfile.ZipFile(tmp_path / 'saved.pth') as source_zip, zipfile.ZipFile(tmp_path / 'w.pth', 'w') as target_zip:
        for entry in source_zip.infolist():
            target_zip.writestr(
                entry.filename, word if entry.filename.endswith('byteorder') else source_zip.read(entry)
            )
    with pytest.raises(UsageError, match='neither little nor big'):
        load_checkpoint(tmp_path / 'w.pth')


def edit_bytes(file: Path, edit) -> Path:
    content = bytearray(file.read_bytes())
    edit(content)
    file.write_bytes(content)
    return file


def local_header(content: bytearray, record: bytes) -> int:
    return content.index(b'PK\x03\x04', content.index(record) - 64)


def central_header(content: bytearray, record: bytes) -> int:
    return content.rindex(b'PK\x01\x02', 0, content.rindex(record))


def pack_into(content: bytearray, offset: int, fmt: str, value: int) -> None:
    struct.pack_into(fmt, content, offset, value)


HEADER_EDITS = {
    'the method of compression': lambda c: pack_into(c, local_header(c, b'archive/data/0') + 8, '<H', 8),
    'the name': lambda c: pack_into(c, local_header(c, b'archive/data/0') + 30, '<B', 65),
    'the place': lambda c: pack_into(c, central_header(c, b'archive/data/0') + 42, '<I', 0),
    'a place beyond the file': lambda c: pack_into(c, central_header(c, b'archive/data/0') + 42, '<I', 2**31),
    'the size': lambda c: pack_into(c, central_header(c, b'archive/data/0') + 24, '<I', 32),
    'both sizes': lambda c: [pack_into(c, central_header(c, b'archive/data/0') + i, '<I', 2**31) for i in (20, 24)],
    'encryption': lambda c: pack_into(c, central_header(c, b'archive/data/0') + 8, '<H', 1),
    'the sum': lambda c: pack_into(c, central_header(c, b'archive/data/0') + 16, '<I', 1),
}


@pytest.mark.parametrize('field', HEADER_EDITS)
def test_contradictory_zip_headers_are_refused(tmp_path, field):
    file = edit_bytes(save(tmp_path / 'w.pth', tensor_op(storage_op(4), 0, (4,), (1,))), HEADER_EDITS[field])
    with pytest.raises(UsageError, match='cannot be read safely'):
        load_checkpoint(file)


def test_archives_with_other_content_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / 'other.pth', 'w') as archive:
        archive.writestr('weights.pth', b'')
    with pytest.raises(UsageError, match='zip archive of something else'):
        load_checkpoint(tmp_path / 'other.pth')
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / 'traced.pth'))
    with pytest.raises(UsageError, match='TorchScript'):
        load_checkpoint(tmp_path / 'traced.pth')
    (tmp_path / 'plain.pth').write_bytes(pickle.dumps({'a': 1}, 2))
    with pytest.raises(UsageError, match='a pickle that torch.save did not write'):
        load_checkpoint(tmp_path / 'plain.pth')
    os.mkfifo(tmp_path / 'pipe.pth')
    with pytest.raises(UsageError, match='not a regular file'):
        load_checkpoint(tmp_path / 'pipe.pth')


# Imports first: the memory limit must not count them.
LIMITED = """
import resource, sys
from convnext_dense.errors import UsageError
from convnext_dense.checkpoints.io import load_checkpoint
used = int(next(line for line in open('/proc/self/status') if line.startswith('VmSize')).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]),) * 2)
try:
    load_checkpoint(sys.argv[1])
except UsageError as error:
    assert not isinstance(error.__cause__, MemoryError), error
    sys.exit(str(error))
"""


def load_with_limit(file: Path, memory: int) -> subprocess.CompletedProcess:
    command = [sys.executable, '-c', LIMITED, file, str(memory)]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120)


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='limits memory as Linux does')
@pytest.mark.parametrize('record', ['archive/data.pkl', 'archive/data/0'])
def test_zip_bomb_is_refused(tmp_path, record):
    file = save(tmp_path / 'w.pth', tensor_op(storage_op(2**28), 0, (2**28,), (1,)), compression=zipfile.ZIP_DEFLATED)
    with (
        zipfile.ZipFile(file) as source_zip,
        zipfile.ZipFile(tmp_path / 'bomb.pth', 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as target_zip,
    ):
        for entry in source_zip.infolist():
            if entry.filename != record:
                target_zip.writestr(entry.filename, source_zip.read(entry))
        with target_zip.open(record, 'w', force_zip64=True) as content:
            for _ in range(64):
                content.write(bytes(2**24))
    process = load_with_limit(tmp_path / 'bomb.pth', 2**28)
    assert process.returncode == 1 and 'it unpacks to 1,024 MiB, the limit is 256' in process.stderr


# ---- mutated files --------------------------------------------------------------------------------------------------


def small_files(folder: Path) -> list[Path]:
    """A small checkpoint in each container format, with all kinds of content."""
    from safetensors.torch import save_file

    content, weights = all_content(), {f'stages.0.0.{n}': torch.randn(4, 4) for n in 'ab'}
    torch.save(content, folder / 'zip.pth')
    torch.save(weights, folder / 'weights.pth')
    torch.save(content, folder / 'legacy.pth', _use_new_zipfile_serialization=False)
    repack(folder / 'zip.pth', folder / 'deflated.pth')
    with zipfile.ZipFile(folder / 'stored.pth', 'w') as target_zip, zipfile.ZipFile(folder / 'zip.pth') as source_zip:
        for entry in source_zip.infolist():
            target_zip.writestr(entry.filename, source_zip.read(entry))
    save_file(weights, folder / 'w.safetensors')
    torch.save(content, folder / 'protocol4.pth', pickle_protocol=4)
    torch.save(content, folder / 'legacy4.pth', pickle_protocol=4, _use_new_zipfile_serialization=False)
    torch.save({'state_dict': weights, 'meta': {'n': 2**3000, 'names': {'a'}}}, folder / 'last.pth', pickle_protocol=5)
    names = ['zip', 'weights', 'legacy', 'deflated', 'stored', 'protocol4', 'legacy4', 'last']
    return [*(folder / f'{global_op}.pth' for global_op in names), folder / 'w.safetensors']


PROTOCOL_4_OPCODES = (
    b'\x8c',
    b'\x8d',
    b'\x8e',
    b'\x8f',
    b'\x90',
    b'\x91',
    b'\x92',
    b'\x93',
    b'\x94',
    b'\x95',
)  # of protocol 4


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Change, cut, duplicate and move bytes, and insert large lengths and indices."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not content:
            break
        pos, kind = rng.randrange(len(content)), rng.randrange(7)
        if kind == 0:
            content[pos] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[pos] = rng.randrange(256)
        elif kind == 2:
            del content[pos : pos + rng.choice((1, 2, 4, 8, 64))]
        elif kind == 3:
            content[pos:pos] = content[pos : pos + rng.choice((1, 2, 8, 64))]
        elif kind == 4:
            source_pos = rng.randrange(len(content))
            content[pos : pos + 8] = content[source_pos : source_pos + rng.choice((1, 4, 8, 32))]
        elif kind == 5:
            fmt, value = rng.choice((('<I', 2**31 - 1), ('<I', 2**32 - 1), ('<Q', 2**62), ('<I', 2**28), ('<I', 0)))
            packed = struct.pack(fmt, value)
            content[pos : pos + len(packed)] = packed
        else:  # an opcode of pickles
            content[pos : pos + 1] = rng.choice(
                (b'R', b'b', b'\x81', b'Q', b'r', b'j', b'u', b'(', b't', b'0', b'\x96', b'.', *PROTOCOL_4_OPCODES)
            )
    return bytes(content)


def mutate_file(file: Path, rng: random.Random) -> bytes:
    """A mutated file; in archives mostly one entry within valid headers and checksums, so that the pickle is read."""
    if not zipfile.is_zipfile(file) or rng.random() < 0.2:
        return mutate(file.read_bytes(), rng)
    target = io.BytesIO()
    with zipfile.ZipFile(file) as source_zip, zipfile.ZipFile(target, 'w') as target_zip:
        entries = source_zip.infolist()
        chosen = (
            next(e for e in entries if e.filename.endswith('data.pkl')) if rng.random() < 0.9 else rng.choice(entries)
        )
        for entry in entries:
            content = source_zip.read(entry)
            target_zip.writestr(
                entry.filename, mutate(content, rng) if entry is chosen else content, entry.compress_type
            )
    return target.getvalue()


def read_all_values(value, visited_ids: set) -> None:
    """Read every value of every tensor and array."""
    if id(value) in visited_ids:
        return
    visited_ids.add(id(value))
    if isinstance(value, torch.Tensor):
        value.detach().clone().reshape(-1).to(torch.complex64 if value.is_complex() else torch.float64).sum()
    elif isinstance(value, np.ndarray):
        assert value.dtype.kind in 'biufcSU' and value.nbytes < 2**24
        value.copy().tobytes()
    elif isinstance(value, (dict, Namespace)):
        for item in (vars(value) if isinstance(value, Namespace) else value).items():
            read_all_values(item, visited_ids)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            read_all_values(item, visited_ids)
    elif isinstance(value, HistoryBuffer):
        read_all_values(list(value.data), visited_ids)


def fuzz(folder: Path, first_seed: int, end_seed: int) -> None:
    """Read mutated files in this process with limited memory and time; log the progress to the file `progress`."""
    import resource
    import signal

    torch.set_num_threads(1)
    files = small_files(folder)
    for file in files:  # one-time allocations come before the limit
        read_all_values(load_checkpoint(file), set())
    status = Path('/proc/self/status').read_text()
    used = int(next(line for line in status.splitlines() if line.startswith('VmSize')).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)
    loaded = 0
    for seed in range(first_seed, end_seed):
        rng = random.Random(seed)
        (folder / 'progress').write_text(f'{seed} {loaded}')
        (folder / 'mutated').write_bytes(mutate_file(files[seed % len(files)], rng))
        signal.alarm(10)
        try:
            actual = load_checkpoint(folder / 'mutated', mmap=rng.random() < 0.5)
        except UsageError as error:
            assert not isinstance(error.__cause__, MemoryError), (seed, error)
            assert len(str(error).splitlines()) == 1, (seed, error)
        else:
            read_all_values(actual, set())
            loaded += 1
        signal.alarm(0)
    (folder / 'progress').write_text(f'{end_seed} {loaded}')


def run_fuzz(folder: Path, first_seed: int, end_seed: int) -> tuple[int, int]:
    code = 'import sys; sys.path[:0] = ["tests", "tests/checkpoints"]; import test_unsafe_checkpoints as tests; '
    code += f'tests.fuzz(tests.Path({str(folder)!r}), {first_seed}, {end_seed})'
    process = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True)
    last_seed, loaded = map(int, (folder / 'progress').read_text().split())
    assert process.returncode == 0, f'seed {last_seed}: exit code {process.returncode}\n{process.stderr[-2000:]}'
    return last_seed - first_seed, loaded


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='limits memory as Linux does')
def test_mutated_files_are_refused_or_read(tmp_path):
    n, loaded = run_fuzz(tmp_path, 0, 600)
    assert n == 600 and 0 < loaded < n


@pytest.mark.slow
def test_hundred_thousand_mutated_files(tmp_path):
    n, loaded = run_fuzz(tmp_path, 10_000, 130_000)
    assert n == 120_000 and 0 < loaded < n
