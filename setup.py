import hashlib
import platform
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup

ONEDL = ['onedl-mmengine==0.10.12', 'onedl-mmcv==2.3.6', 'onedl-mmdetection==3.5.1', 'onedl-mmsegmentation==1.4.2']
OPENMMLAB = ['mmengine==0.10.7', 'mmcv==2.1.0', 'mmdet==3.3.0', 'mmsegmentation==1.2.2']
OPENMMLAB += ['ftfy', 'regex', 'setuptools<81']  # imported, not declared: by mmseg, and pkg_resources by mmengine
EXPORT = ['onnx>=1.18', 'onnxscript>=0.5', 'onnxruntime>=1.20']
OPENVINO = ['openvino>=2025.0']

# The kernels: the backbone's for processors with AVX-512, those of necks and heads for AVX-512 and for AVX2. They know
# nothing of Python or torch, whose OpenMP they share: it is not linked. Without a compiler the installation goes on,
# and pip shows nothing of it: `make setup` warns, and so does the first forward pass (docs/install.md).
OPS = Path('convnext_dense', 'ops')
KERNEL_FLAGS = ['-O3', '-fopenmp', *(f'-mavx512{part}' for part in ('f', 'bw', 'dq', 'vl', 'bf16')), '-mfma']
# Coordinates of boxes are computed as in mmcv, to the bit: they decide limits and thresholds.
HEAD_FLAGS = ['-O3', '-fopenmp', '-mfma', '-ffp-contract=off']
KERNELS = {  # module: source, flags
    'avx512_kernels': ('avx512_kernels.c', KERNEL_FLAGS),
    'head_kernels_avx512': ('head_kernels.c', [*HEAD_FLAGS, '-mavx512f', '-mavx512bw', '-mavx512dq', '-mavx512vl']),
    'head_kernels_avx2': ('head_kernels.c', [*HEAD_FLAGS, '-mavx2']),
}


def kernel_extension(module: str, source: str, flags: list[str]) -> Extension:
    digest = hashlib.sha256(Path(__file__).parent.joinpath(OPS, source).read_bytes()).hexdigest()[:16]
    return Extension(
        f'convnext_dense.ops.{module}',
        [str(OPS / source)],
        define_macros=[('SOURCE', f'"{digest}"')],
        extra_compile_args=flags,
        libraries=['m'],
        depends=['setup.py'],
        optional=True,
    )


setup(
    name='convnext_dense',
    version='0.1.0',
    description='The ConvNeXt backbone for detection (mmdet) and segmentation (mmseg), with the recipes of the paper',
    keywords='convnext mmdet mmseg openmmlab detection segmentation backbone',
    long_description=Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.10',
    packages=find_packages(include=['convnext_dense*']),
    # .mim/configs and .mim/tools are links to the folders at the top; a wheel carries copies.
    package_data={'convnext_dense': ['.mim/**/*.py', '.mim/**/*.sh', '.mim/*.yml', 'ops/*.c']},
    ext_modules=[kernel_extension(module, *args) for module, args in KERNELS.items()]
    if (sys.platform, platform.machine()) == ('linux', 'x86_64')
    else [],
    install_requires=['torch>=2.4', 'numpy', 'safetensors', 'filelock'],
    extras_require={
        # The two distributions of OpenMMLab have the same import names, so they are a choice.
        'onedl': ONEDL,  # the maintained one
        'openmmlab': OPENMMLAB,  # the classic one
        # Triton's interpreter runs the GPU kernels on a CPU.
        'test': [
            'pytest',
            'pytest-xdist',
            'ruff==0.17.6',
            'tensorboard',
            'rasterio',
            'tifffile',
            'triton; platform_system == "Linux"',
            *EXPORT,
            *OPENVINO,
        ],
        'multichannel': ['rasterio'],  # with which TIFF of other channels than RGB is read
        'large-images': ['rasterio'],  # with which predictions in tiles read TIFF and PNG by rows
        'export': EXPORT,  # tools/export.py, and running its ONNX files
        'openvino': OPENVINO,  # its .xml files
        'trackers': ['tensorboard', 'wandb'],  # what train.py --loggers sends runs to
        'docs': Path(__file__)
        .with_name('docs')
        .joinpath('requirements.txt')
        .read_text()
        .split('\n')[:-1],  # `make docs`
    },
)
