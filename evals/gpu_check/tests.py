"""Run pytest, and print which tests passed, failed and were skipped as a line of JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest


class Count:
    """What became of each test; failures and reasons of skips in words."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: dict[str, str] = {}
        self.skipped: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed[report.nodeid] = str(report.longrepr)[-1500:]
        elif report.skipped:
            reason: Any = report.longrepr
            self.skipped[report.nodeid] = str(reason[2] if isinstance(reason, tuple) else reason)
        elif report.when == "call":
            self.passed += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed[report.nodeid] = str(report.longrepr)[-1500:]
        elif report.skipped and isinstance(report.longrepr, tuple):
            self.skipped[report.nodeid] = report.longrepr[2]


def main() -> None:
    count = Count()
    shown = ["-vv", "--durations=10", "--tb=short"]  # one -v is undone by the -q of pyproject.toml
    code = pytest.main([*shown, "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[count])
    print(json.dumps(vars(count)), flush=True)
    sys.exit(int(code) or int(not count.passed))


if __name__ == "__main__":
    main()
