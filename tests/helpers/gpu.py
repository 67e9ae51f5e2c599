"""The GPUs that tests/gpu sees and that all other tests do not."""

import multiprocessing
import os
import traceback

# The machine's GPUs, in a variable that pytest-xdist workers inherit along with the hidden GPUs.
_OFFERED = 'TEST_CUDA_VISIBLE_DEVICES'


def hide_gpus() -> None:
    """Hide all GPUs from this process and its children."""
    os.environ.setdefault(_OFFERED, os.environ.get('CUDA_VISIBLE_DEVICES', '0'))
    os.environ['CUDA_VISIBLE_DEVICES'] = ''


def gpu_environment() -> dict[str, str]:
    """The environment variables of a process that sees the GPUs and compiles Triton's kernels for them."""
    return {'CUDA_VISIBLE_DEVICES': os.environ.get(_OFFERED, ''), 'TRITON_INTERPRET': '0'}


def call_with_gpu(function, *args, timeout: float = 600):
    """What a module-level function returns in a new process that sees the GPUs; what it raises fails the test."""
    hidden = {name: os.environ[name] for name in gpu_environment()}
    context = multiprocessing.get_context('spawn')
    receiver, sender = context.Pipe(duplex=False)
    os.environ.update(gpu_environment())  # before the new process imports anything: mmengine looks for devices then
    try:
        process = context.Process(target=_send_result, args=(sender, function, args))
        process.start()
    finally:
        os.environ.update(hidden)
    sender.close()
    try:
        assert receiver.poll(timeout), f'{function.__name__} did not end within {timeout} s'
        try:
            succeeded, result = receiver.recv()
        except EOFError:
            process.join()
            raise AssertionError(f'{function.__name__} ended with exit code {process.exitcode}') from None
    finally:
        process.kill()
        process.join()
    assert succeeded, result
    return result


def _send_result(connection, function, args) -> None:
    try:
        connection.send((True, function(*args)))
    except BaseException:
        connection.send((False, traceback.format_exc()))
