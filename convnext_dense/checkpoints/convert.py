"""ConvNeXt weights in the names of another source, without loss."""

import os
from collections import Counter
from pathlib import Path

import torch

from ..errors import UsageError
from .naming import NAMING_SCHEMES, NamingScheme
from .pretrained import check_values, open_checkpoint

SCHEMES_BY_KEY = {source.key: source for source in NAMING_SCHEMES}
# What a file is converted to: whose names, and the wrapper around them.
EXPORT_FORMATS: dict[str, tuple[NamingScheme, str | None]] = {
    'ours': (SCHEMES_BY_KEY['original'], 'state_dict'),
    'original': (SCHEMES_BY_KEY['original'], 'model'),
    'timm': (SCHEMES_BY_KEY['timm'], None),
    'transformers': (SCHEMES_BY_KEY['transformers'], None),
    'safetensors': (SCHEMES_BY_KEY['original'], None),
}


def convert(source: str | Path, out: str | Path, target: str) -> int:
    """Write the weights of a file in the names of `target`, a key of TARGETS, and return their number. A file whose
    name ends in .safetensors is one, and so is every file of target 'safetensors'.

    Raises:
        UsageError: the source cannot be read, holds more than a ConvNeXt or what the target has no name for; `out`
            exists or cannot be written.
    """
    out = Path(out)
    if out.exists():
        raise UsageError(f'{out} exists already: give another name')
    checkpoint = open_checkpoint(source)
    extra = [
        *(f"those of '{key}'" for key in checkpoint.wrappers),
        *checkpoint.source.unknown,
        *checkpoint.beyond,
    ]
    if extra:
        raise UsageError(
            f'{source} holds more than a ConvNeXt ({len(extra)} tensors, such as {extra[0]}): only that alone converts'
        )
    check_values(checkpoint.file, checkpoint.weights)
    names, wrapper = EXPORT_FORMATS[target]
    tensors = {}
    for ours, tensor in checkpoint.weights.items():
        name = names.name(ours)
        if name is None:
            raise UsageError(f'{source} has {ours}, which {target} has no name for')
        tensors[_name_prefix(names, ours, checkpoint.grn) + name] = names.to_theirs(ours, tensor).contiguous()
    _write_checkpoint(tensors, wrapper, out, target == 'safetensors' or out.suffix == '.safetensors')
    return len(tensors)


def _name_prefix(names: NamingScheme, ours: str, grn: bool) -> str:
    if ours.startswith('head.'):
        return ''
    return names.prefix.replace('convnext.', 'convnextv2.') if grn else names.prefix


def _write_checkpoint(tensors: dict[str, torch.Tensor], wrapper: str | None, out: Path, safetensors: bool) -> None:
    """Whole or not at all."""
    partial = out.with_name(f'{out.name}.part')
    try:
        if safetensors:
            from safetensors.torch import save_file

            shared = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())  # which it refuses
            for name, tensor in tensors.items():
                if shared[tensor.untyped_storage().data_ptr()] > 1:
                    tensors[name] = tensor.clone()
            save_file(tensors, partial, metadata={'format': 'pt'})
        else:
            torch.save({wrapper: tensors} if wrapper else tensors, partial)
        os.replace(partial, out)
    except Exception as error:  # safetensors has errors of its own
        partial.unlink(missing_ok=True)
        raise UsageError(
            f'{out} cannot be written ({str(error).strip().splitlines()[0]}): give another place'
        ) from error
