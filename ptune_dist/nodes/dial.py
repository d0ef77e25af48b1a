"""Connecting to a node, and why it fails: in words that lead its user to what has to be changed."""

import asyncio
import errno
import socket
import ssl
import time
from collections.abc import Callable

from ptune_dist.common import tls
from ptune_dist.nodes.settings import ADDRESS, split_address
from ptune_dist.nodes.wire import Wire

CONNECT_S = 3.0
REPEAT_S = 60.0
ADDRESS_REMEDY = f"open the port or set {ADDRESS} there"
PORT_REMEDY = "another program has the port: choose another one"
TLS_REMEDY = f"set {tls.VARIABLE} on all nodes or on none, to certificates of one authority"


class NoWire(Exception):
    """Why there is no connection to a node.

    is_mistake: trying again does not help. is_refused: the process that was asked for does not listen there (any more).
    """

    def __init__(self, why: str, remedy: str = ADDRESS_REMEDY, *, is_mistake: bool = False, is_refused: bool = False):
        super().__init__(f"{why}: {remedy}" if remedy else why)
        self.why = why
        self.is_mistake = is_mistake
        self.is_refused = is_refused


class Notices:
    """Lines that would be written again and again, each once in a minute."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say
        self._said: dict[str, float] = {}

    def tell(self, text: str) -> None:
        now = time.monotonic()
        if now - self._said.get(text, -REPEAT_S) >= REPEAT_S:
            self._said[text] = now
            self._say(text)


def is_refusal(error: OSError) -> bool:
    """Whether nothing listens at any address of a name. asyncio joins the errors of several into one text."""
    return isinstance(error, ConnectionRefusedError) or f"[Errno {errno.ECONNREFUSED}]" in str(error)


async def dial(make: Callable[[], Wire], address: str, context: ssl.SSLContext | None) -> Wire:
    """A wire on which both sides have proved themselves, or one with a `refusal`. Raises NoWire."""
    try:
        host, port = split_address(address)
        connecting = asyncio.get_running_loop().create_connection(make, host, port, ssl=context)
        _, wire = await asyncio.wait_for(connecting, CONNECT_S)
    except ssl.SSLError as error:
        raise build_tls_failure(error) from None
    except TimeoutError:
        raise NoWire("no answer") from None
    except socket.gaierror:
        raise NoWire("the name does not resolve") from None
    except OSError as error:
        is_refused = is_refusal(error)
        why = "connection refused" if is_refused else error.strerror or str(error)
        raise NoWire(why, is_refused=is_refused) from None
    except ValueError as error:  # not host:port, or a name that cannot be one
        raise NoWire(str(error), is_mistake=True) from None
    if await wire.opened or wire.refusal:
        return wire
    raise explain_closed(wire, has_tls=context is not None)


def build_tls_failure(error: ssl.SSLError) -> NoWire:
    return NoWire(f"TLS: {error.reason or error}", TLS_REMEDY, is_mistake=True)


def explain_closed(wire: Wire, has_tls: bool) -> NoWire:
    """Why a connection was closed before both sides had proved themselves."""
    if wire.is_stranger:
        return NoWire("another node answers there", "", is_refused=True)
    if wire.is_garbled:
        return NoWire("what answers there is no node of this version", PORT_REMEDY, is_mistake=True)
    if isinstance(wire.error, ssl.SSLError):
        return build_tls_failure(wire.error)
    if wire.is_silent:  # what expects TLS waits for the other side's first word, as most servers do
        remedy = PORT_REMEDY if has_tls else f"it expects TLS ({TLS_REMEDY}), or {PORT_REMEDY}"
        return NoWire("it takes the connection and tells nothing", remedy, is_mistake=True)
    return NoWire("it closes the connection", f"TLS: {TLS_REMEDY}" if has_tls else "")
