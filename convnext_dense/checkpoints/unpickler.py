"""Read the pickle inside a checkpoint without trusting it.

`torch.load(weights_only=True)` does not run code from a file either, but it calls a list of functions with arguments
from the file: `bytearray(2**40)`, `_codecs.encode(text, 'punycode')` in quadratic time, a storage with more bytes than
the file, and, with the classes that mmengine needs, a NumPy dtype made of an array of forged pointers. Here, every name
in a file maps to a function of this module that checks its arguments before torch or NumPy sees them, and only the
opcodes of plain values, which `torch.save` writes with any protocol, are supported.
"""

import io
import pickle
import re
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

# Opcodes of protocol 2, the default of torch.save, and of later protocols.
OPCODES = """
    PROTO STOP GLOBAL REDUCE BUILD NEWOBJ BINPERSID MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1
    BINFLOAT BINUNICODE BINSTRING SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS
    EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT BINGET LONG_BINGET
    BINBYTES SHORT_BINBYTES FRAME MEMOIZE STACK_GLOBAL SHORT_BINUNICODE BINUNICODE8 BINBYTES8 EMPTY_SET ADDITEMS LONG4
"""
# Hint for files with objects of unknown classes; it runs code from the file.
OBJECT_FIX = "where you trust it: torch.save(torch.load('{{file}}', weights_only=False){part}, 'weights.pth')"
KEYS_OF_WEIGHTS = ('state_dict', 'model', 'model_state_dict', 'net', 'weights')
KEYS = (str, int, float, bool, bytes, type(None))  # types of dict keys; hashing nested tuples overflows the stack
MAX_EXPANSION = 2**20  # elements that a tensor may have beyond its storage, as in views from `Tensor.expand`
MAX_SIZE = 2**48  # limit of a dimension, a stride or an offset
NUMBERS_AND_TEXT = re.compile(r'[biufc](1|2|4|8|16)|[SU][1-9]\d{0,5}')  # NumPy typecodes


class UnsafeCheckpointError(pickle.UnpicklingError):
    """A checkpoint requests anything that weights do not need, or contradicts itself.

    Attributes:
        fix (str, optional): Hint that makes the file readable, if one is known, with {file} for its path.
    """

    def __init__(self, message: str, fix: str | None = None):
        super().__init__(message)
        self.fix = fix


@dataclass(frozen=True, eq=False)
class GlobalName:
    """Meaning of a global name in the file.

    Attributes:
        path (str): Module and name in the file.
        call (Callable, optional): Function that checks its arguments and builds a value; None if calls are refused.
        new (Callable, optional): Function that builds an empty object whose state follows; None if that is refused.
        allowed (Callable, optional): The class or function itself, if the user allows it with
            `torch.serialization.add_safe_globals`.
    """

    path: str
    call: Callable | None = None
    new: Callable | None = None
    allowed: Callable | None = None


@dataclass(frozen=True, eq=False)
class StorageType:
    """A storage class of torch, by the dtype of its elements."""

    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Storage:
    """A storage in the file. `data` is None while the reader only collects which storages a file needs."""

    dtype: torch.dtype
    data: torch.UntypedStorage | None


class DType:
    """A NumPy dtype of numbers or fixed-length text."""

    __slots__ = ('dtype',)

    def __init__(self, code: str, *_):
        if not isinstance(code, str) or not NUMBERS_AND_TEXT.fullmatch(code):
            raise UnsafeCheckpointError(f'it holds numpy values of dtype {str(code)[:40]!r}')
        self.dtype = np.dtype(code)


