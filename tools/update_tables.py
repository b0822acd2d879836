#!/usr/bin/env python
"""Write the README's tables of weights, and model-index.yml, from overlock.checkpoint.WEIGHTS."""

import argparse
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
# A plain clone works too, without `pip install -e .` and from any folder.
sys.path.insert(0, str(ROOT))

from overlock.tables import fill_in, model_index, readme_tables  # noqa: E402
from overlock.utils.files import whole_file  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--check', action='store_true', help='write nothing; the exit code is 1 if something is stale')
    check = parser.parse_args().check
    readme = ROOT / 'README.md'
    contents = {
        readme: fill_in(readme.read_text(encoding='utf-8'), readme_tables()),
        ROOT / 'model-index.yml': yaml.safe_dump(model_index(), sort_keys=False, allow_unicode=True, width=120),
    }
    stale = [
        path for path, content in contents.items() if not path.is_file() or path.read_text(encoding='utf-8') != content
    ]
    for path in stale:
        print(f'{path.relative_to(ROOT)} {"is stale" if check else "written"}')
        if not check:
            with whole_file(path) as file:
                file.write(contents[path].encode())
    return bool(stale and check)


if __name__ == '__main__':
    sys.exit(main())
