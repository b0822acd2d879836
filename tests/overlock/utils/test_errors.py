"""Faults of the machine are known by the words of the system, Python and PyTorch, whatever error carries them."""

import errno
import os
import re
import traceback

import pytest
import torch

from overlock.utils.errors import UserError, brief_mistakes, explain_fault


def system(number: int) -> OSError:
    return OSError(number, os.strerror(number), '/a/b')


@pytest.mark.parametrize(
    'error, sentence',
    [
        (system(errno.ENOSPC), r"The disk is full; .* \(\[Errno 28\] No space left on device: '/a/b'\)\.$"),
        (system(errno.EDQUOT), 'The disk is full; free space or name another folder; '),
        (system(errno.EFBIG), 'The disk is full; '),
        (system(errno.EROFS), 'A file or folder cannot be read or written; '),
        (system(errno.EACCES), 'A file or folder cannot be read or written; change its permissions, or '),
        (system(errno.EEXIST), 'A file stands where a folder is needed; '),
        (system(errno.ENOTDIR), 'A file stands where a folder is needed; '),
        (system(errno.EADDRINUSE), 'The port of this run is in use by another program; name a free one: PORT='),
        (system(errno.EMFILE), 'This process has opened all the files that it may; raise the limit: ulimit -n'),
        (system(errno.ENOMEM), 'The memory does not suffice; lower the batch size, '),
        (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate'), r'The memory .* --amp, .*with_cp=True'),
        (MemoryError(), r'The memory does not suffice; .* \(MemoryError\)\.$'),
        (RuntimeError('CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling'), 'The memory does not suffice; '),
        # A worker that loads data fails with its whole traceback, in an error of its class that lacks the number.
        (OSError('Caught OSError in worker 0.\nTraceback\nOSError: [Errno 28] No space left on device'), 'The disk is'),
        (RuntimeError('unable to write to file </torch_9>: No space left on device (28)'), 'The shared memory of this'),
        (FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"), 'There is no folder for temporary'),
        (RuntimeError('Could not determine home directory.'), 'This user has no home folder; name .* by HOME'),
        (RuntimeError('[/a/gloo/transport/tcp/pair.cc:547] Connection closed by peer'), 'Another process of this run'),
    ],
)
def test_a_fault_is_one_sentence_with_a_remedy(error, sentence):
    told = explain_fault(error)
    assert re.match(sentence, told) and '\n' not in told and '; ' in told


def test_a_fault_behind_another_error_is_told_but_not_one_that_was_handled():
    cause, handled = RuntimeError('worker exited'), RuntimeError('bug')
    cause.__cause__ = handled.__context__ = system(errno.ENOSPC)
    assert explain_fault(cause).startswith('The disk is full; ')
    assert explain_fault(handled) is None


@pytest.mark.parametrize(
    'error', [KeyError('bug'), FileNotFoundError(2, 'No such file or directory', '/a'), UserError('Do that.')]
)
def test_other_errors_are_no_faults(error):
    assert explain_fault(error) is None


def test_pytorchs_own_words_are_known():
    for call in (lambda: torch.empty(2**50), lambda: bytearray(2**60)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            call()
        assert explain_fault(caught.value).startswith('The memory does not suffice; ')
    # Here torch.save opens the file; tests/overlock/utils/test_files.py has what our own writing makes of it.
    with pytest.raises(RuntimeError) as caught:
        torch.save(torch.zeros(2**20), '/dev/full')
    assert explain_fault(caught.value).startswith('The disk is full; ')


def test_a_mistake_leaves_a_function_without_what_is_behind_it():
    def deep(left):
        if left:
            return deep(left - 1)
        try:
            raise OSError('the cause')
        except OSError as error:
            raise UserError('Do that.') from error

    with pytest.raises(UserError) as caught:
        brief_mistakes(deep)(50)
    text = ''.join(traceback.format_exception(caught.value))
    assert text.count('\n') < 12 and 'the cause' not in text and text.endswith('UserError: Do that.\n')
    assert str(caught.value.__context__) == 'the cause'