class Unpickler(pickle._Unpickler):
    """Python's unpickler for a few opcodes and names. The C version would allocate memory for any memo index.

    Args:
        file: A BytesIO or an mmap.
        find_storage: Function from the arguments of a persistent id of torch to a `Storage`.
    """

    def __init__(self, file, find_storage: Callable[..., Storage]):
        super().__init__(file, encoding='utf-8')
        self.file, self.find_storage = file, find_storage
        self.user_names = _user_allowed_globals()

    def load(self):
        """Return the object in the file."""
        try:
            return super().load()
        except KeyError as error:  # from the dispatch table or the memo
            raise UnsafeCheckpointError(f'its pickle holds what torch.save does not write: {error}') from error

    def find_class(self, module: str, name: str):
        """Return the meaning of a global name in the file."""
        path = f'{module}.{name}'
        known = NAMES.get(path, self.user_names.get(path))
        if known is None and path in UNSUPPORTED:
            raise UnsafeCheckpointError(f'it holds {UNSUPPORTED[path]}')
        if known is None:
            is_top_level = not self.stack and not self.metastack
            raise UnsafeCheckpointError(
                f'it {"is" if is_top_level else "needs"} {path}',
                OBJECT_FIX.format(part='.state_dict()' if is_top_level else self._key()),
            )
        return known

    def _key(self) -> str:
        """Guess the index expression that leads to the weights in the file, from the strings in it."""
        content = self.file.getvalue() if isinstance(self.file, io.BytesIO) else self.file
        for key in KEYS_OF_WEIGHTS:
            sizes = b'X' + len(key).to_bytes(4, 'little'), b'\x8c' + len(key).to_bytes(1, 'little')
            if any(content.find(size + key.encode()) >= 0 for size in sizes):
                return f'[{key!r}]'
        return '[KEY_OF_ITS_WEIGHTS]'

    def persistent_load(self, pid):
        """Return the storage for a persistent id."""
        if type(pid) is not tuple or len(pid) < 5 or pid[0] != 'storage' or type(pid[1]) is not StorageType:
            raise UnsafeCheckpointError('it refers to something that is no storage')
        return self.find_storage(*pid[1:])

    def load_reduce(self):
        """Call a known function."""
        args, name = self.stack.pop(), self.stack.pop()
        if type(name) is not GlobalName or name.call is None or type(args) is not tuple:
            raise UnsafeCheckpointError(f'it calls {getattr(name, "path", type(name).__name__)}')
        self.append(name.call(*args))

    def load_newobj(self):
        """Build an empty object of a known class."""
        args, name = self.stack.pop(), self.stack.pop()
        if type(name) is not GlobalName or name.new is None or type(args) is not tuple:
            raise UnsafeCheckpointError(f'it builds {getattr(name, "path", type(name).__name__)}')
        self.append(name.new(*args))

    def load_build(self):
        """Set the state of an object of a known class."""
        state, built = self.stack.pop(), self.stack[-1]
        if type(built) in FILL:
            FILL[type(built)](built, state)
        elif any(type(built) is name.allowed for name in self.user_names.values()):
            self.stack.append(state)
            super().load_build()
        else:
            raise UnsafeCheckpointError(f'it sets the state of a {type(built).__name__}')

    def load_additems(self):
        """Add items to a set."""
        items = self.pop_mark()
        _expect(self.stack[-1], set).update(_hashable(items))

    def load_append(self):
        """Append an item to a list."""
        value = self.stack.pop()
        _expect(self.stack[-1], list).append(value)

    def load_appends(self):
        """Append items to a list."""
        values = self.pop_mark()
        _expect(self.stack[-1], list).extend(values)

    def load_setitem(self):
        """Set an item of a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [(key, value)])

    def load_setitems(self):
        """Set items of a dict."""
        items = self.pop_mark()
        _set_items(self.stack[-1], zip(items[::2], items[1::2], strict=True))


OVERRIDDEN_OPCODES = (
    'reduce newobj build additems append appends setitem setitems'  # opcodes that Unpickler handles in its own way
)
Unpickler.dispatch = {
    getattr(pickle, code)[0]: pickle._Unpickler.dispatch[getattr(pickle, code)[0]] for code in OPCODES.split()
}
Unpickler.dispatch |= {
    getattr(pickle, code.upper())[0]: getattr(Unpickler, f'load_{code}') for code in OVERRIDDEN_OPCODES.split()
}


def _user_allowed_globals() -> dict[str, GlobalName]:
    allowed_globals = {}
    for entry in getattr(torch.serialization, 'get_safe_globals', list)():  # torch 2.5 and later
        allowed, path = entry if isinstance(entry, tuple) else (entry, f'{entry.__module__}.{entry.__qualname__}')
        if path.startswith('torch.'):  # torch registers rebuild functions of nested tensors by itself
            continue
        new = _new(allowed) if isinstance(allowed, type) else None
        allowed_globals[path] = GlobalName(path, allowed, new, allowed)
    return allowed_globals


def _expect(value, kind):
    if type(value) is not kind:
        raise UnsafeCheckpointError(f'it holds a {type(value).__name__} where a {kind.__name__} is due')
    return value


def _set_items(target: object, items: Iterable[tuple]) -> None:
    if type(target) not in (dict, OrderedDict):
        _expect(target, dict)
    for key, value in items:
        parts = key if type(key) is tuple else (key,)
        if not all(type(part) in KEYS or isinstance(part, np.generic) for part in parts):
            raise UnsafeCheckpointError(f'it has a {type(key).__name__} as a key')
        target[key] = value


def _hashable(values: object) -> list:
    values = list(_expect(values, list))
    _set_items({}, ((value, None) for value in values))
    return values


def _ordered_dict(items: list = ()) -> OrderedDict:
    ordered = OrderedDict()
    _set_items(ordered, ((key, value) for key, value in items))
    return ordered


def _encode(text: str, encoding: str) -> bytes:
    """Decode bytes in the form of pickle protocol 2."""
    if encoding != 'latin1':
        raise UnsafeCheckpointError(f'it encodes text as {str(encoding)[:40]!r}')
    return _expect(text, str).encode('latin1')


def _method_name(owner: object, name: str) -> None:
    """Replace `getattr`, with which an mmengine HistoryBuffer refers to its own methods; it has them anyway."""
    if owner is not NAMES[HISTORY] or name not in STATISTICS:
        raise UnsafeCheckpointError(f'it calls getattr for {str(name)[:40]!r}')


# ---- torch ----------------------------------------------------------------------------------------------------------


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> torch.Tensor | None:
    """Build a tensor within its storage, as `torch._utils._rebuild_tensor_v2` does."""
    dtype = _expect(storage, Storage).dtype
    return _tensor_of_dtype(storage, offset, size, stride, requires_grad, hooks, dtype, metadata)


def _tensor_of_dtype(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> torch.Tensor | None:
    """Build a tensor of a dtype without a storage class, as `torch._utils._rebuild_tensor_v3` does."""
    _expect(storage, Storage)
    numbers = [offset, *size, *stride]
    if metadata:
        raise UnsafeCheckpointError(
            'it holds a conjugate or negative view: save it after resolve_conj(), resolve_neg()'
        )
    if not all(type(n) is int and 0 <= n < MAX_SIZE for n in numbers) or len(size) != len(stride):
        raise UnsafeCheckpointError('it holds a tensor of an impossible shape')
    if storage.data is None:
        return None
    num_values = storage.data.nbytes() // dtype.itemsize
    last_index = offset + sum((n - 1) * s for n, s in zip(size, stride))
    if (last_index >= num_values and 0 not in size) or prod(size) > max(num_values, MAX_EXPANSION):
        raise UnsafeCheckpointError(
            f'a tensor of shape {tuple(size)} is larger than its storage of {num_values} values'
        )
    tensor = torch.empty(0, dtype=dtype).set_(storage.data, offset, size, stride)
    tensor.requires_grad = bool(requires_grad) and dtype.is_floating_point
    return tensor


def _parameter(data: torch.Tensor | None, requires_grad, hooks, state=None) -> torch.nn.Parameter | None:
    if data is None:
        return None
    return torch.nn.Parameter(_expect(data, torch.Tensor).detach(), bool(requires_grad) and data.is_floating_point())


def _tensor_with_attributes(function: GlobalName, kind: GlobalName, args: tuple, state: object) -> torch.Tensor | None:
    """Build a plain tensor or parameter with custom attributes, which are dropped."""
    if kind not in (NAMES['torch.Tensor'], NAMES['torch.nn.parameter.Parameter']):
        raise UnsafeCheckpointError('it holds tensors of a class of their own')
    return _expect(function, GlobalName).call(*args)


# ---- numpy and mmengine ---------------------------------------------------------------------------------------------


def _empty_array(kind: GlobalName, shape: tuple, code: bytes) -> np.ndarray:
    """Build an array whose state follows, as `numpy.core.multiarray._reconstruct` does."""
    if kind is not NAMES['numpy.ndarray']:
        raise UnsafeCheckpointError('it holds numpy arrays of a class of their own')
    return np.empty(0)


def _raw(dtype: DType, content: object) -> bytes:
    _expect(dtype, DType)
    return content.encode('latin1') if type(content) is str else _expect(content, bytes)


def _fill_array(array: np.ndarray, state: tuple) -> None:
    _, shape, dtype, fortran, content = state
    content = _raw(dtype, content)
    if not all(type(n) is int and 0 <= n < MAX_SIZE for n in shape) or len(shape) > 32:
        raise UnsafeCheckpointError('it holds a numpy array of an impossible shape')
    if prod(shape) * dtype.dtype.itemsize != len(content):
        raise UnsafeCheckpointError(f'it holds a numpy array of shape {shape} in {len(content)} bytes')
    array.__setstate__((1, tuple(shape), dtype.dtype, bool(fortran), content))


def _fill_dtype(dtype: DType, state: tuple) -> None:
    _, order, *parts = state
    if order not in ('<', '>', '|', '=') or any(part is not None for part in parts[:3]):
        raise UnsafeCheckpointError('it holds numpy values that are no numbers')
    if order in '<>':
        dtype.dtype = dtype.dtype.newbyteorder(order)


def _scalar(dtype: DType, content: object) -> np.generic:
    content = _raw(dtype, content)
    if len(content) != dtype.dtype.itemsize:
        raise UnsafeCheckpointError(f'it holds a numpy value of {dtype.dtype} in {len(content)} bytes')
    return np.frombuffer(content, dtype.dtype)[0]


def _fill_history(history: HistoryBuffer, state: dict) -> None:
    """Fill the history of a logged value; the methods that the file registers with it are dropped."""
    values, counts = (_expect(state[key], np.ndarray) for key in ('_log_history', '_count_history'))
    if any(array.ndim != 1 or array.dtype.kind not in 'biuf' for array in (values, counts)):
        raise UnsafeCheckpointError('it holds a history of values that are no numbers')
    history.__init__(values, counts, max(_expect(state['max_length'], int), len(values), 1))


def _fill_namespace(namespace: Namespace, state: dict) -> None:
    vars(namespace).update((_expect(key, str), value) for key, value in _expect(state, dict).items())


def _fill_ordered_dict(ordered: OrderedDict, state: dict) -> None:
    """Keep the versions of modules, which `Module.state_dict` stores next to the tensors."""
    metadata = _expect(state, dict).get('_metadata')
    if isinstance(metadata, dict):
        ordered._metadata = metadata


def _new(kind: type) -> Callable[..., object]:
    return lambda *args: kind.__new__(kind, *args)


# Contents of checkpoints of torch, mmengine and the original code, by the names in their pickles.
HISTORY = 'mmengine.logging.history_buffer.HistoryBuffer'
STATISTICS = ('min', 'max', 'current', 'mean')
FUNCTIONS = {
    'collections.OrderedDict': _ordered_dict,
    'collections.Counter': lambda counts: Counter(_expect(counts, dict)),
    '__builtin__.set': lambda values=(): set(_hashable(list(values))),
    '__builtin__.complex': lambda real, imag: complex(_expect(real, float), _expect(imag, float)),
    '__builtin__.getattr': _method_name,
    '_codecs.encode': _encode,
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_tensor_v3': _tensor_of_dtype,
    'torch._utils._rebuild_parameter': _parameter,
    'torch._utils._rebuild_parameter_with_state': _parameter,
    'torch._tensor._rebuild_from_type_v2': _tensor_with_attributes,
    'torch.Size': lambda values: torch.Size([_expect(value, int) for value in values]),
    'torch.device': torch.device,
    'numpy.dtype': DType,
}
FUNCTIONS |= {f'numpy.{core}.multiarray._reconstruct': _empty_array for core in ('core', '_core')}
FUNCTIONS |= {f'numpy.{core}.multiarray.scalar': _scalar for core in ('core', '_core')}
FUNCTIONS |= {path.replace('__builtin__', 'builtins'): function for path, function in FUNCTIONS.items()}
# Objects whose state follows. Namespace: arguments that the original training code saves next to the weights.
OBJECTS = {HISTORY: HistoryBuffer, 'argparse.Namespace': Namespace}
CLASSES = ('torch.Tensor', 'torch.nn.parameter.Parameter', 'numpy.ndarray')
CLASSES += tuple(f'{HISTORY}.{name}' for name in STATISTICS)  # their names in pickle protocol 4
STORAGES = dict(
    Double=torch.float64, Float=torch.float32, Half=torch.float16, BFloat16=torch.bfloat16, Long=torch.int64,
    Int=torch.int32, Short=torch.int16, Char=torch.int8, Byte=torch.uint8, Bool=torch.bool,
    ComplexFloat=torch.complex64, ComplexDouble=torch.complex128,
)  # fmt: skip
DTYPES = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
QUANTIZED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}

NAMES: dict[str, object] = {
    **{path: GlobalName(path) for path in CLASSES},
    **{path: GlobalName(path, call=function) for path, function in FUNCTIONS.items()},
    **{path: GlobalName(path, new=_new(kind)) for path, kind in OBJECTS.items()},
    **{f'torch.{name}Storage': StorageType(dtype) for name, dtype in STORAGES.items()},
    'torch.storage.UntypedStorage': StorageType(torch.uint8),
    **{str(dtype): dtype for dtype in DTYPES - QUANTIZED},
}
FILL = {
    np.ndarray: _fill_array,
    DType: _fill_dtype,
    HistoryBuffer: _fill_history,
    Namespace: _fill_namespace,
    OrderedDict: _fill_ordered_dict,
}
QUANTIZED_FIX = 'quantized tensors: give weights in fp16 to fp64'
UNSUPPORTED = {f'torch.{name}Storage': QUANTIZED_FIX for name in ('QInt8', 'QUInt8', 'QInt32', 'QUInt4x2', 'QUInt2x4')}
UNSUPPORTED |= {
    'torch._utils._rebuild_qtensor': QUANTIZED_FIX,
    'torch._utils._rebuild_sparse_tensor': 'sparse tensors: give dense ones',
    'torch._utils._rebuild_meta_tensor_no_storage': 'tensors of the meta device, which have no values',
}
