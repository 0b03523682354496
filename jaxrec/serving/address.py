"""The address of a server: reserved before the model loads, opened when everything is compiled."""

import ipaddress
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from jaxrec.config import UserError


def parse_address(address: str) -> tuple[str, int]:
    """("127.0.0.1", 8080) from "127.0.0.1:8080", ":8080" or "8080": without a host only this machine can connect.

    Raises:
      UserError: there is no port, or it is not a number up to 65535.
    """
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
        raise UserError(f"--http {address}: give HOST:PORT with a port up to 65535, such as 127.0.0.1:8080")
    return host.strip("[]") or "127.0.0.1", int(port)


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that doesn't listen yet: it reserves the address, and clients can't connect until `listen`.

    Raises:
      UserError: the host is unknown or no host name, or the port is in use or not allowed.
    """
    with _refusing(f"{host}:{port}"):
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # old connections may linger on the port
            bound.bind(place)
            # Linux binds several sockets with this option to one address until one of them listens. So listening for a
            # moment detects another socket, and clearing the option excludes later ones.
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(bound.getsockname())
                probe.listen()
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        except OSError:
            bound.close()
            raise
    return bound


def listen(bound: socket.socket, address: str) -> None:
    """Opens the port reserved by `bind`.

    Raises:
      UserError: another socket listens there.
    """
    with _refusing(address):
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as in `bind`
        bound.listen()


@contextmanager
def _refusing(address: str) -> Iterator[None]:
    """Turns the system's errors about an address into a UserError."""
    try:
        yield
    except (OSError, UnicodeError) as error:  # UnicodeError: an empty label, or one of more than 63 characters
        reason = "that is no host name" if isinstance(error, UnicodeError) else error.strerror
        raise UserError(f"--http {address} can't be listened on: {reason}; give another address") from error


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
