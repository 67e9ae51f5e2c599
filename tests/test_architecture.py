"""The direction of imports between the sub-packages: each may import from those before it, without cycles."""

import ast
import importlib
import importlib.util
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import convnext_dense
from convnext_dense._moved import MOVED, MovedModuleFinder

PACKAGE = Path(convnext_dense.__file__).parent
# From the foundation up. Sub-packages in one entry do not import from each other.
LAYERS = (
    {'errors'},
    {'channel_files'},
    {'mmengine_internals'},
    {'type_names', '_moved'},
    {'registry'},
    {'ops'},
    {'models'},
    {'checkpoints', 'optim'},
    {'engine', 'evaluation'},
    {'config'},
    {'datasets', 'paper'},
    {'inference'},
    {'export'},
    {'cli'},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def modules() -> dict[str, Path]:
    files = (path for path in PACKAGE.rglob('*.py') if '.mim' not in path.parts)
    names = {'.'.join(path.relative_to(PACKAGE).with_suffix('').parts): path for path in files}
    return {name.removesuffix('.__init__'): path for name, path in names.items() if name != '__init__'}


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules of the package that a module imports, inside functions too."""
    parents = name.split('.') if path.name == '__init__.py' else name.split('.')[:-1]
    targets = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = parents[: len(parents) - node.level + 1] + (node.module.split('.') if node.module else [])
            for alias in node.names:
                full = '.'.join([*base, alias.name])
                targets.add(full if full in known else '.'.join(base))
        else:
            assert not (isinstance(node, ast.ImportFrom) and (node.module or '').startswith('convnext_dense'))
            assert not (isinstance(node, ast.Import) and any(a.name.startswith('convnext_dense') for a in node.names))
    return targets - {name, ''}


def test_every_module_has_a_layer():
    assert {name.split('.')[0] for name in modules()} <= LEVEL.keys()


def test_imports_follow_the_layers_without_cycles():
    known = modules()
    graph = {name: imports(name, path, set(known)) for name, path in known.items()}
    for name, targets in graph.items():
        package = name.split('.')[0]
        for target in targets:
            target_package = target.split('.')[0]
            assert target_package == package or LEVEL[target_package] < LEVEL[package], f'{name} imports {target}'
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_package_does_not_import_benchmarks_tools_or_tests():
    for name, path in modules().items():
        for node in ast.walk(tree(path)):
            top = {a.name.split('.')[0] for a in node.names} if isinstance(node, ast.Import) else set()
            top |= {(node.module or '').split('.')[0]} if isinstance(node, ast.ImportFrom) and not node.level else set()
            assert not top & {'benchmarks', 'tools', 'tests'}, name


@pytest.mark.parametrize('old', MOVED)
def test_old_import_paths_name_the_new_modules(old):
    assert old not in modules(), 'this module exists again: take it out of MOVED'
    names = MOVED[old].split()
    assert names and set(names) <= modules().keys()
    with pytest.raises(ImportError, match=f'convnext_dense.{old} has moved: import convnext_dense.{names[0]}'):
        importlib.import_module(f'convnext_dense.{old}')
    for name in names:
        assert importlib.util.find_spec(f'convnext_dense.{name}') is not None


def test_moved_module_finder_is_installed_once():
    importlib.invalidate_caches()  # calls all of them
    assert sum(isinstance(finder, MovedModuleFinder) for finder in sys.meta_path) == 1


# Sub-packages that use mmengine, and private names that are not mmengine's or torch's.
MMENGINE_PACKAGES = {'registry', 'type_names', 'engine', 'evaluation', 'config', 'datasets', 'paper'}
OWN_PRIVATE_NAMES = {'_replace', '_fields', '_asdict', '_exit'}


def test_private_members_of_mmengine_are_used_in_one_file_only():
    for name, path in modules().items():
        if name.split('.')[0] not in MMENGINE_PACKAGES:
            continue
        for node in ast.walk(tree(path)):
            private = isinstance(node, ast.Attribute) and node.attr.startswith('_') and not node.attr.startswith('__')
            if private and node.attr not in OWN_PRIVATE_NAMES:
                assert isinstance(node.value, ast.Name) and node.value.id in ('self', 'cls'), f'{name}: {node.attr}'
