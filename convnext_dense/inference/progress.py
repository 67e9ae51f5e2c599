"""A progress bar for predictions."""

import sys
import time
from typing import TextIO

BAR_WIDTH = 24  # characters
LINE_INTERVAL = 30  # seconds between lines if the output is not a terminal


class Progress:
    """Shows the number of finished images, the rate and the remaining time.

    Args:
        total: Number of images; 0 if unknown.
        unit: Plural name of what is counted.
        file: Output stream. Defaults to `sys.stderr`.
    """

    def __init__(self, total: int, unit: str = 'images', file: TextIO | None = None):
        self.total, self.unit, self.file = total, unit, file or sys.stderr
        self.done, self.start = 0, time.monotonic()
        self.is_terminal = self.file.isatty()
        self.shown_at = self.start if not self.is_terminal else 0.0

    @property
    def rate(self) -> float:
        """Images per second since the start."""
        return self.done / max(time.monotonic() - self.start, 1e-9)

    def update(self, n: int = 1) -> None:
        """Count `n` images as done."""
        self.done += n
        now = time.monotonic()
        if now - self.shown_at >= (0.1 if self.is_terminal else LINE_INTERVAL) or (
            self.is_terminal and self.done == self.total
        ):
            self.shown_at = now
            self._write(self._line() if self.is_terminal else f'{self._line()}\n')

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        self._write(f'{line}\n')

    def close(self) -> None:
        """Show the final state and end the line of the bar."""
        if self.is_terminal and self.done:
            self._write(f'{self._line()}\n')

    def _write(self, text: str) -> None:
        self.file.write(f'\r\033[K{text}' if self.is_terminal else text)
        self.file.flush()

    def _line(self) -> str:
        rate = f'{self.rate:.1f} {self.unit}/s'
        if not self.total:
            return f'{self.done:,} {self.unit}, {rate}'
        filled = BAR_WIDTH * self.done // self.total
        seconds = round((self.total - self.done) / max(self.rate, 1e-9))
        eta = f'{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}'
        bar = '#' * filled + '.' * (BAR_WIDTH - filled)
        return f'[{bar}] {self.done:,}/{self.total:,}, {rate}, ETA {eta}'
