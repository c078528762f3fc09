"""The table of faults, from a test run: pytest --slow --faults-report tests/FAULTS.md.

A test's marker `fault("what")` counts one fault for each time the test runs; its fixture `fault` counts those that it
inflicts itself: fault("what").
"""

import collections
import os
import pathlib
import platform
import time

import jax
import pytest

_KEY = "fault"


def pytest_addoption(parser):
    parser.addoption("--faults-report", metavar="FILE", help="write the table of the faults that the tests inflicted")


@pytest.fixture
def fault(request):
    """Counts a fault that the test inflicts: fault("SIGKILL while evaluating")."""
    return lambda what: request.node.user_properties.append((_KEY, what))


def pytest_itemcollected(item):
    for marker in item.iter_markers("fault"):
        item.user_properties.append((_KEY, marker.args[0]))


def pytest_configure(config):
    if config.getoption("--faults-report"):
        config.pluginmanager.register(_Report(pathlib.Path(config.getoption("--faults-report")).resolve()))


class _Report:
    def __init__(self, path):
        self._path, self._began = path, time.monotonic()
        self._rows = collections.defaultdict(collections.Counter)
        self._reasons = {}

    def pytest_runtest_logreport(self, report):
        # A test that fails or is skipped before it is called has no report of its call.
        if report.when == "call" or (report.when == "setup" and not report.passed):
            place = report.nodeid.partition("[")[0].removeprefix("tests/")
            for key, what in report.user_properties:
                if key == _KEY:
                    self._rows[what, place][report.outcome] += 1
            if report.skipped:
                self._reasons[place] = str(report.longrepr[2]).removeprefix("Skipped: ")

    def pytest_sessionfinish(self):
        lines = [
            "# Faults",
            "",
            "What the tests do to the program, how often they did it, and what was lost. The table is of one run",
            "of the tests, and written by it: `pytest --slow --faults-report tests/FAULTS.md`.",
            "",
            f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, Python "
            f"{platform.python_version()}, jax {jax.__version__}; {(time.monotonic() - self._began) / 60:.0f} minutes.",
            "",
            "| fault | test | inflicted | lost |",
            "| --- | --- | --- | --- |",
        ]
        for (what, place), outcomes in sorted(self._rows.items(), key=lambda row: row[0][::-1]):
            count = outcomes["passed"] + outcomes["failed"]
            lost = "nothing" if not outcomes["failed"] else f"**{outcomes['failed']} tests failed**"
            if not count:
                lost = f"not inflicted: {self._reasons.get(place, 'skipped')}"
            lines.append(f"| {what} | `{place}` | {count} | {lost} |")
        total = sum(outcomes["passed"] + outcomes["failed"] for outcomes in self._rows.values())
        lines += ["", f"{len(self._rows)} kinds of faults, inflicted {total} times.", ""]
        self._path.write_text("\n".join(lines))
