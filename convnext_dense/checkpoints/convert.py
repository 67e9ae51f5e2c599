"""Convert ConvNeXt weights losslessly to the parameter names of another code base."""

import os
from collections import Counter
from pathlib import Path

import torch

from ..errors import UsageError
from .naming import ORIGINAL, TIMM, TRANSFORMERS, NamingScheme
from .pretrained import check_values, open_checkpoint

# By export format: the naming scheme, and the key of the state dict in the file (None for the top level).
EXPORT_FORMATS: dict[str, tuple[NamingScheme, str | None]] = {
    'ours': (ORIGINAL, 'state_dict'),
    'original': (ORIGINAL, 'model'),
    'timm': (TIMM, None),
    'transformers': (TRANSFORMERS, None),
    'safetensors': (ORIGINAL, None),
}


def convert(source: str | Path, out: str | Path, export_format: str) -> int:
    """Write ConvNeXt weights to a file with the parameter names of another code base.

    Args:
        source: A pretrained weight name, a path or a URL.
        out: File to write; in safetensors format if it ends in .safetensors or `export_format` is 'safetensors'.
        export_format: A key of `EXPORT_FORMATS`.

    Returns:
        The number of tensors written.

    Raises:
        UsageError: If the source cannot be read or contains more than a ConvNeXt, if the format has no name for a
            parameter, or if `out` exists or cannot be written.
    """
    out = Path(out)
    if out.exists():
        raise UsageError(f'{out} already exists: choose another path')
    checkpoint = open_checkpoint(source)
    extra = [*(f"those of '{key}'" for key in checkpoint.unused_keys), *checkpoint.parsed.unknown]
    extra += checkpoint.extra_names
    if extra:
        raise UsageError(
            f'{source} contains more than a ConvNeXt ({len(extra)} tensors, such as {extra[0]}): only a file with '
            'nothing else can be converted'
        )
    check_values(checkpoint.file, checkpoint.weights)
    scheme, key = EXPORT_FORMATS[export_format]
    prefix = scheme.prefix.replace('convnext.', 'convnextv2.') if checkpoint.use_grn else scheme.prefix
    tensors = {}
    for canonical, tensor in checkpoint.weights.items():
        name = scheme.to_source_name(canonical)
        if name is None:
            raise UsageError(f'{source} has {canonical}, which {export_format} has no name for')
        name = name if canonical.startswith('head.') else prefix + name
        tensors[name] = scheme.to_source_shape(canonical, tensor).contiguous()
    _write_checkpoint(tensors, key, out, export_format == 'safetensors' or out.suffix == '.safetensors')
    return len(tensors)


def _write_checkpoint(tensors: dict[str, torch.Tensor], key: str | None, out: Path, safetensors: bool) -> None:
    """Write the file atomically; remove the partial file after an error."""
    partial = out.with_name(f'{out.name}.part')
    try:
        if safetensors:
            from safetensors.torch import save_file

            shared = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())  # it refuses these
            for name, tensor in tensors.items():
                if shared[tensor.untyped_storage().data_ptr()] > 1:
                    tensors[name] = tensor.clone()
            save_file(tensors, partial, metadata={'format': 'pt'})
        else:
            torch.save({key: tensors} if key else tensors, partial)
        os.replace(partial, out)
    except Exception as error:  # safetensors has errors of its own
        partial.unlink(missing_ok=True)
        raise UsageError(
            f'{out} cannot be written ({str(error).strip().splitlines()[0]}): choose another path'
        ) from error
