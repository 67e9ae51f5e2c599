"""Parameter names of ConvNeXt in each code base, one `NamingScheme` per code base.

The canonical names are those of the original code, which the backbone also uses. A new code base is a new entry in
`NAMING_SCHEMES`; names are generated from it for the depths of a file, so that renaming works in both directions.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from ..errors import UsageError

OUTPUT_NORM_RE = re.compile(r'norm\d+\.(weight|bias)')
TRUNK_RE = re.compile(r'(downsample_layers|stages)\.(\d+)\.')
VECTOR_PARAMS = ('gamma', 'grn.gamma', 'grn.beta')
DINOV3_DUPLICATE_PREFIX = 'norms.'  # Meta's files of DINOv3 contain the final norm twice
BLOCK_LAYERS = ('dwconv', 'norm', 'pwconv1', 'pwconv2')  # the layers of a block with weight and bias
STEM, FIRST_BLOCK = 'downsample_layers.0.0.weight', 'stages.0.0.dwconv.weight'


@dataclass(frozen=True)
class NamingScheme:
    """Naming scheme of a code base.

    Templates may contain {i}, the stage, {b}, the block, {j}, the first or second layer of stem and downsampling,
    {even}, {odd} and {next}, 2i, 2i + 1 and i + 1, and {embedding}, transformers' name of a layer of the stem.

    Attributes:
        key (str): Short name of the code base.
        title (str): Name of the code base in messages.
        stem (str): Template of the stem's layers.
        downsample (str): Template of the downsampling layers.
        block (str): Template of a block.
        block_params (dict[str, str]): Name of each layer or parameter of a block by canonical name; those that are
            missing do not exist in the code base.
        norm (str): Name of the final norm.
        head (str): Name of the classifier.
        output_norms (str, optional): Template of the output norms, if the code base has them.
        shapes (dict[str, tuple[int, ...]]): Shapes that differ from the canonical ones, by `block_params`.
        prefix (str): Prefix of the names of trunk and final norm in exported files; on reading, any prefix is accepted.
        final_norm_as_output (bool): Whether the final norm may have the name of the last output norm.
    """

    key: str
    title: str
    stem: str
    downsample: str
    block: str
    block_params: dict[str, str]
    norm: str
    head: str
    output_norms: str | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    prefix: str = ''
    final_norm_as_output: bool = False

    def to_source_name(self, name: str) -> str | None:
        """Return the name in this scheme, without prefix, for a canonical name; None if there is none."""
        root, *rest = name.split('.')
        if root in ('norm', 'head'):
            return '.'.join([getattr(self, root), *rest])
        if root.startswith('norm'):
            return self.output_norms and '.'.join([_fill_template(self.output_norms, root[4:]), *rest])
        i, j, *leaf = rest
        if root == 'downsample_layers':
            return '.'.join([_fill_template(self.stem if i == '0' else self.downsample, i, j=j), *leaf])
        param = self.block_params.get('.'.join(leaf))
        if param is None and leaf[0] in self.block_params:
            param = f'{self.block_params[leaf[0]]}.{leaf[-1]}'
        return f'{_fill_template(self.block, i, b=j)}.{param}' if param else None

    def is_trunk_name(self, source_name: str) -> bool:
        """Return whether a name without prefix starts like those of stem, downsampling, blocks and output norms."""
        templates = (self.stem, self.downsample, self.block, self.output_norms or self.stem)
        roots = tuple(re.match(r'\w+', template)[0] for template in templates)
        return source_name.startswith(roots) and not source_name.startswith(DINOV3_DUPLICATE_PREFIX)

    def to_source_shape(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Reshape a tensor of canonical shape and name to the shape in this scheme."""
        return tensor.reshape(self.shapes.get(_param_kind(name), tensor.shape))


