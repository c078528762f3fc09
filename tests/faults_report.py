"""Runs the tests that inflict faults, and writes their table:
pytest -n 0 --slow --thorough --faults-report tests/FAULTS.md.

The marker `fault("what")` counts one fault per run of the test; with the fixture `fault`, the test itself counts each
fault that it inflicts: fault("what").
"""

import collections
import os
import pathlib
import platform
import re
import time

import jax
import pytest

_KEY = "fault"


def pytest_addoption(parser):
    parser.addoption(
        "--faults-report", metavar="FILE", help="run only tests that inflict faults, and write their table"
    )


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

    def pytest_collection_modifyitems(self, config, items):
        left_out = [item for item in items if not item.get_closest_marker("fault") and _KEY not in item.fixturenames]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]

    def pytest_runtest_logreport(self, report):
        # A test that fails or is skipped in its set-up has no report of its call.
        if report.when == "call" or (report.when == "setup" and not report.passed):
            place = report.nodeid.partition("[")[0].removeprefix("tests/")
            if report.skipped and re.search("(slow|thorough): give --", str(report.longrepr)):
                return
            for key, what in report.user_properties:
                if key == _KEY:
                    self._rows[what, place][report.outcome] += 1
            if report.skipped:
                self._reasons[place] = str(report.longrepr[2]).removeprefix("Skipped: ")

    def pytest_sessionfinish(self):
        rows = self._earlier()
        for (what, place), outcomes in self._rows.items():
            count = outcomes["passed"] + outcomes["failed"]
            lost = "nothing" if not outcomes["failed"] else f"**{outcomes['failed']} tests failed**"
            if not count:
                lost = f"not inflicted: {self._reasons.get(place, 'skipped')}"
            rows[what, place] = count, lost
        minutes = (time.monotonic() - self._began) / 60
        tests = len({place for _, place in self._rows})
        lines = [
            "# Faults",
            "",
            "Faults that the tests inflict on the program, how often, and what was lost. The tests write this file:",
            "`pytest -n 0 --slow --thorough --faults-report tests/FAULTS.md`. A run of some tests replaces only their",
            "rows.",
            "",
            f"Last run: {tests} tests of faults in {minutes:.0f} minutes; {platform.system()} {platform.machine()}, "
            f"{os.cpu_count()} CPU cores, Python",
            f"{platform.python_version()}, jax {jax.__version__}.",
            "",
            "| fault | test | inflicted | lost |",
            "| --- | --- | --- | --- |",
        ]
        for (what, place), (count, lost) in sorted(rows.items(), key=lambda row: row[0][::-1]):
            lines.append(f"| {what} | `{place}` | {count} | {lost} |")
        total = sum(count for count, _ in rows.values())
        lines += ["", f"{len(rows)} kinds of faults, inflicted {total:,} times.", ""]
        self._path.write_text("\n".join(lines))

    def _earlier(self):
        """Returns the rows of existing tests that did not run now."""
        if not self._path.exists():
            return {}
        found = re.findall(r"^\| (.+) \| `(.+)` \| (\d+) \| (.+) \|$", self._path.read_text(), re.MULTILINE)
        ran = {place for _, place in self._rows}
        rows = {}
        for what, place, count, lost in found:
            file, _, test = place.partition("::")
            path = pathlib.Path(__file__).parent / file
            if place not in ran and path.exists() and f"def {test}(" in path.read_text():
                rows[what, place] = int(count), lost
        return rows
