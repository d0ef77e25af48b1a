"""The documentation builds as one site, its links lead somewhere, and what follows from the code is current."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT, process_env

# Outside the site: links are relative to the repository's root.
FILES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]


def test_the_site_builds_without_a_warning(tmp_path):
    """`--strict`: a broken link, a missing anchor or a page that is not in the navigation is an error."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, env=process_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    html = (tmp_path / "site" / "configuration.html").read_text()
    assert "train.micro_batch_tokens" in html
    assert "Set up" in (tmp_path / "site" / "contributing.html").read_text()


def test_tables_that_follow_from_the_code_are_current():
    command = [sys.executable, "docs/fill_reference.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, env=process_env(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def anchors_of(file: Path) -> set[str]:
    """The anchors of a Markdown file's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", FILES)
def test_links_of_files_outside_the_site_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / name).read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        file = ROOT / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors_of(file), target
