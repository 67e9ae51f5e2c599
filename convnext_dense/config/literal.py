"""Configs that mmengine wrote out, read as data: nothing in them runs."""

import ast

from mmengine.config import Config

from ..errors import UsageError

BUILDERS = {'dict': dict, 'list': list, 'set': set, 'tuple': tuple}
NAMES = {'inf': float('inf'), 'nan': float('nan')}


def read_dumped(text: str) -> Config:
    """The config of a text of assignments `key = value`, where values are plain Python: numbers, texts, dict(...).

    Raises:
        UsageError: the text holds anything else.
    """
    try:
        statements = ast.parse(text).body
        return Config({_key(statement): _value(statement.value) for statement in statements})
    except (SyntaxError, ValueError, TypeError, AttributeError, KeyError, RecursionError, MemoryError) as error:
        raise UsageError(f'the config is not plain data ({str(error)[:200] or type(error).__name__})') from error


def _key(statement: ast.stmt) -> str:
    if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
        raise ValueError(f'line {statement.lineno} is no assignment')
    return statement.targets[0].id


def _value(node: ast.expr):
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)](map(_value, node.elts))
    if isinstance(node, ast.Dict):
        return {_value(key): _value(value) for key, value in zip(node.keys, node.values)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BUILDERS:
        named = {}
        for keyword in node.keywords:
            named |= {keyword.arg: _value(keyword.value)} if keyword.arg else _value(keyword.value)
        return BUILDERS[node.func.id](*map(_value, node.args), **named)
    if isinstance(node, ast.Name) and node.id in NAMES:
        return NAMES[node.id]
    return ast.literal_eval(node)
