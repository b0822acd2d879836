"""Report what a data set has and what is wrong with it, before a training does."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from overlock.utils.configs import find_config
from overlock.utils.errors import UserError


def add_options(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option('source', metavar='DIR|CONFIG', help='folder of the data, or the name or path of a configuration')
    option('--data-root', metavar='DIR', help='folder of the data of a configuration')
    option('--json', metavar='FILE', help='write all counts and findings; - prints them instead of the text')
    option('--html', metavar='FILE', help='write the report with labeled images into one file')


def run(source: str, data_root: str | None, json: str | None, html: str | None) -> int:
    path = _config(source)
    if not path and data_root:
        raise UserError(f'--data-root is for a configuration, and {source} is a folder.')
    from mmengine_overlock.config import load_config, set_data_root
    from mmengine_overlock.data.report import report_config, report_folder
    from mmengine_overlock.data.report_html import html as as_html
    from overlock.utils.files import check_writable, whole_file

    names = [name for name in (json, html) if name and name != '-']
    for name in names:
        check_writable(name)
    if path:
        cfg = load_config(path)
        if data_root:
            set_data_root(cfg, data_root)
        report = report_config(cfg)
    else:
        report = report_folder(source)
    # A terminal may lack letters that names have.
    sys.stdout.reconfigure(errors='backslashreplace')  # type: ignore[union-attr]
    print(report.json() if json == '-' else report.text())
    for name in names:
        with whole_file(name) as file:
            file.write((as_html(report) if name == html else report.json()).encode('utf-8', 'backslashreplace'))
    return int(not report.usable)


def _config(source: str) -> Path | None:
    """Return the file of a configuration, or None for a folder."""
    if Path(source).is_dir():
        return None
    try:
        return find_config(source)
    except UserError as error:
        raise UserError(f'{source} is not a folder. {error}') from None
