"""Put configurations, tools and the index of the models into the wheel, where OpenMMLab's mim looks for them."""

from pathlib import Path
from shutil import copyfile, copytree, ignore_patterns

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Build the packages, and copy what stands beside them; an editable install finds it in the checkout."""

    def run(self):
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib, 'overlock/.mim')
            for name in ('configs', 'tools'):
                copytree(name, folder / name, dirs_exist_ok=True, ignore=ignore_patterns('__pycache__'))
            (folder / 'docs').mkdir(exist_ok=True)
            for name in ('model-index.yml', 'docs/complexity.json'):
                copyfile(name, folder / name)


setup(cmdclass={'build_py': BuildWithConfigs})
