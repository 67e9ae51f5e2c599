"""What the user gave cannot be used."""


class UsageError(ValueError):
    """Bad input: one line that names the thing and the way out. The tools print it and leave with exit code 2."""
