"""The files that come with the package: configurations, the tools, and the index of the models."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from overlock.utils.errors import UserError

_CHECKOUT = Path(__file__).resolve().parents[2]
# A wheel has them where OpenMMLab's `mim` looks for them, a checkout at its root.
ROOT = next((root for root in (_CHECKOUT / 'overlock/.mim', _CHECKOUT) if (root / 'configs').is_dir()), _CHECKOUT)
CONFIGS = ROOT / 'configs'


def config_names() -> dict[str, Path]:
    """Return the files of the configurations by their names, without those that others inherit from."""
    files = [*CONFIGS.glob('*.py'), *CONFIGS.glob('demo/*.py')]
    return {path.stem: path for path in sorted(files)}


def model_of(name: str) -> str:
    """Return the model that a configuration trains, by its name without the schedule."""
    return re.sub(r'_\d+[xk]$', '', name)


def find_config(config: str | Path) -> Path:
    """Return the file of a configuration.

    Args:
        config: A path, or the name of a configuration that comes with the package, with or without `.py`.

    Raises:
        UserError: There is no such file.
    """
    path = Path(config)
    if path.is_file():
        return path
    names = config_names()
    if path.name and path.suffix in ('', '.py') and str(path.with_suffix('')) in names:
        return names[path.stem]
    close = difflib.get_close_matches(path.stem, names, 3, cutoff=0.75)
    remedy = f'did you mean {" or ".join(close)}?' if close else '`overlock configs` lists the names.'
    raise UserError(f'The configuration {config} does not exist; give the path of a .py file or a name: {remedy}')
