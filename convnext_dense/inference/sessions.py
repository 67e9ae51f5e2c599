"""Run exported models in their runtimes: ONNX Runtime, OpenVINO, torch.export."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from ..checkpoints.exported_files import AGAIN
from ..checkpoints.pt2_check import check_pt2
from ..errors import TrainingError, UsageError, root_message

AMP_HINT = 'an exported model runs in the precision of its file: export it with --half, or predict with the checkpoint'


class Session:
    """A loaded exported model; the class of each runtime says how it loads a file (`_load`) and runs it (`_infer`).

    Args:
        path: Path of the file.
        device: Device on which it runs.
        amp_dtype: 'float32', or another precision to which the runtime itself converts.

    Attributes:
        batch (int | None): Fixed batch size; None for any.
        size (tuple[int, int] | None): Fixed height and width of the images; None for any.
        dtype (str): NumPy data type of the images.
        outputs (tuple[str, ...]): Names of the outputs.

    Raises:
        UsageError: If the runtime is not installed, does not support the device or precision, or cannot load the file.
    """

    runtime = package = extra = ''
    device_types: tuple[str, ...] = ('cpu',)
    amp_dtypes: tuple[str, ...] = ('float32',)
    batch: int | None = None
    size: tuple[int, int] | None = None
    dtype: str = 'float32'
    outputs: tuple[str, ...] = ()

    def __init__(self, path: str, device: torch.device, amp_dtype: str = 'float32'):
        self.path = path
        self.check_amp_dtype(amp_dtype)
        self.check_device(path, device)
        module = self.import_package(path)
        try:
            self._load(module, device, amp_dtype)
        except UsageError:
            raise
        except Exception as error:  # runtimes raise any exception for a damaged file
            raise UsageError(f'{path} cannot be loaded by {self.runtime} ({_reason(error)}): {AGAIN}') from error

    def run(self, images: np.ndarray, output_size: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Run the model.

        Args:
            images: Images (N, C, H, W), which are converted to the data type of the input.
            output_size: Height and width to whose pixels the results refer; None for files without this input.

        Returns:
            The outputs by name.

        Raises:
            TrainingError: If the runtime cannot run the model on these images.
        """
        inputs = dict(images=np.ascontiguousarray(images, self.dtype))
        if output_size is not None:
            inputs['output_size'] = np.array(output_size, np.int64)
        try:
            return self._infer(inputs)
        except Exception as error:
            height, width = images.shape[2:]
            raise TrainingError(
                f'{self.path} cannot be run on {len(images)} x {width} x {height} pixels: {_reason(error)}'
            ) from error

    @classmethod
    def import_package(cls, path: str) -> ModuleType:
        """Import the runtime; raise UsageError with the extra that installs it if it is missing."""
        try:
            return importlib.import_module(cls.package)
        except ImportError as error:
            raise UsageError(
                f"{path} needs {cls.runtime}: pip install 'convnext_dense[{cls.extra}]' ({root_message(error)})"
            ) from error

    @classmethod
    def check_amp_dtype(cls, amp_dtype: str) -> None:
        """Raise UsageError if the runtime does not support a precision."""
        if amp_dtype not in cls.amp_dtypes:
            raise UsageError(f'amp_dtype {amp_dtype}: {AMP_HINT}')

    @classmethod
    def check_device(cls, path: str, device: torch.device) -> None:
        """Raise UsageError if the runtime does not support a device."""
        if device.type not in cls.device_types:
            names = ' or '.join(cls.device_types)
            raise UsageError(f"{path} does not run on '{device}': {cls.runtime} runs it on {names}")

    @classmethod
    def has_cuda(cls) -> bool:
        """Whether the runtime can use a GPU of this machine, if there is one."""
        return 'cuda' in cls.device_types


class OnnxSession(Session):
    """A model in ONNX Runtime."""

    runtime, package, extra = 'ONNX Runtime', 'onnxruntime', 'export'
    device_types = ('cpu', 'cuda')

    def _load(self, module: ModuleType, device: torch.device, amp_dtype: str) -> None:
        options = module.SessionOptions()
        options.log_severity_level = 3  # errors only: warnings are about ONNX Runtime's own optimizations
        providers: list = ['CPUExecutionProvider']
        if device.type == 'cuda':
            providers.insert(0, ('CUDAExecutionProvider', dict(device_id=device.index or 0)))
        self.session = module.InferenceSession(self.path, options, providers=providers)
        if device.type == 'cuda' and 'CUDAExecutionProvider' not in self.session.get_providers():
            raise UsageError(f"onnxruntime cannot use '{device}': its CUDA libraries or the GPU are not there")
        self.outputs = tuple(output.name for output in self.session.get_outputs())
        images = {item.name: item for item in self.session.get_inputs()}.get('images')
        if images is not None:
            self.batch, self.size = _fixed_sides([n if isinstance(n, int) else None for n in images.shape])
            self.dtype = {'tensor(uint8)': 'uint8', 'tensor(float16)': 'float16'}.get(images.type, 'float32')

    def _infer(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(self.outputs, self.session.run(None, inputs)))

    @classmethod
    def check_device(cls, path: str, device: torch.device) -> None:
        """Raise UsageError if the installed ONNX Runtime does not support a device."""
        super().check_device(path, device)
        if device.type == 'cuda' and not cls.has_cuda():
            raise UsageError(
                f"{path} does not run on '{device}': this onnxruntime is for CPUs: install the package "
                'onnxruntime-gpu instead of it'
            )

    @classmethod
    def has_cuda(cls) -> bool:
        """Whether the installed package is the one for GPUs."""
        try:
            return 'CUDAExecutionProvider' in importlib.import_module('onnxruntime').get_available_providers()
        except ImportError:
            return False


