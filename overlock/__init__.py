"""OverLoCK: an overview-first-look-closely-next ConvNet with context-mixing dynamic kernels (CVPR 2025).

`overlock.exports` lists what is here. It is imported when something of it is first asked for, and torch with it: the
command line answers without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from overlock.exports import *  # noqa: F403

__version__ = '0.1.0'


def __getattr__(name: str) -> Any:
    if name == '__all__':
        return import_module('overlock.exports').__all__
    if name.startswith('__') or name == 'exports':
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    exports = import_module('overlock.exports')
    try:
        # `overlock.models` and its like are here once they are imported.
        return getattr(exports, name) if name in exports.__all__ else globals()[name]
    except KeyError:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}') from None


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module('overlock.exports').__all__})
