"""Reading and writing in parallel to the model: in order, with bounded memory."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from convnext_dense.errors import TrainingError
from convnext_dense.inference.batch_prediction import MAX_WAITING, OrderedWriting, explain_out_of_memory, prefetch
from convnext_dense.inference.options import PredictOptions
from convnext_dense.inference.progress import Progress


def test_prefetch_is_bounded():
    started = []
    with ThreadPoolExecutor(2) as pool:
        items = prefetch(pool, lambda i: started.append(i) or 10 * i, range(100), 5)
        for n, (item, future) in enumerate(items):
            assert item == n and future.result() == 10 * n
            assert len(started) <= n + 5
    assert sorted(started) == list(range(100))


def test_error_of_a_reader_concerns_its_item_only():
    with ThreadPoolExecutor(2) as pool:
        futures = [future for _, future in prefetch(pool, lambda i: 1 / i, [1, 0, 2], 2)]
    assert [futures[0].result(), futures[2].result()] == [1, 0.5]
    with pytest.raises(ZeroDivisionError):
        futures[1].result()


def test_results_are_recorded_in_order_with_a_bounded_queue():
    recorded, open_tasks, max_open = [], 0, 0
    lock = threading.Lock()

    def write(i):
        nonlocal open_tasks
        time.sleep(0.002 * (3 - i % 4))  # later ones end earlier
        with lock:
            open_tasks -= 1
        return threading.get_ident()

    def record(i, thread):
        recorded.append(i)
        assert thread != threading.get_ident()

    with ThreadPoolExecutor(4) as pool:
        writing = OrderedWriting(pool, record)
        for i in range(40):
            with lock:
                open_tasks += 1
                max_open = max(max_open, open_tasks)
            writing.submit(i, write, i)
            assert len(writing.waiting) <= MAX_WAITING
        writing.finish()
    assert recorded == list(range(40)) and max_open <= MAX_WAITING + 2


def test_error_of_a_writer_is_raised():
    with ThreadPoolExecutor(1) as pool:
        writing = OrderedWriting(pool, lambda *args: None)
        with pytest.raises(ZeroDivisionError):
            writing.submit(0, lambda: 1 / 0)
            writing.finish()


def test_out_of_memory_is_a_one_line_error():
    import torch

    for size, words in ((4, '--batch-size below 4'), (1, '--tile')):
        with pytest.raises(TrainingError, match=words), explain_out_of_memory(PredictOptions(batch_size=size)):
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')


class Terminal:
    def __init__(self, is_terminal):
        self.text, self.isatty = '', lambda: is_terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_progress_shows_rate_and_eta():
    terminal = Terminal(True)
    progress = Progress(4, file=terminal)
    progress.start -= 2
    progress.update()
    progress.print('skipped a.jpg: why')
    progress.update(3)
    progress.close()
    assert '[######..................] 1/4, 0.5 images/s, ETA 0:00:06' in terminal.text
    assert 'skipped a.jpg: why\n' in terminal.text and terminal.text.endswith('4/4, 2.0 images/s, ETA 0:00:00\n')
    log = Terminal(False)
    progress = Progress(4, file=log)
    progress.update(4)
    progress.close()
    assert log.text == ''  # a line every half minute
