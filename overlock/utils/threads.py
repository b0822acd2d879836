"""How long the threads of OpenMP wait awake for work; it reads that when torch is imported."""

import os


def wait_briefly() -> None:
    """Let threads wait awake for a tenth of GNU's time, unless the user's environment says otherwise.

    GNU's time is about 4 ms: beside other work on the same cores XT then takes 1.5 times as long. Without any, waking
    the threads makes many small operators slow: on two idle cores XT takes 1.8 times as long for an image of 224x224.
    """
    # The count wins over the policy.
    if 'OMP_WAIT_POLICY' not in os.environ:
        os.environ.setdefault('GOMP_SPINCOUNT', '30000')
