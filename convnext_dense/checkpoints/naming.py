"""The sources of ConvNeXt weights: one entry each, how it names what we name as the original code did.

A new source is a new entry. Names are built from it for the depths that a file has, so that renaming works both ways.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..errors import UsageError

OUTPUT_NORM_RE = re.compile(r'norm\d+\.(weight|bias)')
TRUNK_RE = re.compile(r'(downsample_layers|stages)\.(\d+)\.')
VECTOR_PARAMS = ('gamma', 'grn.gamma', 'grn.beta')
DINOV3_DUPLICATE_PREFIX = 'norms.'  # DINOv3 by Meta holds its final norm twice
PATCH_EMBED_LAYERS = ('dwconv', 'norm', 'pwconv1', 'pwconv2')  # the parts of a block with weight and bias
STEM, FIRST_BLOCK = 'downsample_layers.0.0.weight', 'stages.0.0.dwconv.weight'


@dataclass(frozen=True)
class NamingScheme:
    """How a source names parameters.

    Templates hold {i} for the stage, {b} for the block, {j} for the first or second layer of stem and downsampling,
    {even}, {odd} and {next} for 2i, 2i + 1 and i + 1, {embedding} for what transformers calls the stem's layers.
    `parts` maps our names inside a block to theirs; what is not in it does not exist there. `shapes` are theirs where
    they differ from ours, by our names of parts. `prefix` stands before the names of trunk and final norm when a file
    is written; when one is read any prefix will do.
    """

    key: str
    title: str
    stem: str
    downsample: str
    block: str
    parts: dict[str, str]
    norm: str
    head: str
    outputs: str | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    prefix: str = ''
    # Its final norm may bear the name of the last output norm.
    final_norm_as_output: bool = False

    def name(self, ours: str) -> str | None:
        """Their name, without prefix, of one of ours; None where they have none."""
        kind, *rest = ours.split('.')
        if kind in ('norm', 'head'):
            return '.'.join([getattr(self, kind), *rest])
        if kind.startswith('norm'):
            return self.outputs and '.'.join([_fill_template(self.outputs, kind[4:]), *rest])
        i, j, *leaf = rest
        if kind == 'downsample_layers':
            return '.'.join([_fill_template(self.stem if i == '0' else self.downsample, i, j=j), *leaf])
        part = self.parts.get('.'.join(leaf)) or (leaf[0] in self.parts and f'{self.parts[leaf[0]]}.{leaf[-1]}')
        return f'{_fill_template(self.block, i, b=j)}.{part}' if part else None

    def is_ours(self, theirs: str) -> bool:
        """Whether a name, without prefix, begins as those of stem, downsampling, blocks and output norms do."""
        templates = (self.stem, self.downsample, self.block, self.outputs or self.stem)
        return theirs.startswith(tuple(re.match(r'\w+', t)[0] for t in templates)) and not theirs.startswith(
            DINOV3_DUPLICATE_PREFIX
        )

    def to_theirs(self, ours: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.reshape(self.shapes.get(_param_kind(ours), tensor.shape))


def to_canonical(ours: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of any source in our shape: vectors and Linears without the ones that some put at their shape."""
    part = _param_kind(ours)
    if part in VECTOR_PARAMS:
        return tensor.reshape(-1) if tensor.ndim > 1 and tensor.numel() == max(tensor.shape) else tensor
    if part in ('pwconv1.weight', 'pwconv2.weight') and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor.flatten(1)
    return tensor


def canonical_names(depths: Sequence[int]) -> Iterator[str]:
    """All names that a ConvNeXt, V1 or V2, with these depths may have in a file, classifier and output norms too."""
    places = [f'downsample_layers.{i}.{j}' for i in range(len(depths)) for j in range(2)]
    blocks = [f'stages.{i}.{b}' for i, depth in enumerate(depths) for b in range(depth)]
    places += [f'{block}.{layer}' for block in blocks for layer in PATCH_EMBED_LAYERS]
    places += ['norm', 'head', *(f'norm{i}' for i in range(len(depths)))]
    yield from (f'{place}.{leaf}' for place in places for leaf in ('weight', 'bias'))
    yield from (f'{block}.{vector}' for block in blocks for vector in VECTOR_PARAMS)


@dataclass(frozen=True)
class ParsedNames:
    """What a file's names are: `names` maps those that we know to ours, `unknown` look like the trunk's but are not,
    `others` belong to no ConvNeXt."""

    format: NamingScheme
    prefix: str
    depths: tuple[int, ...]
    names: dict[str, str]
    unknown: list[str]
    others: list[str]


def detect_scheme(names: Iterable[str]) -> ParsedNames | None:
    """Of which source these names are, by the names alone; None where they are of none.

    Raises:
        UsageError: there are several ConvNeXts in it.
    """
    names = list(names)
    found = []
    for source in NAMING_SCHEMES:
        ends = [source.name(marker) for marker in (STEM, FIRST_BLOCK)]
        prefixes = [{n.removesuffix(e) for n in names if n == e or n.endswith(f'.{e}')} for e in ends]
        found += [(source, prefix) for prefix in set.intersection(*prefixes)]
    if not found:
        return None
    if len(found) > 1:
        raise UsageError(
            f'it holds several ConvNeXts ({", ".join(sorted(p or "without prefix" for _, p in found))}): '
            'keep one of them in the file'
        )
    return _parse_names(*found[0], names)


