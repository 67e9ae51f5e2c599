"""Metadata of exported files, read without a runtime; truncated, foreign and malicious files are refused."""

import contextlib
import json
import shutil
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from convnext_dense.checkpoints import exported_files
from convnext_dense.checkpoints.exported_files import is_exported, read_exported
from convnext_dense.checkpoints.exported_meta import KEY
from convnext_dense.checkpoints.pt2_check import check_pt2
from convnext_dense.errors import UsageError
from helpers.exported import make_meta, save_detector, save_openvino, save_program, save_segmentor

onnx = pytest.importorskip('onnx')


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A model in each format."""
    folder = tmp_path_factory.mktemp('exported')
    detector = save_detector(folder / 'a.onnx')
    paths = {'.onnx': detector, '.pt2': save_program(folder / 'a.pt2')}
    with contextlib.suppress(ImportError):
        paths['.xml'] = save_openvino(folder / 'a.xml', detector)
    return paths


def test_suffixes():
    assert all(map(is_exported, ['a.onnx', 'b/A.ONNX', 'a.xml', 'a.pt2']))
    assert not any(map(is_exported, ['a.pth', 'a.pt', 'onnx', 'convnext_tiny_1k_224', 'http://a/b.pth']))


@pytest.mark.parametrize('suffix', ['.onnx', '.xml', '.pt2'])
def test_metadata_and_outputs(suffix, files):
    if suffix not in files:
        pytest.skip('no OpenVINO')
    file = read_exported(files[suffix])
    assert file.meta == (make_meta('upernet') if suffix == '.pt2' else make_meta('mask_rcnn'))
    expected = None if suffix == '.pt2' else ('boxes', 'scores', 'labels', 'masks')
    assert file.outputs == expected


def test_only_metadata_is_read_from_onnx_files(tmp_path, monkeypatch):
    """A few kilobytes of a model with 50 MB of weights."""
    path = save_segmentor(tmp_path / 'a.onnx')
    model = onnx.load(path)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(12_500_000, np.float32), 'weights'))
    onnx.save(model, path)
    sizes, read_text = [], exported_files._read_text
    monkeypatch.setattr(exported_files, '_read_text', lambda f, a, b: sizes.append(b - a) or read_text(f, a, b))
    tracemalloc.start()
    assert read_exported(path).outputs == ('segmentation',)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000 and 1000 < sum(sizes) < 100_000
    tracemalloc.stop()


def test_a_file_is_read_once(tmp_path, monkeypatch):
    path, opened = save_segmentor(tmp_path / 'a.onnx'), []
    read = exported_files.READERS['.onnx']
    monkeypatch.setitem(exported_files.READERS, '.onnx', lambda file: opened.append(file) or read(file))
    monkeypatch.chdir(tmp_path)
    for name in (path, 'a.onnx'):
        assert read_exported(name).meta.task == 'segmentation' and len(opened) == 1
    save_detector(path)
    assert read_exported(path).meta.task == 'detection' and len(opened) == 2


def error_message(path):
    with pytest.raises(UsageError) as error:
        file = read_exported(path)
        if path.suffix == '.pt2':
            check_pt2(file.path)
    assert '\n' not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('suffix', ['.onnx', '.xml', '.pt2'])
def test_truncated_and_foreign_files_are_refused(suffix, files, tmp_path):
    path = tmp_path / f'a{suffix}'
    path.write_bytes(b'')
    assert 'is empty' in error_message(path)
    for content in (
        b'no model',
        b'\x08',
        bytes(range(256)),
        b'<html></html>',
        b'PK\x03\x04',
        '<?xml encoding="ü"?>'.encode(),
    ):
        path.write_bytes(content)
        error_message(path)
    if suffix not in files:
        pytest.skip('no OpenVINO')
    content = files[suffix].read_bytes().rstrip()
    for length in [*range(1, len(content), max(len(content) // 50, 1)), len(content) - 1]:
        path.write_bytes(content[:length])
        message = error_message(path)
        assert 'truncated' in message or suffix == '.pt2'  # a prefix can contain a complete inner archive
    path.unlink()
    assert 'not a regular file' in error_message(path)


def test_models_without_our_metadata_are_refused(files, tmp_path):
    path = tmp_path / 'a.onnx'
    model = onnx.load(files['.onnx'])
    del model.metadata_props[:]
    onnx.save(model, path)
    assert 'is not a model that tools/export.py wrote: its metadata have no convnext_dense' in error_message(path)
    onnx.helper.set_model_props(model, {KEY: json.dumps({'format': 3})})
    onnx.save(model, path)
    assert 'have the format 3, this version reads 1' in error_message(path)


def test_openvino_needs_its_weights(files, tmp_path):
    if '.xml' not in files:
        pytest.skip('no OpenVINO')
    shutil.copy(files['.xml'], tmp_path / 'b.xml')
    assert 'needs its weights, b.bin, next to it: copy both files' in error_message(tmp_path / 'b.xml')


def edit_member(archive, target, name, change):
    """Copy an archive with one member changed."""
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(target, 'w') as copy:
        for member in source.namelist():
            content = source.read(member)
            copy.writestr(member, change(content) if member.endswith(name) else content)
    return target


def edit_program(change):
    def apply(content):
        program = json.loads(content)
        change(program)
        return json.dumps(program).encode()

    return apply


def malicious_expr(text):
    return text.replace('X', "__import__('os').system('echo')")


MALICIOUS_EDITS = {
    'a call of a function': lambda p: p['graph_module']['graph']['nodes'][0].update(target='torch.os.system'),
    'a call of a method': lambda p: p['graph_module']['graph']['nodes'][0].update(target='_operator.attrgetter'),
    'an expression': lambda p: p.update(x=[{'as_expr': {'expr_str': malicious_expr('X')}}]),
    'an expression of known names': lambda p: p.update(x=[{'as_expr': {'expr_str': 'Max(open(1), 2)'}}]),
    'an attribute': lambda p: p.update(x=[{'as_expr': {'expr_str': 'Max.mro'}}]),
    'a guard': lambda p: p.update(guards_code=[malicious_expr("L['images'].size()[0] == X")]),
    'a guard of two lines': lambda p: p.update(guards_code=['1 == 1", "")\n  import os #']),
    'a spec': lambda p: p['graph_module']['module_call_graph'][0]['signature'].update(in_spec=malicious_expr('X')),
    'a pickle': lambda p: p.update(x={'use_pickle': True}),
}


@pytest.mark.parametrize('case', MALICIOUS_EDITS)
def test_programs_that_could_run_code_are_refused(case, files, tmp_path):
    check_pt2(str(files['.pt2']))
    path = edit_member(files['.pt2'], tmp_path / 'a.pt2', 'models/model.json', edit_program(MALICIOUS_EDITS[case]))
    assert 'is not loaded, since it could run code' in error_message(path)


def test_pickled_example_inputs_are_refused(files, tmp_path):
    class Malicious:
        def __reduce__(self):
            return print, ('executed',)

    torch.save(Malicious(), tmp_path / 'evil')
    pickle_bytes = (tmp_path / 'evil').read_bytes()
    path = edit_member(files['.pt2'], tmp_path / 'a.pt2', 'sample_inputs/model.pt', lambda content: pickle_bytes)
    assert 'model.pt is a pickle' in error_message(path)


@pytest.mark.parametrize('member', ['data/aotinductor/model/a.so', 'data/constants/custom_obj_0', 'x.py'])
def test_libraries_and_objects_are_refused(member, files, tmp_path):
    shutil.copy(files['.pt2'], tmp_path / 'a.pt2')
    with zipfile.ZipFile(tmp_path / 'a.pt2', 'a') as archive:
        archive.writestr(f'a/{member}', b'')
    assert f'it contains {member}' in error_message(tmp_path / 'a.pt2')
