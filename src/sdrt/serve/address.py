"""Where a server listens: a TCP port or a Unix socket, taken before anything is loaded."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from ..errors import InputError, SdrtError

if TYPE_CHECKING:
    from pathlib import Path

_BACKLOG = 2048
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


class Listener:
    """A socket that listens.

    Attributes
    ----------
    socket
        To be served.
    url
        How clients call it.
    hosts
        The names under which it is called, for a port of this machine alone; None where any will do.

    """

    def __init__(self, listening: socket.socket, url: str, hosts: frozenset[str] | None, path: Path | None) -> None:
        self.socket = listening
        self.url = url
        self.hosts = hosts
        self._path = path
        self._inode = None if path is None else path.stat().st_ino

    def remove(self) -> None:
        """Take a Unix socket's file away, if it is still this listener's."""
        with suppress(OSError):
            if self._path is not None and self._path.lstat().st_ino == self._inode:
                self._path.unlink()


def listen_on_port(host: str, port: int, *, has_key: bool, option: str = "--port") -> Listener:
    """Listen on a TCP port.

    Parameters
    ----------
    host
        A name or an address.
    port
        0 for any that is free.
    has_key
        Whether clients need a key, without which none but this machine's own are let in.
    option
        What chooses another port.

    Raises
    ------
    InputError
        The address is another than this machine's own and there is no key, or there is no such address.
    SdrtError
        The port is taken, or not for this user.

    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"host is {host!r}: expected an address of this machine, such as 127.0.0.1 ({error})"
        ) from None
    local = ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback
    if not local and not has_key:
        raise InputError(
            f"{host} lets other machines in: set SDRT_API_KEY to a key that clients have to send, or leave --host out"
        )
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise SdrtError(f"port {port} of {host} is taken: choose another with {option}") from None
        raise SdrtError(f"{host} port {port} cannot be listened on ({error.strerror}): choose another") from None
    listening.setblocking(False)
    number = listening.getsockname()[1]
    shown = f"[{host}]" if ":" in host else host
    return Listener(listening, f"http://{shown}:{number}", _LOCAL_NAMES | {host.lower()} if local else None, None)


def listen_on_path(path: Path) -> Listener:
    """Listen on a Unix socket that this user alone can open.

    A socket that a server left behind, of which nobody listens, is replaced.

    Raises
    ------
    SdrtError
        Something is there already, or the socket cannot be made.

    """
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _clear(path)
        before = os.umask(0o177)
        try:
            listening.bind(str(path))
        finally:
            os.umask(before)
        listening.listen(_BACKLOG)
    except SdrtError:
        listening.close()
        raise
    except (OSError, ValueError) as error:
        listening.close()
        # Of a path that is too long Python says so, and gives no number.
        why = getattr(error, "strerror", None) or error
        raise SdrtError(f"{path} cannot be made a Unix socket ({why}): choose another path") from None
    listening.setblocking(False)
    return Listener(listening, f"unix:{path}", None, path)


def _clear(path: Path) -> None:
    try:
        found = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found):
        raise SdrtError(f"{path} exists and is no socket: choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise SdrtError(f"another server listens on {path}: choose another path, or end it")
