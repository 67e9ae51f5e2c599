"""Exported models with convolutions and matmuls in 8-bit integers, calibrated on the user's images."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..channel_files import denormalize
from ..config.channels import channel_reader
from ..errors import UsageError
from ..inference.model import Predictor
from .check import as_input
from .program import ExportOptions, quiet

OPERATORS = ['Conv', 'MatMul', 'Gemm']
MAX_IMAGES = 100  # of which ranges are measured


def calibration_inputs(
    predictor: Predictor, paths: Sequence[str], options: ExportOptions
) -> Iterator[dict[str, np.ndarray]]:
    """Yield what an exported model takes for each of the first images.

    Raises:
        UsageError: If an image cannot be read, or is not of the size that the model takes.
    """
    reader = channel_reader(predictor.config)
    for path in paths[:MAX_IMAGES]:
        pixels = predictor.read(path)
        image = predictor.prepare(pixels)['inputs'].numpy()
        if options.size and image.shape[1:] != tuple(options.size):
            height, width = image.shape[1:]
            raise UsageError(f'{path} is {height} x {width} at the scale of the test pipeline, not as --size says')
        if reader:
            image = denormalize(image, reader.mean, reader.std)
        elif len(image) == 3:
            image = image[::-1]
        inputs = dict(images=as_input(np.ascontiguousarray(image)[None], predictor, options))
        yield inputs if options.input == 'raw' else inputs | dict(output_size=np.int64(pixels.shape[:2]))


def quantize(source: Path, target: Path, inputs: Iterator[dict[str, np.ndarray]]) -> None:
    """Write an ONNX file whose weights and feature maps are 8-bit integers, with one scale for each channel of weights.

    The ranges of feature maps are measured on `inputs` of the file in float32.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def get_next(self):
            return next(inputs, None)

    with quiet():
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=OPERATORS,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options=dict(MatMulConstBOnly=True),  # not what pastes masks and resizes
        )
    model, original = onnx.load(target), onnx.load(source, load_external_data=False)
    del model.metadata_props[:]
    model.metadata_props.extend(original.metadata_props)
    onnx.save(model, target)
