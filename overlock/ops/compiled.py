"""What the C++ operators for CPUs share on the side of Python."""

# Channels of a vector: maps and taps come padded to multiples of it.
LANES = 16


def why_not_compiled() -> str:
    """Return '' if the C++ operators are compiled for this machine, else what to do."""
    from overlock.ops import build  # here, so that `python -m overlock.ops.build` is not imported before it runs

    return build.load()


# A constant for torch.compile, which cannot trace file access.
why_not_compiled._dynamo_marked_constant = True  # type: ignore[attr-defined]
