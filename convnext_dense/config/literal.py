"""Parse the configs that mmengine writes into checkpoints and logs, without executing them."""

import ast

from mmengine.config import Config

from ..errors import UsageError

ALLOWED_CALLS = {'dict': dict, 'list': list, 'set': set, 'tuple': tuple}
ALLOWED_NAMES = {'inf': float('inf'), 'nan': float('nan')}


def parse_config_literal(text: str) -> Config:
    """Parse the text of a config as data.

    Args:
        text: Assignments `key = value`, with literals or calls such as dict(...) as values.

    Raises:
        UsageError: If the text contains anything else.
    """
    try:
        statements = ast.parse(text).body
        return Config({_parse_key(statement): _parse_value(statement.value) for statement in statements})
    except (SyntaxError, ValueError, TypeError, AttributeError, KeyError, RecursionError, MemoryError) as error:
        raise UsageError(f'the config is not plain data ({str(error)[:200] or type(error).__name__})') from error


def _parse_key(statement: ast.stmt) -> str:
    if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
        raise ValueError(f'line {statement.lineno} is not an assignment')
    return statement.targets[0].id


def _parse_value(node: ast.expr) -> object:
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)](map(_parse_value, node.elts))
    if isinstance(node, ast.Dict):
        return {_parse_value(key): _parse_value(value) for key, value in zip(node.keys, node.values)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ALLOWED_CALLS:
        kwargs = {}
        for keyword in node.keywords:
            kwargs |= {keyword.arg: _parse_value(keyword.value)} if keyword.arg else _parse_value(keyword.value)
        return ALLOWED_CALLS[node.func.id](*map(_parse_value, node.args), **kwargs)
    if isinstance(node, ast.Name) and node.id in ALLOWED_NAMES:
        return ALLOWED_NAMES[node.id]
    return ast.literal_eval(node)
