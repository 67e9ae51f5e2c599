"""Every entry point of the C files: sizes at the edges, whose outputs are complete, and arguments that are refused.

What the kernels compute is tested in the other files of this folder, and memory under sanitizers in test_sanitizers.py.
"""

import ctypes
from functools import partial

import pytest
import torch

from convnext_dense.ops import avx512, head_kernels
from helpers.kernel_calls import (
    CALLS,
    MODULES,
    edge_calls,
    exported_functions,
    invalid_changes,
    is_available,
    load,
    run,
)

NAMES = [
    pytest.param(name, marks=pytest.mark.skipif(not is_available(name), reason=f'{name} is not for this machine'))
    for name in MODULES
]
HEAD_KERNELS = 'head_kernels_avx512' if is_available('head_kernels_avx512') else 'head_kernels_avx2'
needs_avx512 = pytest.mark.skipif(not is_available('avx512_kernels'), reason='the kernels are not for this machine')
needs_head_kernels = pytest.mark.skipif(not is_available(HEAD_KERNELS), reason='the kernels are not for this machine')
# What the library exports besides kernels and the functions that plan their workspaces.
OTHERS = {
    avx512: {'init_tables', 'run_queue', 'error_message', 'describe_struct', 'struct_size', 'source'},
    head_kernels: {'nms', 'head_error_message', 'head_struct_size', 'head_source'},
}


@pytest.fixture(params=NAMES)
def library(request):
    torch.manual_seed(0)
    return load(request.param)


@pytest.fixture
def module(request, library):
    return MODULES[request.node.callspec.params['library']]


def error_message(library, code: int) -> bytes:
    message = getattr(library, 'convnext_head_error_message', None) or library.convnext_error_message
    return message(ctypes.c_int64(code))


def is_refused(library, code: int) -> bool:
    return error_message(library, code) not in (b'success', b'unknown error')


def test_every_entry_point_is_tested(module, library):
    entries = {call.entry for call in edge_calls(library, module)}
    workspaces = {f'{entry}_workspace' for entry in entries} & exported_functions(module)
    assert exported_functions(module) == entries | workspaces | {f'convnext_{name}' for name in OTHERS[module]}
    assert entries == {f'convnext_{kernel}' for kernel in module.KERNELS}
    assert all(hasattr(library, name) for name in exported_functions(module))


def test_outputs_at_the_edges_are_complete_and_finite(module, library):
    for call in edge_calls(library, module):
        assert run(library, call) == 0, call
        assert all(t.isfinite().all() for t in call.outputs), call


def test_invalid_fields_are_refused(module, library):
    for make in CALLS[module]:
        for backward in (False, True):
            call = make(library, backward)
            assert run(library, call) == 0
            for field, value, word in invalid_changes(call):
                valid = getattr(call.args, field)
                setattr(call.args, field, value)
                message = error_message(library, run(library, call))
                assert message not in (b'success', b'unknown error'), (call.entry, field, value)
                assert word.encode() in message, (call.entry, field, value, message)
                workspace_bytes = getattr(library, f'{call.entry}_workspace', None)
                if field in ('version', 'threads', 'images', 'channels') and workspace_bytes:
                    assert is_refused(library, -workspace_bytes(ctypes.byref(call.args))), (call.entry, field, value)
                setattr(call.args, field, valid)
            assert run(library, call) == 0


def test_null_and_misaligned_structs_are_refused(module, library):
    for call in edge_calls(library, module):
        moved = (ctypes.c_char * (ctypes.sizeof(call.args) + 8))()
        ctypes.memmove(ctypes.addressof(moved) + 4, ctypes.byref(call.args), ctypes.sizeof(call.args))
        for name in filter(partial(hasattr, library), (call.entry, f'{call.entry}_workspace')):
            function = getattr(library, name)
            codes = [function(None), function(ctypes.c_void_p(ctypes.addressof(moved) + 4))]
            assert [error_message(library, abs(code))[:14] for code in codes] == [b'a pointer is n', b'a pointer is m']


