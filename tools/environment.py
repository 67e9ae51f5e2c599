"""Imported first by every tool: outside the project's environment it says in one line what to do."""

import importlib.util
import sys

missing = [name for name in ('torch', 'mmengine', 'convnext_dense') if importlib.util.find_spec(name) is None]
if missing:
    print(
        f'error: {sys.executable} has no {", ".join(missing)}: run the tool with the Python of the environment that '
        "has them (.venv/bin/python), or set one up with make setup (README, 'Install')",
        file=sys.stderr,
    )
    sys.exit(2)
