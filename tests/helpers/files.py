"""Files and limits for the tests of data sets."""

import multiprocessing
import os
import resource
import struct
import traceback
import zlib
from pathlib import Path

from convnext_dense.errors import UsageError


def run_limited(function, *args, seconds=60, gigabytes=2.0):
    """Run a function in its own process, with limits on time and on memory beyond what this process has.
    A hang, a signal or an exception fails the test."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def run():
        used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
        limit = used + int(gigabytes * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            sender.send((True, function(*args)))
        except BaseException:
            sender.send((False, traceback.format_exc()))
        os._exit(0)

    process = multiprocessing.get_context('fork').Process(target=run)
    process.start()
    sender.close()
    has_result = receiver.poll(seconds)
    try:
        assert has_result, f'no end after {seconds} s'
        succeeded, result = receiver.recv()
    except EOFError:
        process.join()
        raise AssertionError(f'ended by signal {-process.exitcode}') from None
    finally:
        process.kill()
        process.join()
    assert succeeded, result
    return result


def error_message(function, *args):
    """Return the one line of a UsageError, or the function's result."""
    try:
        return function(*args)
    except UsageError as error:
        assert '\n' not in str(error)
        return str(error)


def png_bytes(width, height, data=b''):
    """Return the bytes of a gray PNG; without data only its header is valid."""
    header = b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    chunks = [header, b'IDAT' + data, b'IEND']
    parts = [struct.pack('>I', len(c) - 4) + c + struct.pack('>I', zlib.crc32(c)) for c in chunks]
    return b'\x89PNG\r\n\x1a\n' + b''.join(parts)
