"""Refuse programs of torch.export that could run code: torch unpickles them, and looks up any name in its modules."""

import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from io import BytesIO

import torch

from ..errors import UsageError

MAX_PROGRAM_BYTES = 512 << 20
# What a node may call: registered operators, and arithmetic of sizes.
TARGET = re.compile(
    r'torch\.ops\.((aten|prims|prim|torchvision|convnext_dense)\.\w+(\.\w+)?'
    r'|higher_order\.(cond|while_loop|scan|wrap_with_set_grad_enabled|wrap_with_autocast))'
    r'|torch\._?sym_\w+|math\.\w+'
    r'|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|pos|ge|gt|le|lt|eq|ne|and_|or_|not_|getitem)'
)
PLAIN_MEMBER = re.compile(r'data/(weights/weight_|constants/tensor_)|extra/|\.data/|archive_|byteorder$|version$')
# torch evaluates these as Python: numbers, symbols, arithmetic and calls of sympy's functions, and no attribute.
EXPRESSION = re.compile(r'((?!__)[\w\s+\-*/%(),<>=!&|~]|(?<=\d)\.(?=\d))*')
SIZE_OF_INPUT = re.compile(r"L(\['\w+'\]|\[\d+\])+(\.size\(\)\[\d+\])?")  # in guards, which become Python too
SPEC = re.compile(r'([\w\s\[\]{},:.-]|\\*")*')  # of the inputs and outputs: types and names
FUNCTIONS = re.compile(r'([A-Za-z_]\w*)\s*\(')
KNOWN_FUNCTIONS = {
    *('Max', 'Min', 'Mod', 'Pow', 'Eq', 'Ne', 'Abs', 'And', 'Or', 'Not', 'Piecewise', 'ceiling', 'floor', 'Integer'),
    *('FloorDiv', 'CleanDiv', 'CeilDiv', 'PythonMod', 'ModularIndexing', 'TruncToInt', 'TruncToFloat', 'ToFloat'),
    *('CeilToInt', 'FloorToInt', 'RoundToInt', 'IntTrueDiv', 'FloatTrueDiv', 'PowByNatural', 'FloatPow', 'Where'),
    *('Identity', 'IsNonOverlappingAndDenseIndicator', 'LShift', 'RShift', 'Symbol', 'Add', 'Mul', 'Float', 'Rational'),
    *('GreaterThan', 'LessThan', 'StrictGreaterThan', 'StrictLessThan', 'Equality', 'Unequality', 'and', 'or', 'not'),
}


def check_pt2(path: str) -> None:
    """Raise UsageError if loading a file of torch.export could run code.

    Args:
        path: Path of the file. It may contain tensors, graphs of registered operators, size expressions, and example
            inputs that `torch.load(weights_only=True)` can read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            reason = next(_dangers(archive), None)
    except (zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, RuntimeError, RecursionError) as error:
        raise UsageError(f'{path} is not a torch.export file, or is truncated: export or copy it again') from error
    if reason:
        reason = ' '.join(reason[:200].split())
        raise UsageError(f'{path} is not loaded, since it could run code ({reason}): export the model yourself')


def _dangers(archive: zipfile.ZipFile) -> Iterator[str]:
    names = archive.namelist()
    if not any(re.search(r'(^|/)models/[^/]+\.json$', name) for name in names):
        raise ValueError('no program')
    for name in names:
        base = name.partition('/')[2] or name
        if re.match(r'(data/(weights|constants)/)?.*\.json$', base) and base.startswith(('models/', 'data/')):
            yield from _dangers_of_json(_read_json(archive, name))
        elif base.startswith('data/sample_inputs/'):
            yield from _dangers_of_pickle(archive, name)
        elif not PLAIN_MEMBER.match(base):
            yield f'it contains {base}'


def _read_json(archive: zipfile.ZipFile, name: str) -> object:
    if archive.getinfo(name).file_size > MAX_PROGRAM_BYTES:
        raise ValueError('too large for a program')
    return json.loads(archive.read(name))


def _dangers_of_pickle(archive: zipfile.ZipFile, name: str) -> Iterator[str]:
    content = archive.read(name)
    try:
        if content:
            torch.load(BytesIO(content), weights_only=True)
    except Exception:
        yield f'{name} is a pickle'


def _dangers_of_json(value: object) -> Iterator[str]:
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, dict):
            stack += value.values()
            for key, item in value.items():
                if reason := _danger(key, item):
                    yield reason
        elif isinstance(value, list):
            stack += value


def _danger(key: str, item: object) -> str | None:
    if key == 'use_pickle' and item:
        return 'it contains pickles'
    if key == 'target' and isinstance(item, str) and not TARGET.fullmatch(item):
        return f'it calls {item}'
    if key in ('as_custom_obj', 'as_operator') and item:
        return f'it contains {key}'
    if key in EVALUATED:
        for text in item if isinstance(item, list) else [item]:
            if not EVALUATED[key](text):
                return f'it evaluates {text}'
    return None


def _is_expression(item: object) -> bool:
    if not isinstance(item, str) or len(item) > 100_000:
        return False
    item = re.sub(r"Symbol\('\w+'", 'Symbol(', item)
    return bool(EXPRESSION.fullmatch(item)) and set(FUNCTIONS.findall(item)) <= KNOWN_FUNCTIONS


def _is_guard(item: object) -> bool:
    return isinstance(item, str) and _is_expression(SIZE_OF_INPUT.sub('0', item))


def _is_spec(item: object) -> bool:
    return isinstance(item, str) and bool(SPEC.fullmatch(item))


# Key -> whether a text is nothing but what belongs there.
EVALUATED = {'expr_str': _is_expression, 'guards_code': _is_guard, 'in_spec': _is_spec, 'out_spec': _is_spec}
