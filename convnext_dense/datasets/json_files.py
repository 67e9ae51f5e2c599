"""Reading JSON files of any size and encoding."""

import json
from pathlib import Path

from ..errors import UsageError
from .files import BOMS, open_regular, parse_error, size_of, to_one_line

HEADER_BYTES = 4096  # of a file, by which its format is recognized
MAX_JSON_BYTES = 8 * 2**30
JSON_WHITESPACE = b' \t\r\n\0' + b''.join(BOMS)  # before the first character, in any encoding


def read_json(path: Path) -> object:
    """Read a JSON file.

    Raises:
        UsageError: it does not exist, is truncated or not valid JSON, or is large and does not hold a list or dict.
    """
    try:
        with open_regular(path, MAX_JSON_BYTES) as file:
            start, size = file.read(HEADER_BYTES), size_of(file)
            file.seek(0)
            first = start.lstrip(JSON_WHITESPACE)[:1]
            content = file.read(size) if first in (b'{', b'[') or size <= HEADER_BYTES else None
    except OSError as error:
        raise UsageError(f'{path}: {error.strerror}') from error
    if content is None:
        raise UsageError(f'{path} is not JSON of a data set: it begins with {to_one_line(start[:20])}')
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = parse_error(error)
        raise UsageError(f'{path} is truncated or not valid JSON ({reason}): download or write it again') from error
