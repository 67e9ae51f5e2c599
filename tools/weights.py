#!/usr/bin/env python
"""Look at ConvNeXt weights, convert them, list the published ones."""

import re
from collections import Counter

import environment  # noqa: F401
import torch

from convnext_dense.checkpoints import open_checkpoint, plan_load
from convnext_dense.checkpoints.convert import EXPORT_FORMATS, convert
from convnext_dense.checkpoints.hub import WEIGHTS
from convnext_dense.checkpoints.naming import FIRST_BLOCK, STEM
from convnext_dense.checkpoints.pretrained import Checkpoint
from convnext_dense.cli.arguments import ArgumentParser
from convnext_dense.cli.exit import exit_on_error
from convnext_dense.errors import UsageError, count
from convnext_dense.models.convnext import ARCHS, ConvNeXt
from convnext_dense.paper.tables import format_table


def parse_args():
    parser = ArgumentParser(description=__doc__)
    actions = parser.add_subparsers(dest='action', required=True)
    inspect = actions.add_parser('inspect', help='show what a file contains and what the backbone would load from it')
    inspect.add_argument('file', help='a file, a URL or a pretrained weight name')
    inspect.add_argument('--table', action='store_true', help='list every tensor, by its names in file and backbone')
    converting = actions.add_parser('convert', help='write a file in the names of another source, without loss')
    converting.add_argument('file', help='a file, a URL or a pretrained weight name')
    converting.add_argument('out', help='the file to write; .safetensors by its ending')
    converting.add_argument('--to', required=True, choices=EXPORT_FORMATS)
    listing = actions.add_parser('list', help='the published files that are known by name')
    listing.add_argument('--markdown', action='store_true', help='a table for a README')
    return parser.parse_args()


def inspect(args) -> None:
    checkpoint = open_checkpoint(args.file)
    weights = checkpoint.weights.values()
    stem = checkpoint.weights[STEM]
    dtypes = Counter(str(tensor.dtype).removeprefix('torch.') for tensor in weights)
    extra_names = checkpoint.extra_names
    facts = {
        'file': f'{checkpoint.file} ({checkpoint.file.stat().st_size / 2**20:.1f} MiB)',
        'source': checkpoint.title,
        'arch': f'{checkpoint.arch} (depths {checkpoint.parsed.depths}, channels {checkpoint.channels})',
        'tensors': f'{len(weights)} of {", ".join(f"{dtype} ({n})" for dtype, n in dtypes.items())}',
        'parameters': f'{sum(tensor.numel() for tensor in weights):,}',
        'input': count(stem.shape[1], 'channel') if stem.ndim == 4 else 'unknown',
        'classifier': f'{len(checkpoint.weights["head.weight"])} classes'
        if 'head.weight' in checkpoint.weights
        else 'none',
        'other': f'{len(extra_names)} tensors, such as {extra_names[0]}' if extra_names else 'nothing',
        'would load': _dry_run(checkpoint),
    }
    for title, fact in facts.items():
        print(f'{title:<11} {fact}')
    if args.table:
        print()
        print(format_table(('in the file', 'ours', 'shape'), list(_rows(checkpoint)), 'll'))


def _dry_run(checkpoint: Checkpoint) -> str:
    arch = dict(depths=checkpoint.parsed.depths, channels=checkpoint.channels)
    stem, block = checkpoint.weights[STEM], checkpoint.weights[FIRST_BLOCK]
    scaled = any(name.endswith('.gamma') and '.grn.' not in name for name in checkpoint.weights)
    outputs = tuple(range(len(checkpoint.parsed.depths)))
    if stem.ndim != 4 or block.ndim != 4:
        return 'nothing: its convolutions have lost their shape'
    try:
        with torch.device('meta'):
            settings = dict(layer_scale_init_value=float(scaled), use_grn=checkpoint.use_grn, out_indices=outputs)
            backbone = ConvNeXt(arch, stem.shape[1], block.shape[-1], **settings)
        return str(plan_load(backbone, checkpoint))
    except UsageError as error:
        return f'nothing: {error}'


def _rows(checkpoint: Checkpoint):
    for name, canonical in checkpoint.parsed.names.items():
        yield name, canonical, 'x'.join(map(str, checkpoint.weights[canonical].shape))
    for name in [*checkpoint.parsed.unknown, *checkpoint.parsed.other_names]:
        yield name, '-', ''


def list_weights(args) -> None:
    rows = []
    for name, entry in WEIGHTS.items():
        rows.append(
            (
                name,
                entry.training,
                entry.license,
                _size(name) if entry.backbone == 'ConvNeXt' else '',
                entry.url or entry.request_url,
            )
        )
    print(format_table(('name', 'weights', 'license', 'backbone, MB', 'address'), rows, 'lllrl', args.markdown))


def _size(name: str) -> str:
    """Of the backbone in fp32, to the MB."""
    arch = next(arch for arch in sorted(ARCHS, key=len, reverse=True) if re.search(rf'_{arch}[_.]', name))
    with torch.device('meta'):
        backbone = ConvNeXt(arch, use_grn='v2' in name)
    return f'{sum(p.numel() for p in backbone.parameters()) * 4 / 1e6:.0f}'


def main():
    args = parse_args()
    with exit_on_error():
        if args.action == 'convert':
            n = convert(args.file, args.out, args.to)
            print(f'{args.out}: {n} tensors in the names of {args.to}')
        else:
            {'inspect': inspect, 'list': list_weights}[args.action](args)


if __name__ == '__main__':
    main()
