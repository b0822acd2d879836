"""Say in one sentence which OpenMMLab package is missing or has a version that does not fit."""

import importlib


def require(package: str, **ranges: tuple[str, str]) -> None:
    """Check that the version of each module is in its range.

    Args:
        package: Name of the package that needs them, for the message.
        **ranges: Module name to (minimum, first version too high).

    Raises:
        ImportError: A module is missing, does not import, or has another version.
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