@pytest.mark.parametrize(
    'field, value',
    [
        *(('height', v) for v in (0, -1, 1 << 40)),
        *(('width', v) for v in (0, -1, 1 << 40)),
        *(('data', v) for v in (None, 'misaligned')),
        *(('scale', v) for v in (0.0, -1.0, float('nan'))),
    ],
)
@needs_head_kernels
@pytest.mark.parametrize('level', [0, 1])
def test_invalid_levels_are_refused(level, field, value):
    library = load(HEAD_KERNELS)
    for make in CALLS[head_kernels]:
        for backward in (False, True):
            call = make(library, backward)
            levels = call.memory[0]
            setattr(levels[level], field, levels[level].data + 1 if value == 'misaligned' else value)
            reads_scale = field != 'scale' or 'roi_align' in call.entry
            assert is_refused(library, run(library, call)) == reads_scale, (call.entry, field, value)


@needs_avx512
def test_strides_other_than_those_of_channels_last_are_refused():
    library = load('avx512_kernels')
    for backward in (False, True):
        call = CALLS[avx512][1](library, backward, shape=(1, 4, 4, 32), patch_size=2)
        call.args.stride_c = 2
        assert b'strides' in error_message(library, run(library, call))


@needs_avx512
def test_a_queue_stops_at_the_first_error():
    library = load('avx512_kernels')
    calls = [make(library) for make in CALLS[avx512]]
    calls[1].args.threads = 0
    struct = avx512._library().structs['KernelCall']
    queue = (struct * len(calls))(
        *((avx512._library().addresses[c.entry[9:]], ctypes.addressof(c.args)) for c in calls)
    )
    index, code = divmod(library.convnext_run_queue(queue, ctypes.c_int64(len(calls))), 256)
    assert index == 1 and b'threads' in error_message(library, code)
    assert calls[0].outputs[0].isfinite().all() and calls[2].outputs[0].isnan().all()
    assert library.convnext_run_queue(queue, ctypes.c_int64(0)) == 0
    assert is_refused(library, library.convnext_run_queue(queue, ctypes.c_int64(-1)))
    queue[0].kernel = None
    for invalid in (queue, None, ctypes.c_void_p(ctypes.addressof(queue) + 1)):
        assert is_refused(library, library.convnext_run_queue(invalid, ctypes.c_int64(1)))


@needs_head_kernels
def test_invalid_arguments_of_nms_are_refused():
    nms = load(HEAD_KERNELS).convnext_nms
    nms.argtypes = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float, ctypes.c_float, ctypes.c_void_p
    coords, keep = torch.rand(4 * 3), torch.zeros(3, dtype=torch.int32)
    p, q = coords.data_ptr(), keep.data_ptr()
    assert [nms(3, p, 0.5, 0.0, q), nms(0, None, 0.5, 0.0, None)] == [0, 0]
    too_many = ((-1, p, q), (1 << 31, p, q), (2**63 - 1, p, q))
    for invalid in (*too_many, (3, None, q), (3, p, None), (3, p + 1, q), (3, p, q + 2)):
        assert is_refused(load(HEAD_KERNELS), nms(*invalid[:2], 0.5, 0.0, invalid[2])), invalid


def test_unknown_codes_and_structs(module, library):
    describe = getattr(library, 'convnext_describe_struct', None)
    size = getattr(library, 'convnext_head_struct_size', None) or library.convnext_struct_size
    for i in (-1, 99, -(2**63), 2**63 - 1):
        assert error_message(library, i) == b'unknown error' and size(ctypes.c_int64(i)) == -1
        assert not describe or describe(ctypes.c_int64(i)) == b''
    assert all(size(ctypes.c_int64(i)) > 0 for i in range(len(module.STRUCTS)))


@needs_head_kernels
def test_head_kernels_with_another_struct_layout_are_not_used(monkeypatch):
    _, *others = head_kernels.STRUCTS
    longer = head_kernels._struct('Level', '', c_int64='height width', c_double='scale', c_void_p='data more')
    monkeypatch.setattr(head_kernels, 'STRUCTS', (longer, *others))
    assert head_kernels._library.__wrapped__() is None
