"""The secret that the launchers of one job share, and how they prove to each other that they know it.

It is PTUNE_SECRET if that is set. Otherwise the head writes a random one into the run's folder, where only its owner
can read it, and the other nodes read it there. It never crosses the network: each side sends the other a random text
and gets back a keyed hash of it (HMAC-SHA256, RFC 2104), so an answer that was overheard is of no use later. Messages
are not encrypted.
"""

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import tempfile
from pathlib import Path
from typing import Any

from ptune_dist.cluster.link import Message
from ptune_dist.cluster.rank_files import read_secret
from ptune_dist.common.files import make_folder
from ptune_dist.errors import UserError

VARIABLE = "PTUNE_SECRET"
FILE = ".launcher-secret"
MIN_LENGTH = 16  # of PTUNE_SECRET: whoever overhears an answer can try short ones
GENERATED = re.compile(r"[0-9a-f]{64}")
REMEDY = f"let all nodes share output_dir, or set {VARIABLE} to the same text on every node"


def read_variable() -> str:
    """PTUNE_SECRET, "" if it is not set; in a rank, that of its launcher. Raises UserError if it is too short."""
    value = os.environ.get(VARIABLE, "").strip() or read_secret()
    if value and len(value) < MIN_LENGTH:
        raise UserError(f"{VARIABLE} needs at least {MIN_LENGTH} characters, such as those of: openssl rand -hex 32")
    return value


def create_secret(run_dir: Path) -> str:
    """The secret for the head of several nodes, which is written into the run's folder unless it is there already.

    Raises UserError if it cannot be written.
    """
    secret = read_variable() or read_file(run_dir)
    if secret:
        return secret
    secret = random_text()
    try:
        make_folder(run_dir)
        descriptor, name = tempfile.mkstemp(prefix=f"{FILE}-", dir=run_dir)  # of mode 0600
        with open(descriptor, "w") as file:
            file.write(secret)
        os.replace(name, run_dir / FILE)
    except OSError as error:
        raise UserError(f"output_dir: {run_dir}: {error.strerror}") from None
    return secret


def find_secret(run_dir: Path) -> str:
    """The secret for any other node; "" if the run's folder does not have it, or not yet. Raises UserError."""
    return read_variable() or read_file(run_dir)


def read_file(run_dir: Path) -> str:
    """The secret in the run's folder, "" without one. Access by others, as after a copy, is taken away."""
    path = run_dir / FILE
    try:
        secret = path.read_text(encoding="ascii").strip()
        if path.stat().st_mode & 0o077:
            with contextlib.suppress(OSError):  # a bucket that is mounted has no modes
                path.chmod(0o600)
    except (OSError, UnicodeDecodeError):
        return ""
    return secret if GENERATED.fullmatch(secret) else ""


def remove_secret(run_dir: Path) -> None:
    """Remove the file, and the folder if nothing else is in it."""
    with contextlib.suppress(OSError):
        (run_dir / FILE).unlink(missing_ok=True)
        run_dir.rmdir()


def random_text() -> str:
    return secrets.token_hex(32)


def prove(secret: str, role: str, asked: str, content: Any) -> str:
    """What shows the other side, which has sent `asked`, that `role` knows the secret and has sent `content`."""
    signed = json.dumps([role, asked, content], sort_keys=True).encode()
    return hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()


def is_proof(given: object, secret: str, role: str, asked: str, content: Any) -> bool:
    """Whether `given` is what `prove` returns. Takes the same time wherever they differ."""
    expected = prove(secret, role, asked, content)
    return isinstance(given, str) and hmac.compare_digest(given.encode(), expected.encode())


def sign_hello(secret: str, asked: str, hello: Message) -> Message:
    """A node's first message with its proof; `hello` has a random text of its own as "nonce"."""
    return hello | {"proof": prove(secret, "node", asked, hello)}


def is_signed_hello(secret: str, asked: str, message: Message) -> bool:
    hello = {key: value for key, value in message.items() if key != "proof"}
    return is_proof(message.get("proof"), secret, "node", asked, hello)


def sign_welcome(secret: str, nonce: str, asked: str) -> str:
    """The head's proof, for a node that has sent `nonce` in answer to `asked`."""
    return prove(secret, "head", nonce, asked)


def is_signed_welcome(secret: str, nonce: str, asked: str, message: Message) -> bool:
    return is_proof(message.get("proof"), secret, "head", nonce, asked)
