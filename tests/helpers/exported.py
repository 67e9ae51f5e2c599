"""Hand-made exported models whose results can be computed by hand."""

from functools import lru_cache

import numpy as np
from mmengine.config import Config

from convnext_dense.checkpoints.exported_meta import KEY, ExportedMeta
from helpers.checkpoints import CLASSES
from helpers.paths import ROOT

# Boxes as fractions of width and height; the third place of an image is empty.
BOXES = np.float32([[0.125, 0.25, 0.5, 0.75], [0.25, 0.125, 1, 0.5], [0, 0, 0, 0]])
LABELS = np.int64([2, 0, -1])
MASK_ROWS = np.float32([0.5, 0.25, 0])  # masks are the first rows of the image, up to these fractions of its height
BOX_MASK = np.float32(np.linspace(0, 1, 28)[None, :] > 0.4).repeat(28, 0)  # the right 60 % of a box


def make_meta(recipe: str, **changes) -> ExportedMeta:
    """The metadata of an exported model of a demo recipe."""
    task = 'segmentation' if recipe == 'upernet' else 'detection'
    values = dict(
        classes=CLASSES[recipe],
        config=demo_config(recipe),
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
        masks='image' if task == 'detection' else None,
    )
    return ExportedMeta(task, **{**values, **changes})


@lru_cache
def demo_config(recipe: str) -> str:
    """Text of a demo recipe's config."""
    return Config.fromfile(ROOT / f'configs/demo/{recipe}.py').pretty_text


def save_detector(path, meta: ExportedMeta | None = None, batch: int | str = 'N'):
    """A detector whose first score is the mean of the red channel, from 0 to 1, and its second half of that."""
    from onnx import TensorProto

    meta = meta or make_meta('mask_rcnn')
    size = 'output_size' if meta.input != 'raw' else 'size_of_input'
    constants = dict(
        fractions=BOXES[None],
        one_label=LABELS[None],
        rows=MASK_ROWS[None, :, None, None],
        box_mask=BOX_MASK[None, None],
    )
    constants |= dict(axes=np.int64([2, 3]), channel=np.int64([0]), order=np.int64([1, 0, 1, 0]), full=np.float32(255))
    constants |= dict(half=np.float32(0.5), zero=np.float32(0), zero_int=np.int64(0), one_int=np.int64(1))
    constants |= dict(at_0=np.int64([0]), two=np.int64([2]), three=np.int64([3]), four=np.int64([4]))
    constants |= dict(column=np.int64([-1, 1]), cube=np.int64([-1, 1, 1]), scalar=np.zeros(0, np.int64))
    constants |= dict(side=np.int64([28, 28]))
    nodes = [
        ('Cast', 'images', 'pixels', dict(to=TensorProto.FLOAT)),
        ('Shape', 'pixels', 'shape', {}),
        ('Slice', 'shape two four', 'size_of_input', {}),
        ('ReduceMean', 'pixels axes', 'means', dict(keepdims=0)),
        ('Gather', 'means channel', 'red', dict(axis=1)),
        ('Div', 'red full', 'first', {}),
        ('Mul', 'first half', 'second', {}),
        ('Mul', 'first zero', 'third', {}),
        ('Concat', 'first second third', 'scores', dict(axis=1)),
        ('Gather', f'{size} order', 'sides', {}),
        ('Cast', 'sides', 'float_sides', dict(to=TensorProto.FLOAT)),
        ('Mul', 'fractions float_sides', 'one_boxes', {}),
        ('Reshape', 'third cube', 'third_cube', {}),
        ('Add', 'one_boxes third_cube', 'boxes', {}),
        ('Cast', 'third', 'third_int', dict(to=TensorProto.INT64)),
        ('Add', 'one_label third_int', 'labels', {}),
        ('Gather', 'shape at_0', 'n', {}),
    ]
    outputs = [('boxes', TensorProto.FLOAT), ('scores', TensorProto.FLOAT), ('labels', TensorProto.INT64)]
    if meta.masks == 'box':
        nodes += [
            ('Concat', 'n three side', 'mask_shape', dict(axis=0)),
            ('Expand', 'box_mask mask_shape', 'masks', {}),
        ]
        outputs.append(('masks', TensorProto.FLOAT))
    elif meta.masks:
        nodes += [
            ('Gather', f'{size} at_0', 'height', {}),
            ('Reshape', 'height scalar', 'height_scalar', {}),
            ('Range', 'zero_int height_scalar one_int', 'row_numbers', {}),
            ('Cast', 'row_numbers', 'row_floats', dict(to=TensorProto.FLOAT)),
            ('Reshape', 'row_floats column', 'row_column', {}),
            ('Cast', 'height', 'height_float', dict(to=TensorProto.FLOAT)),
            ('Mul', 'rows height_float', 'limits', {}),
            ('Less', 'row_column limits', 'row_masks', {}),
            ('Concat', f'n three {size}', 'mask_shape', dict(axis=0)),
            ('Expand', 'row_masks mask_shape', 'masks', {}),
        ]
        outputs.append(('masks', TensorProto.BOOL))
    return _save(path, meta, nodes, constants, outputs, batch)


