"""Tests that need no privilege, no kernel and no broker.

They are written for pytest. OpenStack's gates run unit tests with stestr, which knows unittest's loader alone, so
``load_tests`` shows that loader each of our modules as one test.
"""

import pathlib
import subprocess
import sys
import unittest

_HERE = pathlib.Path(__file__).parent
_ROOT = _HERE.parents[1]


class PytestModule(unittest.TestCase):
    """One module of pytest tests, run by a pytest of its own: its output is the message when it fails."""

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__("run_module")
        self._path = path

    def id(self) -> str:
        return ".".join(self._path.relative_to(_ROOT).with_suffix("").parts)

    def run_module(self) -> None:
        command = [sys.executable, "-m", "pytest", "-q", str(self._path)]
        outcome = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
        if outcome.returncode != 0:
            self.fail(f"{outcome.stdout}\n{outcome.stderr}")


def load_tests(loader: unittest.TestLoader, tests: unittest.TestSuite, pattern: str | None) -> unittest.TestSuite:
    """unittest's hook: the tests of this package are its pytest modules."""
    return unittest.TestSuite(PytestModule(path) for path in sorted(_HERE.rglob("test_*.py")))