class OpenVinoSession(Session):
    """A model in OpenVINO."""

    runtime, package, extra = 'OpenVINO', 'openvino', 'openvino'
    amp_dtypes = ('float32', 'bfloat16')

    def _load(self, module: ModuleType, device: torch.device, amp_dtype: str) -> None:
        # By default, OpenVINO uses bfloat16 if the processor supports it.
        precision = dict(float32='f32', bfloat16='bf16')[amp_dtype]
        model = module.Core().read_model(self.path)
        self.model = module.compile_model(model, 'CPU', dict(INFERENCE_PRECISION_HINT=precision))
        self.outputs = tuple(output.get_any_name() for output in self.model.outputs)
        images = {port.get_any_name(): port for port in self.model.inputs}.get('images')
        if images is not None:
            shape = images.partial_shape
            self.batch, self.size = _fixed_sides([n.get_length() if n.is_static else None for n in shape])
            self.dtype = images.element_type.to_dtype().name

    def _infer(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        result = self.model(inputs)
        return {name: result[name] for name in self.outputs}


class TorchSession(Session):
    """A program of torch.export."""

    runtime, package, extra = 'PyTorch', 'torch', 'export'
    device_types = ('cpu', 'cuda')

    def _load(self, module: ModuleType, device: torch.device, amp_dtype: str) -> None:
        check_pt2(self.path)
        self.device = device
        program = module.export.load(self.path)
        if device.type != 'cpu':
            program = importlib.import_module('torch.export.passes').move_to_device_pass(program, device)
        self.module = program.module()
        values = {node.name: node.meta.get('val') for node in program.graph.nodes}
        images = values[program.graph_signature.user_inputs[0]]
        self.batch, self.size = _fixed_sides([n if isinstance(n, int) else None for n in images.shape])
        self.dtype = str(images.dtype).removeprefix('torch.')
        spec = program.call_spec.out_spec
        results = [values[name] for name in program.graph_signature.user_outputs]
        self.outputs = tuple(spec.context) if spec.type is dict else _positional_names(results)

    @torch.no_grad()
    def _infer(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        result = self.module(*(torch.from_numpy(array).to(self.device) for array in inputs.values()))
        tensors = [result] if isinstance(result, torch.Tensor) else result
        tensors = tensors.values() if isinstance(tensors, dict) else tensors
        return {name: tensor.cpu().numpy() for name, tensor in zip(self.outputs, tensors)}


SESSIONS = {'.onnx': OnnxSession, '.xml': OpenVinoSession, '.pt2': TorchSession}


def session_class(path: str | Path) -> type[Session]:
    """Return the class of session for a file, by its suffix."""
    return SESSIONS[Path(path).suffix.lower()]


def session_device(path: str | Path, name: str | None) -> torch.device:
    """Return the device on which an exported model runs.

    Args:
        path: Path of the file.
        name: Device name, such as 'cuda:1'; None for a GPU if the runtime can use one, else the CPU.

    Raises:
        UsageError: If the runtime does not support this device.
    """
    cls = session_class(path)
    if name is None:
        return torch.device('cuda' if torch.cuda.is_available() and cls.has_cuda() else 'cpu')
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"no device '{name}' ({root_message(error)}): give cpu or cuda") from error
    cls.check_device(str(path), device)
    return device


def _fixed_sides(shape: list[int | None]) -> tuple[int | None, tuple[int, int] | None]:
    """Return the fixed batch size and (H, W) of an input shape (N, C, H, W); None for dynamic ones."""
    batch, _, height, width = shape
    return batch, (height, width) if height is not None and width is not None else None


def _positional_names(outputs: Sequence[torch.Tensor]) -> tuple[str, ...]:
    """Return the output names of a program that returns a tuple, in the order of tools/export.py."""
    if len(outputs) > 1:
        return ('boxes', 'scores', 'labels', 'masks')[: len(outputs)]
    return ('logits',) if outputs[0].is_floating_point() else ('segmentation',)


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