def save_segmentor(path, meta: ExportedMeta | None = None, batch: int | str = 'N', with_logits: bool = False):
    """A segmentor whose class of a pixel is its strongest channel: 0 red, 1 green, 2 blue."""
    from onnx import TensorProto

    meta = meta or make_meta('upernet')
    constants = dict(start=np.int64([0]), end=np.int64([2]), no_roi=np.float32([]))
    size = 'output_size' if meta.input != 'raw' else 'size_of_input'
    constants |= dict(side_start=np.int64([2]), side_end=np.int64([4]), pads=np.int64([0, 0, 0, 0, 0, 2, 0, 0]))
    nodes = [
        ('Cast', 'images', 'pixels', dict(to=TensorProto.FLOAT)),
        ('Shape', 'pixels', 'shape', {}),
        ('Slice', 'shape start end', 'head', {}),
        ('Slice', 'shape side_start side_end', 'size_of_input', {}),
        ('Concat', f'head {size}', 'sizes', dict(axis=0)),
        ('Resize', 'pixels no_roi no_roi sizes', 'resized', dict(mode='linear')),
    ]
    if with_logits:  # two more classes that are never predicted
        constants['low'] = np.float32(-1000)
        nodes.append(('Pad', 'resized pads low', 'logits', {}))
        return _save(path, meta, nodes, constants, [('logits', TensorProto.FLOAT)], batch)
    nodes.append(('ArgMax', 'resized', 'labels', dict(axis=1, keepdims=0)))
    nodes.append(('Cast', 'labels', 'segmentation', dict(to=TensorProto.UINT8)))
    return _save(path, meta, nodes, constants, [('segmentation', TensorProto.UINT8)], batch)


def _save(path, meta, nodes, constants, outputs, batch):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    used = {name for _, inputs, _, _ in nodes for name in inputs.split()}
    kind = TensorProto.UINT8 if meta.input == 'uint8' else TensorProto.FLOAT
    inputs = [helper.make_tensor_value_info('images', kind, [batch, 3, *(meta.size or ('H', 'W'))])]
    if meta.input != 'raw':
        inputs.append(helper.make_tensor_value_info('output_size', TensorProto.INT64, [2]))
    graph = helper.make_graph(
        [helper.make_node(op, names.split(), [out], **attributes) for op, names, out, attributes in nodes],
        'by_hand',
        inputs,
        [helper.make_tensor_value_info(name, kind, None) for name, kind in outputs],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if k in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 18)], ir_version=10)
    if meta is not None:
        helper.set_model_props(model, {KEY: meta.to_json()})
    onnx.save(model, str(path))
    return path


def save_openvino(path, onnx_file):
    """Convert an exported ONNX file, with its metadata, as tools/export.py does."""
    import onnx
    import openvino

    model = openvino.convert_model(str(onnx_file))
    text = {p.key: p.value for p in onnx.load(str(onnx_file)).metadata_props}[KEY]
    model.set_rt_info(text, KEY)
    openvino.save_model(model, str(path), compress_to_fp16=False)
    return path


def save_program(path, meta: ExportedMeta | None = None):
    """The segmentor of `save_segmentor` as a program of torch.export."""
    import torch

    class Segmentor(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('factor', torch.ones(1, 3, 1, 1))

        def forward(self, images, output_size):
            height, width = output_size.tolist()
            for side in (height, width):
                torch._check(side >= 1)
                torch._check(side <= 100_000)
            pixels = images.float() * self.factor
            resized = torch.nn.functional.interpolate(pixels, size=(height, width), mode='bilinear')
            return {'segmentation': resized.argmax(1).to(torch.uint8)}

    Dim = torch.export.Dim
    shapes = dict(images={0: Dim('n'), 2: Dim('h', min=2), 3: Dim('w', min=2)}, output_size=None)
    example = torch.zeros(2, 3, 20, 30, dtype=torch.uint8), torch.tensor([21, 31])
    program = torch.export.export(Segmentor(), example, dynamic_shapes=shapes)
    text = (meta or make_meta('upernet')).to_json()
    torch.export.save(program, str(path), extra_files={f'{KEY}.json': text})
    return path
