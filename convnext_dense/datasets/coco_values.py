"""Values of COCO json as other programs write them: numbers, ids and names."""

import math
import re

from .files import is_text

INTEGER_RE = re.compile(r'(0|-?[1-9][0-9]{0,19})(\.0+)?')


def is_number(value: object) -> bool:
    """Return whether a value is a number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finite(value: float) -> bool:
    """Return whether a number is finite; integers may be too large for a float."""
    return isinstance(value, int) or math.isfinite(value)


def is_positive(value: object) -> bool:
    """Return whether a value is a number above 0."""
    return is_number(value) and value > 0


def parse_id(value: object) -> int | str | None:
    """Return an id that compares equal however it is written (1.0 and '1' are 1); None if it is not an id."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        number = INTEGER_RE.fullmatch(value)
        return int(number[1]) if number else value
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def category_name(category: dict) -> str | None:
    """Return the name of a category, None if it has none."""
    name = category.get('name')
    name = str(name) if is_number(name) else name
    return name if isinstance(name, str) and name.strip() and is_text(name) else None


def only_dicts(values: object) -> list[dict]:
    """Return those values of a list that are dicts; none of anything else."""
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def as_dicts(values: object) -> list[dict]:
    """Return the values of a list, an empty dict for each that is none: what it lacks is reported as of others."""
    return list(map(as_dict, values)) if isinstance(values, list) else []


def as_dict(value: object) -> dict:
    """Return a dict, an empty one for anything else."""
    return value if isinstance(value, dict) else {}
