"""Traced models in files: ONNX, OpenVINO and `torch.export`."""

import importlib
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from ..checkpoints.exported_meta import KEY, ExportedMeta
from ..errors import UsageError, root_message
from .program import Traced, quiet

OPSET = 18
DIM_NAMES = {  # of the graph's outputs and inputs, by name
    'images': ('batch', 'channels', 'height', 'width'),
    'boxes': ('batch', 'detections', '4'),
    'scores': ('batch', 'detections'),
    'labels': ('batch', 'detections'),
    'masks': ('batch', 'detections', 'mask_height', 'mask_width'),
    'segmentation': ('batch', 'output_height', 'output_width'),
    'logits': ('batch', 'classes', 'output_height', 'output_width'),
}


def write_onnx(traced: Traced, path: Path) -> None:
    """Write a model as ONNX, of standard operators alone.

    Raises:
        UsageError: If a package is missing, or an operator is not supported by ONNX.
    """
    for name in ('onnx', 'onnxscript'):
        _import(name, 'export')
    from .onnx_ops import TRANSLATIONS

    n_inputs = len(traced.program.graph_signature.user_inputs)
    inputs = [node.name for node in traced.program.graph.nodes if node.op == 'placeholder'][-n_inputs:]
    with torch.no_grad(), quiet():
        try:
            onnx_program = torch.onnx.export(
                traced.program,
                dynamo=True,
                opset_version=OPSET,
                input_names=inputs,
                output_names=traced.outputs,
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise UsageError(_missing_operator(traced, error)) from error
    model = onnx_program.model
    for value in (*model.graph.inputs, *model.graph.outputs):
        names = DIM_NAMES.get(value.name, ())
        for i, (name, dim) in enumerate(zip(names, value.shape)):
            if not isinstance(dim, int):
                value.shape[i] = name
    model.metadata_props[KEY] = traced.meta.to_json()
    onnx_program.save(path)


def _missing_operator(traced: Traced, error: Exception) -> str:
    """The operator that ONNX does not support, and the module that calls it."""
    causes, cause = [], error
    while cause is not None:
        causes.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    operator = next((m[1] for text in causes if (m := re.search(r'target=torch\.ops\.([\w.]+)', text))), None)
    if operator is None:
        return f'the model cannot be written as ONNX: {root_message(error)[:300]}'
    place = ''
    for node in traced.program.graph.nodes:
        stack = node.meta.get('nn_module_stack')
        if stack and str(node.target) == operator:
            name, cls = [*stack.values()][-1]
            place = f' of {name.rpartition("model.")[2]} ({getattr(cls, "__name__", cls).rpartition(".")[2]})'
    return f'the operator {operator}{place} is not supported by ONNX, so the model cannot be exported'


def write_openvino(traced: Traced, path: Path) -> None:
    """Write a model as OpenVINO's .xml, with its weights in .bin beside it.

    Raises:
        UsageError: As of `write_onnx`.
    """
    _import('openvino', 'openvino')
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        write_onnx(traced, onnx_path := Path(folder, 'model.onnx'))
        onnx_to_openvino(onnx_path, path, traced.meta)


def onnx_to_openvino(onnx_path: Path, path: Path, meta: ExportedMeta) -> None:
    """Convert an ONNX file to OpenVINO's .xml and .bin."""
    import openvino

    model = openvino.convert_model(onnx_path)
    model.set_rt_info(meta.to_json(), [KEY])
    openvino.save_model(model, path, compress_to_fp16=False)


def write_pt2(traced: Traced, path: Path) -> None:
    """Write a model as a program of `torch.export`; detectors need `import convnext_dense` to load it."""
    torch.export.save(traced.program, path, extra_files={f'{KEY}.json': traced.meta.to_json()})


WRITERS: dict[str, Callable[[Traced, Path], None]] = {'.onnx': write_onnx, '.xml': write_openvino, '.pt2': write_pt2}


def files_of(path: Path) -> list[Path]:
    """All files that belong to an exported model: its weights may be in one of their own."""
    beside = {'.onnx': path.with_name(path.name + '.data'), '.xml': path.with_suffix('.bin')}
    return [path, *([beside[path.suffix]] if path.suffix in beside else [])]


def _import(name: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        message = f"{name} is not installed ({error}): pip install 'convnext_dense[{extra}]'"
        raise UsageError(message) from error
