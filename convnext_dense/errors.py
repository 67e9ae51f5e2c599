"""What ends a tool in one line: input that cannot be used, and a run that cannot go on."""


class UsageError(ValueError):
    """Bad input: one line that names the thing and the way out. The tools print it and leave with exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on: one line with the cause, what was saved and the way out. The tools print it and leave
    with its exit code."""

    exit_code = 1


class Stopped(RunError):
    """A run that was asked to stop, by a signal."""

    def __init__(self, line: str, signal: int = 15):
        super().__init__(line)
        self.exit_code = 128 + signal


class UnreadableImage(RunError):
    """An image or label map that cannot be read: its path and why."""
