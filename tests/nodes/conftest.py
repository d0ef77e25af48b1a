"""Certificates of two authorities."""

import subprocess
from pathlib import Path

import pytest


def run_openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """Folders `good` and `other`, of two authorities."""
    root = tmp_path_factory.mktemp("tls")
    for name in ("good", "other"):
        folder = root / name
        folder.mkdir()
        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        run_openssl(
            folder, *("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=ca", "-days", "2")
        )
        run_openssl(folder, *("req", *key, "-keyout", "tls.key", "-out", "tls.csr", "-subj", "/CN=node"))
        run_openssl(
            folder,
            *("x509", "-req", "-in", "tls.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial"),
            *("-out", "tls.crt", "-days", "2"),
        )
    return root
