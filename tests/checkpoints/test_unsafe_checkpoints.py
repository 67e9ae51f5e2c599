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
    """Bytes of a pickle that push one value."""


def text(value: str) -> Op:
    content = value.encode('utf-8', 'surrogatepass')
    return Op(b'X' + struct.pack('<I', len(content)) + content)


def name(path: str) -> Op:
    return Op(b'c' + path.replace(' ', '\n').encode() + b'\n')


def number(value: int) -> Op:
    content = value.to_bytes(max(1, value.bit_length() // 8 + 1), 'little', signed=True)
    return Op(b'\x8a' + bytes([len(content)]) + content)


def several(*values: Op) -> Op:
    return Op(b'(' + b''.join(values) + b't')


def call(path: str, *args: Op) -> Op:
    return Op(name(path) + several(*args) + b'R')


def storage(numel: int, key: str = '0', kind: str = 'torch FloatStorage') -> Op:
    return Op(several(text('storage'), name(kind), text(key), text('cpu'), number(numel)) + b'Q')


def tensor(of: Op, offset: int, size: tuple, stride: tuple) -> Op:
    sizes = (several(*map(number, numbers)) for numbers in (size, stride))
    return call('torch._utils _rebuild_tensor_v2', of, number(offset), *sizes, Op(b'\x89'), Op(b'N'))


def raw(content: bytes) -> Op:
    return call('_codecs encode', text(content.decode('latin1')), text('latin1'))


def array(code: str, shape: tuple, content: bytes) -> Op:
    start = call('numpy.core.multiarray _reconstruct', name('numpy ndarray'), several(number(0)), raw(b'b'))
    dtype = call('numpy dtype', text(code))
    return Op(start + several(number(1), several(*map(number, shape)), dtype, Op(b'\x89'), raw(content)) + b'b')


def save(file: Path, value: bytes, data: bytes = bytes(16), **how) -> Path:
    """An archive as torch.save writes one, of a dict whose `state_dict` is empty and whose `meta` is the value."""
    content = b'\x80\x02}(' + text('state_dict') + b'}' + text('meta') + value + b'u.'
    with zipfile.ZipFile(file, 'w', **how) as archive:
        archive.writestr('archive/data.pkl', content)
        archive.writestr('archive/version', '3')
        archive.writestr('archive/byteorder', 'little')
        archive.writestr('archive/data/0', data)
    return file


DEEP = b'(' * 200_000 + b't' * 200_000
OBJECT = call('numpy dtype', text('O'))
# What a file asks for, and what the refusal says.
ATTACKS = {
    'a pointer as an object': (call('numpy ndarray', several(number(1)), OBJECT, raw(b'A' * 8)), 'dtype'),
    'a pointer by the state of an array': (array('O', (1,), b'A' * 8), "dtype 'O'"),
    'a pointer by a scalar': (call('numpy.core.multiarray scalar', OBJECT, raw(b'A' * 8)), "dtype 'O'"),
    'a dtype of a list': (call('numpy dtype', Op(b']' + array('f8', (1,), bytes(8)) + b'a')), 'dtype'),
    'a dtype of fields': (call('numpy dtype', text('i4,O')), 'dtype'),
    'a dtype with fields as its state': (
        call('numpy dtype', text('f8')) + several(number(3), text('<'), *[several(text('a'))] * 3) + b'b',
        'no numbers',
    ),
    'an array longer than its bytes': (array('f8', (1000,), bytes(8)), 'in 8 bytes'),
    'an array of negative length': (array('f8', (-1,), bytes(8)), 'impossible shape'),
    'the constructor of arrays': (call('numpy ndarray', several(number(2**40))), 'numpy.ndarray'),
    'text of no length': (array('U0', (2**40,), b''), "dtype 'U0'"),
    'a scalar longer than its bytes': (
        call('numpy.core.multiarray scalar', call('numpy dtype', text('f8')), raw(b'')),
        'in 0 bytes',
    ),
    'a storage beyond its record': (tensor(storage(5), 0, (5,), (1,)), 'should hold 5 values and has 16 bytes'),
    'a storage of another type': (tensor(storage(4, kind='torch DoubleStorage'), 0, (4,), (1,)), 'should hold 4'),
    'a storage that is not there': (tensor(storage(4, key='7'), 0, (4,), (1,)), 'has none'),
    'a tensor beyond its storage': (tensor(storage(4), 0, (5,), (1,)), 'larger than its storage of 4 values'),
    'an offset beyond the storage': (tensor(storage(4), 1, (4,), (1,)), 'larger than its storage'),
    'a stride beyond the storage': (tensor(storage(4), 0, (2, 2), (3, 1)), 'larger than its storage'),
    'an offset below zero': (tensor(storage(4), -1, (4,), (1,)), 'impossible shape'),
    'a stride below zero': (tensor(storage(4), 3, (4,), (-1,)), 'impossible shape'),
    'a size below zero': (tensor(storage(4), 0, (-4,), (1,)), 'impossible shape'),
    'more strides than sizes': (tensor(storage(4), 0, (4,), (1, 1)), 'impossible shape'),
    'a value repeated a trillion times': (tensor(storage(4), 0, (10**12,), (0,)), 'larger than its storage'),
    'sizes whose product overflows': (tensor(storage(4), 0, (2**40, 2**40), (0, 0)), 'larger than its storage'),
    'a tensor made by its class': (call('torch Tensor', number(2**34)), 'calls torch.Tensor'),
    'a storage made by its class': (call('torch FloatStorage', number(2**34)), 'calls StorageType'),
    'bytes by their number': (call('__builtin__ bytearray', number(2**36)), 'needs __builtin__.bytearray'),
    'a slow encoding': (call('_codecs encode', text('ä' * 100_000), text('punycode')), "encodes text as 'punycode'"),
    'a hash of deep tuples': (b'}' + DEEP + b'Ns', 'a tuple as a key'),
    'a set of deep tuples': (call('__builtin__ set', Op(b'](' + DEEP + b'e')), 'a tuple as a key'),
    'an index of the memo': (b'Nr\xff\xff\xff\x7f', None),  # stored under a large index, which costs nothing here
    'an unset index of the memo': (b'j\xff\xff\xff\x7f', 'Memo value not found'),
    'a buffer of any length': (b'\x96' + struct.pack('<Q', 2**40), 'what torch.save does not write'),
    'a function': (call('os system', text('true')), 'needs os.system'),
    'an attribute': (call('__builtin__ getattr', name('argparse Namespace'), text('__init__')), 'getattr'),
    'an attribute of a history': (
        call('__builtin__ getattr', name('mmengine.logging.history_buffer HistoryBuffer'), text('__init__')),
        'getattr',
    ),
    'a class changed by its state': (
        name('argparse Namespace') + b'}' + text('a') + b'Nsb',
        'sets the state of a GlobalName',
    ),
    'a function changed by its state': (name('_codecs encode') + b'}' + text('call') + b'Nsb', 'sets the state'),
    'a sparse tensor': (name('torch._utils _rebuild_sparse_tensor'), 'sparse tensors: give dense ones'),
    'a quantized tensor': (name('torch._utils _rebuild_qtensor'), 'quantized tensors: give weights in fp16'),
    'methods of an OrderedDict': (
        call('collections OrderedDict') + b'}' + text('items') + number(1) + b'sb',
        None,  # attributes but `_metadata` are left out
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
    for mapped in (True, False):
        with pytest.raises(UsageError, match='cannot be read safely') as error:
            load_checkpoint(file, mapped)
        assert words in str(error.value) and '\n' not in str(error.value) and len(str(error.value)) < 600


def test_views_of_larger_tensors(tmp_path):
    """Sizes, strides and offsets that lie in their storage, among them the strides of 0 of an expanded tensor."""
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    views = {'t': base.t(), 'rows': base[::2], 'part': base[1:3, 2:4], 'expanded': base[:1, :1].expand(5, 5)}
    views |= {'none': base[:0], 'number': base[1, 1], 'parameter': torch.nn.Parameter(base)}
    for legacy in (False, True):
        torch.save(views, tmp_path / 'w.pth', _use_new_zipfile_serialization=not legacy)
        for mapped in (True, False):
            actual = load_checkpoint(tmp_path / 'w.pth', mapped)
            assert all(torch.equal(actual[key], views[key]) for key in views)
            assert type(actual['parameter']) is torch.nn.Parameter and actual['parameter'].requires_grad


def everything() -> dict:
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


def same(a, b) -> bool:
    if isinstance(a, (dict, Namespace)):
        a, b = (vars(x) if isinstance(x, Namespace) else x for x in (a, b))
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a[None].view(torch.uint8).equal(b[None].view(torch.uint8))
    if isinstance(a, HistoryBuffer):
        return all(np.array_equal(x, y) for x, y in zip(a.data, b.data)) and a.mean() == b.mean()
    if isinstance(a, np.ndarray):
        native = a.dtype.newbyteorder('=')  # as numpy reads them itself
        return native == b.dtype and np.array_equal(a, b) and a.flags.f_contiguous == b.flags.f_contiguous
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize('protocol', [2, 3, 4])
@pytest.mark.parametrize('legacy', [False, True])
def test_all_checkpoint_content_is_read(tmp_path, legacy, protocol):
    file = tmp_path / 'w.pth'
    torch.save(everything(), file, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    for mapped in (True, False):
        actual = load_checkpoint(file, mapped)
        assert same(everything(), actual)
        assert actual['state_dict']._metadata == {'': {'version': 1}}


def test_pickle_protocol_5(tmp_path):
    content = {'state_dict': everything()['state_dict'], 'meta': {'epoch': 3, 'large': 2**3000, 'names': {'a', 'b'}}}
    torch.save(content, tmp_path / 'w.pth', pickle_protocol=5)
    assert same(content, load_checkpoint(tmp_path / 'w.pth'))
    torch.save({**content, 'array': np.ones(3)}, tmp_path / 'w.pth', pickle_protocol=5)
    with pytest.raises(UsageError, match=r"_frombuffer\): where you trust it: .*\['state_dict'\]"):
        load_checkpoint(tmp_path / 'w.pth')


def repacked(source: Path, target: Path, chosen=lambda entry: True, method=zipfile.ZIP_DEFLATED) -> Path:
    """The same entries, the chosen ones compressed: what unzipping and zipping again makes."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, 'w') as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), method if chosen(entry) else zipfile.ZIP_STORED)
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
    torch.save(everything(), tmp_path / 'saved.pth')
    file = repacked(tmp_path / 'saved.pth', tmp_path / 'w.pth', chosen)
    for mapped in (True, False):
        assert same(everything(), load_checkpoint(file, mapped))


def test_big_endian_archive(tmp_path):
    values = {'f4': torch.arange(4.0), 'i8': torch.arange(4), 'u1': torch.arange(4, dtype=torch.uint8)}
    torch.save(values, tmp_path / 'saved.pth')
    with zipfile.ZipFile(tmp_path / 'saved.pth') as old, zipfile.ZipFile(tmp_path / 'w.pth', 'w') as new:
        sizes = dict(zip(('data/0', 'data/1', 'data/2'), (4, 8, 1)))
        for entry in old.infolist():
            content = b'big' if entry.filename.endswith('byteorder') else old.read(entry)
            size = sizes.get(entry.filename.split('/', 1)[1], 1)
            new.writestr(entry.filename, b''.join(content[i : i + size][::-1] for i in range(0, len(content), size)))
    assert all(torch.equal(tensor, values[key]) for key, tensor in load_checkpoint(tmp_path / 'w.pth').items())


@pytest.mark.parametrize('word', [b'little\n', b'middle', b''])
def test_unknown_byte_order_is_refused(tmp_path, word):
    torch.save({'a': torch.ones(4)}, tmp_path / 'saved.pth')
    with zipfile.ZipFile(tmp_path / 'saved.pth') as old, zipfile.ZipFile(tmp_path / 'w.pth', 'w') as new:
        for entry in old.infolist():
            new.writestr(entry.filename, word if entry.filename.endswith('byteorder') else old.read(entry))
    with pytest.raises(UsageError, match='neither little nor big'):
        load_checkpoint(tmp_path / 'w.pth')


def damaged(file: Path, change) -> Path:
    content = bytearray(file.read_bytes())
    change(content)
    file.write_bytes(content)
    return file


def local_header(content: bytearray, record: bytes) -> int:
    return content.index(b'PK\x03\x04', content.index(record) - 64)


def central_header(content: bytearray, record: bytes) -> int:
    return content.rindex(b'PK\x01\x02', 0, content.rindex(record))


def put(content: bytearray, at: int, form: str, value: int) -> None:
    struct.pack_into(form, content, at, value)


HEADERS_THAT_LIE = {
    'the method of compression': lambda c: put(c, local_header(c, b'archive/data/0') + 8, '<H', 8),
    'the name': lambda c: put(c, local_header(c, b'archive/data/0') + 30, '<B', 65),
    'the place': lambda c: put(c, central_header(c, b'archive/data/0') + 42, '<I', 0),
    'a place beyond the file': lambda c: put(c, central_header(c, b'archive/data/0') + 42, '<I', 2**31),
    'the size': lambda c: put(c, central_header(c, b'archive/data/0') + 24, '<I', 32),
    'both sizes': lambda c: [put(c, central_header(c, b'archive/data/0') + i, '<I', 2**31) for i in (20, 24)],
    'encryption': lambda c: put(c, central_header(c, b'archive/data/0') + 8, '<H', 1),
    'the sum': lambda c: put(c, central_header(c, b'archive/data/0') + 16, '<I', 1),
}


@pytest.mark.parametrize('lie', HEADERS_THAT_LIE)
def test_contradictory_zip_headers_are_refused(tmp_path, lie):
    file = damaged(save(tmp_path / 'w.pth', tensor(storage(4), 0, (4,), (1,))), HEADERS_THAT_LIE[lie])
    with pytest.raises(UsageError, match='cannot be read safely'):
        load_checkpoint(file)


def test_archives_of_other_content_are_refused(tmp_path):
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


# Imports in the child alone, as a limit on memory has to come after what imports take.
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


def read_within(file: Path, memory: int) -> subprocess.CompletedProcess:
    command = [sys.executable, '-c', LIMITED, file, str(memory)]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120)


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='limits memory as Linux does')
@pytest.mark.parametrize('record', ['archive/data.pkl', 'archive/data/0'])
def test_zip_bomb_is_refused(tmp_path, record):
    file = save(tmp_path / 'w.pth', tensor(storage(2**28), 0, (2**28,), (1,)), compression=zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / 'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            if entry.filename != record:
                new.writestr(entry.filename, old.read(entry))
        with new.open(record, 'w', force_zip64=True) as content:
            for _ in range(64):
                content.write(bytes(2**24))
    done = read_within(tmp_path / 'bomb.pth', 2**28)
    assert done.returncode == 1 and 'it unpacks to 1,024 MiB, the limit is 256' in done.stderr


# ---- mutated files --------------------------------------------------------------------------------------------------


def small_files(folder: Path) -> list[Path]:
    """A checkpoint of each container, with everything that checkpoints hold but in a few hundred bytes of values."""
    from safetensors.torch import save_file

    content, weights = everything(), {f'stages.0.0.{n}': torch.randn(4, 4) for n in 'ab'}
    torch.save(content, folder / 'zip.pth')
    torch.save(weights, folder / 'weights.pth')
    torch.save(content, folder / 'legacy.pth', _use_new_zipfile_serialization=False)
    repacked(folder / 'zip.pth', folder / 'deflated.pth')
    with zipfile.ZipFile(folder / 'stored.pth', 'w') as new, zipfile.ZipFile(folder / 'zip.pth') as old:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    save_file(weights, folder / 'w.safetensors')
    torch.save(content, folder / 'protocol4.pth', pickle_protocol=4)
    torch.save(content, folder / 'legacy4.pth', pickle_protocol=4, _use_new_zipfile_serialization=False)
    torch.save({'state_dict': weights, 'meta': {'n': 2**3000, 'names': {'a'}}}, folder / 'last.pth', pickle_protocol=5)
    names = ['zip', 'weights', 'legacy', 'deflated', 'stored', 'protocol4', 'legacy4', 'last']
    return [*(folder / f'{name}.pth' for name in names), folder / 'w.safetensors']


LATER = b'\x8c', b'\x8d', b'\x8e', b'\x8f', b'\x90', b'\x91', b'\x92', b'\x93', b'\x94', b'\x95'  # of protocol 4


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut, doubled, moved, and replaced by numbers that are lengths and indices elsewhere."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        if not content:
            break
        at, kind = draw.randrange(len(content)), draw.randrange(7)
        if kind == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[at] = draw.randrange(256)
        elif kind == 2:
            del content[at : at + draw.choice((1, 2, 4, 8, 64))]
        elif kind == 3:
            content[at:at] = content[at : at + draw.choice((1, 2, 8, 64))]
        elif kind == 4:
            other = draw.randrange(len(content))
            content[at : at + 8] = content[other : other + draw.choice((1, 4, 8, 32))]
        elif kind == 5:
            form, value = draw.choice((('<I', 2**31 - 1), ('<I', 2**32 - 1), ('<Q', 2**62), ('<I', 2**28), ('<I', 0)))
            new = struct.pack(form, value)
            content[at : at + len(new)] = new
        else:  # an opcode of pickles
            content[at : at + 1] = draw.choice(
                (b'R', b'b', b'\x81', b'Q', b'r', b'j', b'u', b'(', b't', b'0', b'\x96', b'.', *LATER)
            )
    return bytes(content)


def mutated_file(file: Path, draw: random.Random) -> bytes:
    """A mutated file: of archives mostly one entry within sound headers and sums, behind which the pickle is read."""
    if not zipfile.is_zipfile(file) or draw.random() < 0.2:
        return mutated(file.read_bytes(), draw)
    target = io.BytesIO()
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(target, 'w') as new:
        entries = old.infolist()
        chosen = (
            next(e for e in entries if e.filename.endswith('data.pkl')) if draw.random() < 0.9 else draw.choice(entries)
        )
        for entry in entries:
            content = old.read(entry)
            new.writestr(entry.filename, mutated(content, draw) if entry is chosen else content, entry.compress_type)
    return target.getvalue()


def touch(value, seen: set) -> None:
    """Use all that was read: every value of every tensor and array."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        value.detach().clone().reshape(-1).to(torch.complex64 if value.is_complex() else torch.float64).sum()
    elif isinstance(value, np.ndarray):
        assert value.dtype.kind in 'biufcSU' and value.nbytes < 2**24
        value.copy().tobytes()
    elif isinstance(value, (dict, Namespace)):
        for item in (vars(value) if isinstance(value, Namespace) else value).items():
            touch(item, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            touch(item, seen)
    elif isinstance(value, HistoryBuffer):
        touch(list(value.data), seen)


def fuzz(folder: Path, first: int, last: int) -> None:
    """Read mutated files in this process, within its limits. Its progress is in the file `progress`."""
    import resource
    import signal

    torch.set_num_threads(1)
    files = small_files(folder)
    for file in files:  # all that is allocated once is there before the limit
        touch(load_checkpoint(file), set())
    status = Path('/proc/self/status').read_text()
    used = int(next(line for line in status.splitlines() if line.startswith('VmSize')).split()[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)
    loaded = 0
    for seed in range(first, last):
        draw = random.Random(seed)
        (folder / 'progress').write_text(f'{seed} {loaded}')
        (folder / 'mutated').write_bytes(mutated_file(files[seed % len(files)], draw))
        signal.alarm(10)
        try:
            actual = load_checkpoint(folder / 'mutated', mmap=draw.random() < 0.5)
        except UsageError as error:
            assert not isinstance(error.__cause__, MemoryError), (seed, error)
            assert len(str(error).splitlines()) == 1, (seed, error)
        else:
            touch(actual, set())
            loaded += 1
        signal.alarm(0)
    (folder / 'progress').write_text(f'{last} {loaded}')


def run_fuzz(folder: Path, first: int, last: int) -> tuple[int, int]:
    code = 'import sys; sys.path[:0] = ["tests", "tests/checkpoints"]; import test_unsafe_checkpoints as tests; '
    code += f'tests.fuzz(tests.Path({str(folder)!r}), {first}, {last})'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, text=True, capture_output=True)
    reached, loaded = map(int, (folder / 'progress').read_text().split())
    assert done.returncode == 0, f'seed {reached}: exit code {done.returncode}\n{done.stderr[-2000:]}'
    return reached - first, loaded


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='limits memory as Linux does')
def test_mutated_files_are_refused_or_read(tmp_path):
    n, loaded = run_fuzz(tmp_path, 0, 600)
    assert n == 600 and 0 < loaded < n


@pytest.mark.slow
def test_hundred_thousand_mutated_files(tmp_path):
    n, loaded = run_fuzz(tmp_path, 10_000, 130_000)
    assert n == 120_000 and 0 < loaded < n
