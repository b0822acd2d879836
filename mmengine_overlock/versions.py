"""One clear sentence where an OpenMMLab package is missing or of a version that does not fit."""

import importlib


def require(package: str, **ranges: tuple[str, str]) -> None:
    """Checks that each module's version is at least the first and below the second of its range.

    Args:
        package: Who asks, for the message.
        **ranges: Module name to (minimum, first version too high).

    Raises:
        ImportError: If a module is missing, does not import, or has another version.
    """
    for name, (minimum, maximum) in ranges.items():
        needs = f'{package} needs {name} >= {minimum} and < {maximum}'
        try:
            version = importlib.import_module(f'{name}.version').__version__
        except (ImportError, AssertionError) as error:
            raise ImportError(f'{needs}, which does not import here: {error}') from error
        from mmengine.utils import digit_version  # here: mmengine itself may be what is missing

        if not digit_version(minimum) <= digit_version(version) < digit_version(maximum):
            raise ImportError(f'{needs}, but {version} is installed; install a version in this range')
