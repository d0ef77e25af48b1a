"""The package has no type errors, as far as basedpyright's basic mode can tell. Its settings are in pyproject.toml."""

import json
import subprocess
import sys

import pytest

from tests.processes import ROOT


@pytest.mark.long
def test_the_package_has_no_type_errors():
    command = [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] >= 80
    errors = [
        f"{error['file'].removeprefix(f'{ROOT}/')}:{error['range']['start']['line'] + 1}: {error['message']}"
        for error in found["generalDiagnostics"]
        if error["severity"] == "error"
    ]
    assert not errors, "\n".join(errors)
