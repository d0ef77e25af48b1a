"""TLS between nodes: PTUNE_TLS names a folder with ca.crt, tls.crt and tls.key, as a Kubernetes TLS secret has them.

Both sides show a certificate that the authority in ca.crt has signed. Host names are not compared: nodes have changing
addresses. That a node belongs to the job is proved by the job's secret.
"""

import os
import ssl
from collections.abc import Callable
from pathlib import Path

from ptune_dist.errors import UserError

VARIABLE = "PTUNE_TLS"
AUTHORITY = "ca.crt"
CERTIFICATE = "tls.crt"
KEY = "tls.key"


def read_variable() -> Path | None:
    value = os.environ.get(VARIABLE, "").strip()
    return Path(value) if value else None


def build_contexts(folder: Path | None) -> tuple[ssl.SSLContext, ssl.SSLContext] | tuple[None, None]:
    """For the side that listens and the one that connects; None without a folder. Raises UserError."""
    if folder is None:
        return None, None
    contexts = []
    for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        load(folder / AUTHORITY, lambda path, c=context: c.load_verify_locations(path))
        load(folder / CERTIFICATE, lambda path, c=context: c.load_cert_chain(path, folder / KEY))
        contexts.append(context)
    return contexts[0], contexts[1]


def load(path: Path, function: Callable[[Path], None]) -> None:
    try:
        function(path)
    except ssl.SSLError as error:
        raise UserError(f"{VARIABLE}: {path}: not a certificate that can be used: {error.reason}") from None
    except OSError as error:
        missing = path if not path.exists() else path.parent / KEY
        raise UserError(f"{VARIABLE}: {missing}: {error.strerror}") from None