def to_canonical_shape(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Remove the dimensions of size 1 that some code bases add to vectors and to the weights of Linears.

    Args:
        name: Canonical name of the parameter.
        tensor: Value in the shape of any code base.

    Returns:
        The tensor in the backbone's shape, or unchanged if removing such dimensions does not give it.
    """
    kind = _param_kind(name)
    if kind in VECTOR_PARAMS:
        return tensor.reshape(-1) if tensor.ndim > 1 and tensor.numel() == max(tensor.shape) else tensor
    if kind in ('pwconv1.weight', 'pwconv2.weight') and tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        return tensor.flatten(1)
    return tensor


def canonical_names(depths: Sequence[int]) -> Iterator[str]:
    """Yield all canonical names of a ConvNeXt (V1 or V2) of these depths, with classifier and norms."""
    modules = [f'downsample_layers.{i}.{j}' for i in range(len(depths)) for j in range(2)]
    blocks = [f'stages.{i}.{b}' for i, depth in enumerate(depths) for b in range(depth)]
    modules += [f'{block}.{layer}' for block in blocks for layer in BLOCK_LAYERS]
    modules += ['norm', 'head', *(f'norm{i}' for i in range(len(depths)))]
    yield from (f'{module}.{leaf}' for module in modules for leaf in ('weight', 'bias'))
    yield from (f'{block}.{vector}' for block in blocks for vector in VECTOR_PARAMS)


@dataclass(frozen=True)
class ParsedNames:
    """Parsed parameter names of a file.

    Attributes:
        scheme (NamingScheme): The scheme that the names follow.
        prefix (str): Prefix of the names of the trunk.
        depths (tuple[int, ...]): Number of blocks per stage.
        names (dict[str, str]): Canonical names by the names in the file.
        unknown (list[str]): Names that look like parameters of the trunk but match none.
        other_names (list[str]): Names that do not belong to a ConvNeXt.
    """

    scheme: NamingScheme
    prefix: str
    depths: tuple[int, ...]
    names: dict[str, str]
    unknown: list[str]
    other_names: list[str]


def detect_scheme(names: Iterable[str]) -> ParsedNames | None:
    """Detect the naming scheme of a file.

    Args:
        names: The parameter names in the file.

    Returns:
        The parsed names; None if they match no scheme.

    Raises:
        UsageError: If the file contains several ConvNeXts.
    """
    names = list(names)
    matches = []
    for scheme in NAMING_SCHEMES:
        suffixes = [scheme.to_source_name(marker) for marker in (STEM, FIRST_BLOCK)]
        prefixes = [{n.removesuffix(s) for n in names if n == s or n.endswith(f'.{s}')} for s in suffixes]
        matches += [(scheme, prefix) for prefix in set.intersection(*prefixes)]
    if not matches:
        return None
    if len(matches) > 1:
        raise UsageError(
            f'it contains several ConvNeXts ({", ".join(sorted(p or "without prefix" for _, p in matches))}): '
            'keep one of them in the file'
        )
    return _parse_names(*matches[0], names)


def _parse_names(scheme: NamingScheme, prefix: str, names: list[str]) -> ParsedNames:
    bare = {n: n.removeprefix(prefix) for n in names if n.startswith(prefix)}
    depths = _count_blocks(scheme, bare.values())
    canonical = {scheme.to_source_name(name): name for name in canonical_names(depths)}
    parsed = {n: canonical[b] for n, b in bare.items() if b in canonical}
    for name in ('head.weight', 'head.bias', 'norm.weight', 'norm.bias'):  # may lack the prefix
        if name not in parsed.values() and scheme.to_source_name(name) in names:
            parsed[scheme.to_source_name(name)] = name
    output_norms = {name for name in parsed.values() if OUTPUT_NORM_RE.fullmatch(name)}
    if scheme.final_norm_as_output and output_norms == {f'norm{len(depths) - 1}.{leaf}' for leaf in ('weight', 'bias')}:
        parsed = {n: re.sub(r'^norm\d+', 'norm', name) for n, name in parsed.items()}
    rest = [n for n in names if n not in parsed]
    unknown = [n for n in rest if scheme.is_trunk_name(bare.get(n, ''))]
    return ParsedNames(scheme, prefix, depths, parsed, unknown, [n for n in rest if n not in unknown])


def _count_blocks(scheme: NamingScheme, names: Iterable[str]) -> tuple[int, ...]:
    modules = {'.'.join(parts[:n]) for parts in (name.split('.') for name in names) for n in range(1, len(parts))}
    depths = []
    while True:
        b = 0
        while _fill_template(scheme.block, len(depths), b=b) in modules:
            b += 1
        if not b:
            return tuple(depths)
        depths.append(b)


def _fill_template(template: str, i: int | str, **indices) -> str:
    i = int(i)
    embedding = {'0': 'patch_embeddings', '1': 'layernorm'}.get(indices.get('j'))
    return template.format(i=i, even=2 * i, odd=2 * i + 1, next=i + 1, embedding=embedding, **indices)


def _param_kind(name: str) -> str:
    """Return the name of a parameter within its block; the name itself outside of blocks."""
    return '.'.join(name.split('.')[3:]) if name.startswith('stages.') else name


_GRN_4D = {'grn.gamma': (1, 1, 1, -1), 'grn.beta': (1, 1, 1, -1)}


def _block(*source_names: str) -> dict[str, str]:
    """Map the canonical names of a block's parts to those of a code base, in order; the last ones may be missing."""
    return dict(zip((*BLOCK_LAYERS, *VECTOR_PARAMS), source_names))


ORIGINAL = NamingScheme(
    key='original',
    title='the original code',
    stem='downsample_layers.0.{j}',
    downsample='downsample_layers.{i}.{j}',
    block='stages.{i}.{b}',
    block_params=_block(*BLOCK_LAYERS, *VECTOR_PARAMS),
    norm='norm',
    head='head',
    output_norms='norm{i}',
    shapes=_GRN_4D,
)
MMPRETRAIN = replace(
    ORIGINAL,
    key='mmpretrain',
    title='mmpretrain',
    block_params=_block('depthwise_conv', 'norm', 'pointwise_conv1', 'pointwise_conv2', *VECTOR_PARAMS),
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
    block_params=_block('conv_dw', 'norm', 'mlp.fc1', 'mlp.fc2', 'gamma', 'mlp.grn.weight', 'mlp.grn.bias'),
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
    block_params=_block('block.0', 'block.2', 'block.3', 'block.5', 'layer_scale'),
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
    block_params=_block('dwconv', 'layernorm', 'pwconv1', 'pwconv2', 'layer_scale_parameter', 'grn.weight', 'grn.bias'),
    norm='layernorm',
    head='classifier',
    output_norms='hidden_states_norms.stage{next}',
    shapes=_GRN_4D,
    prefix='convnext.',
)
DINOV3 = NamingScheme(
    key='dinov3_transformers',
    title='DINOv3 by transformers',
    stem='stages.0.downsample_layers.{j}',
    downsample='stages.{i}.downsample_layers.{j}',
    block='stages.{i}.layers.{b}',
    block_params=_block('depthwise_conv', 'layer_norm', 'pointwise_conv1', 'pointwise_conv2', 'gamma'),
    norm='layer_norm',
    head='head',
    prefix='model.',
)
NAMING_SCHEMES = (ORIGINAL, MMPRETRAIN, TIMM, TIMM_FEATURES, TORCHVISION, TRANSFORMERS, DINOV3)