def _parse_names(source: NamingScheme, prefix: str, names: list[str]) -> ParsedNames:
    bare = {n: n.removeprefix(prefix) for n in names if n.startswith(prefix)}
    depths = _depths(source, bare.values())
    ours = {source.name(name): name for name in canonical_names(depths)}
    known = {n: ours[b] for n, b in bare.items() if b in ours}
    for name in ('head.weight', 'head.bias', 'norm.weight', 'norm.bias'):  # may stand outside the prefix
        if name not in known.values() and source.name(name) in names:
            known[source.name(name)] = name
    if source.final_norm_as_output and {o for o in known.values() if OUTPUT_NORM_RE.fullmatch(o)} == set(
        _final_norm_stage(depths)
    ):
        known = {n: re.sub(r'^norm\d+', 'norm', o) for n, o in known.items()}
    left = [n for n in names if n not in known]
    unknown = [n for n in left if source.is_ours(bare.get(n, ''))]
    return ParsedNames(source, prefix, depths, known, unknown, [n for n in left if n not in unknown])


def _depths(source: NamingScheme, names: Iterable[str]) -> tuple[int, ...]:
    starts = {'.'.join(parts[:n]) for parts in (name.split('.') for name in names) for n in range(1, len(parts))}
    depths = []
    while True:
        b = 0
        while _fill_template(source.block, len(depths), b=b) in starts:
            b += 1
        if not b:
            return tuple(depths)
        depths.append(b)


def _final_norm_stage(depths: Sequence[int]) -> tuple[str, str]:
    return f'norm{len(depths) - 1}.weight', f'norm{len(depths) - 1}.bias'


def _fill_template(template: str, i: int | str, **place) -> str:
    i = int(i)
    embedding = {'0': 'patch_embeddings', '1': 'layernorm'}.get(place.get('j'))
    return template.format(i=i, even=2 * i, odd=2 * i + 1, next=i + 1, embedding=embedding, **place)


def _param_kind(ours: str) -> str:
    return '.'.join(ours.split('.')[3:]) if ours.startswith('stages.') else ours


_GAMMA = {'gamma': 'gamma'}
_GRN = {'grn.gamma': 'grn.gamma', 'grn.beta': 'grn.beta'}
_GRN_HF = {'grn.gamma': 'grn.weight', 'grn.beta': 'grn.bias'}
_GRN_4D = {'grn.gamma': (1, 1, 1, -1), 'grn.beta': (1, 1, 1, -1)}


def _layers(*theirs: str) -> dict[str, str]:
    return dict(zip(PATCH_EMBED_LAYERS, theirs))


ORIGINAL = NamingScheme(
    key='original',
    title='the original code',
    stem='downsample_layers.0.{j}',
    downsample='downsample_layers.{i}.{j}',
    block='stages.{i}.{b}',
    parts={**_layers(*PATCH_EMBED_LAYERS), **_GAMMA, **_GRN},
    norm='norm',
    head='head',
    outputs='norm{i}',
    shapes=_GRN_4D,
)
MMPRETRAIN = replace(
    ORIGINAL,
    key='mmpretrain',
    title='mmpretrain',
    parts={**_layers('depthwise_conv', 'norm', 'pointwise_conv1', 'pointwise_conv2'), **_GAMMA, **_GRN},
    head='head.fc',
    shapes={},
    prefix='backbone.',
    final_norm_as_output=True,
)
TIMM = NamingScheme(
    key='timm',
    title='timm',
    stem='stem.{j}',
    downsample='stages.{i}.downsample.{j}',
    block='stages.{i}.blocks.{b}',
    parts={
        **_layers('conv_dw', 'norm', 'mlp.fc1', 'mlp.fc2'),
        **_GAMMA,
        'grn.gamma': 'mlp.grn.weight',
        'grn.beta': 'mlp.grn.bias',
    },
    norm='head.norm',
    head='head.fc',
)
TIMM_FEATURES = replace(
    TIMM,
    key='timm_features',
    title='timm, features only',
    stem='stem_{j}',
    downsample='stages_{i}.downsample.{j}',
    block='stages_{i}.blocks.{b}',
)
TORCHVISION = NamingScheme(
    key='torchvision',
    title='torchvision',
    stem='features.0.{j}',
    downsample='features.{even}.{j}',
    block='features.{odd}.{b}',
    parts={**_layers('block.0', 'block.2', 'block.3', 'block.5'), 'gamma': 'layer_scale'},
    norm='classifier.0',
    head='classifier.2',
    shapes={'gamma': (-1, 1, 1)},
)
TRANSFORMERS = NamingScheme(
    key='transformers',
    title='transformers',
    stem='embeddings.{embedding}',
    downsample='encoder.stages.{i}.downsampling_layer.{j}',
    block='encoder.stages.{i}.layers.{b}',
    parts={**_layers('dwconv', 'layernorm', 'pwconv1', 'pwconv2'), 'gamma': 'layer_scale_parameter', **_GRN_HF},
    norm='layernorm',
    head='classifier',
    outputs='hidden_states_norms.stage{next}',
    shapes=_GRN_4D,
    prefix='convnext.',
)
DINOV3 = NamingScheme(
    key='dinov3_transformers',
    title='DINOv3 by transformers',
    stem='stages.0.downsample_layers.{j}',
    downsample='stages.{i}.downsample_layers.{j}',
    block='stages.{i}.layers.{b}',
    parts={**_layers('depthwise_conv', 'layer_norm', 'pointwise_conv1', 'pointwise_conv2'), **_GAMMA},
    norm='layer_norm',
    head='head',
    prefix='model.',
)
NAMING_SCHEMES = (ORIGINAL, MMPRETRAIN, TIMM, TIMM_FEATURES, TORCHVISION, TRANSFORMERS, DINOV3)
