"""A pytest plugin that prints at once why a test failed: a run on a rented GPU may be cut off before its end."""

import pytest
from _pytest.terminal import TerminalReporter


class PrintFailures:
    def __init__(self, terminal: TerminalReporter):
        self._terminal = terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._terminal.write_line(f"\n{report.longreprtext}")


@pytest.hookimpl(trylast=True)  # after the terminal's own reporter
def pytest_configure(config: pytest.Config) -> None:
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        config.pluginmanager.register(PrintFailures(terminal))
