"""A disk that tests can fill and protect."""

import os
import resource
import subprocess
from pathlib import Path

import pytest


class Disk:
    """A file system of 20 MB where this user may mount one; else limits of this process stand in for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        command = ['mount', '-t', 'tmpfs', '-o', 'size=20m', 'tmpfs', folder]
        self.mounted = subprocess.run(command, capture_output=True).returncode == 0
        self.filled = False
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, left: int = 0) -> None:
        """Leave this many bytes, in units of 4096."""
        self.filled = True
        if not self.mounted:
            resource.setrlimit(resource.RLIMIT_FSIZE, (left, self.limits[1]))
            return
        facts = os.statvfs(self.folder)
        with (self.folder / 'filler').open('wb') as file:
            file.write(bytes(facts.f_bavail * facts.f_frsize - left))

    def free(self) -> None:
        """Give the space back."""
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        (self.folder / 'filler').unlink(missing_ok=True)

    def protect(self) -> Path:
        """Let nobody write to it, and return its folder."""
        if self.mounted:
            subprocess.run(['mount', '-o', 'remount,ro', self.folder], check=True)
        elif os.geteuid():
            self.folder.chmod(0o555)
        else:
            pytest.skip('root may write to every folder, and may mount none here')
        return self.folder

    def leave(self) -> None:
        """Give back what the disk took of the machine."""
        if self.mounted:
            subprocess.run(['umount', '-l', self.folder], check=True)
        else:
            self.free()
