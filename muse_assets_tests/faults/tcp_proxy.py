"""A TCP proxy that breaks connections on purpose: cut by RST or FIN, stall, slow down, drop one reply.

Here: one proxy between a client and one server of 127.0.0.1, for MariaDB and Redis alike. Not here: what
has to hold afterwards (the tests). One of our own, for faults have to fall at an exact byte of a reply.
"""

from __future__ import annotations

import contextlib
import enum
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

_POLL_SECONDS = 0.01
_CHUNK = 65_536
# Sends reset, not FIN, when such a socket is closed.
_LINGER_RESET = struct.pack("ii", 1, 0)
_SEND_SECONDS = 30.0
# The server has answered a pipeline whole when it was silent for so long.
_SILENT_SECONDS = 0.1


class Fault(enum.Enum):
    """What befalls a connection."""

    RESET = "RST"
    FIN = "FIN"
    STALL = "stall"


@dataclass
class _Armed:
    """Falls on whichever connection carries the last of `left` reply bytes, `times` times."""

    fault: Fault
    after: int
    left: int
    times: int


class TcpProxy:
    """Forwards to a server of 127.0.0.1 until told otherwise; every method may be called at any time.

    replied: bytes forwarded from the server. done: faults that really befell a connection.
    accepted: connections so far. bytes_per_second: of replies, on each connection; None is full speed.
    """

    def __init__(self, upstream_port: int) -> None:
        self.upstream_port = upstream_port
        self.replied = 0
        self.done: list[Fault | bytes] = []
        self.accepted = 0
        self.bytes_per_second: int | None = None
        self._armed: _Armed | None = None
        self._drop: bytes | None = None
        self._drops = 0
        self._stalled = False
        self._closed = False
        self._generation = 0
        self._cut_all: tuple[int, Fault] = (0, Fault.RESET)
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._threads: list[threading.Thread] = []
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def url(self, server_url: str) -> str:
        """The server's URL with the proxy's port."""
        parts = urlsplit(server_url)
        return server_url.replace(f"{parts.hostname}:{parts.port}", f"127.0.0.1:{self.port}", 1)

    def arm(self, fault: Fault, *, after: int = 0, times: int = 1) -> None:
        """Let `fault` fall after `after` further reply bytes, and again after as many, `times` times.

        STALL falls once: nothing passes any more, on any connection, and new ones are accepted in silence.
        """
        with self._lock:
            self._armed = _Armed(fault, after, after, times)

    def drop_reply(self, request: bytes, *, times: int = 1) -> None:
        """Let the next `times` requests that hold `request` through, swallow each reply, and reset it."""
        with self._lock:
            self._drop, self._drops = request, times

    def cut(self, fault: Fault = Fault.RESET) -> None:
        """Cut every connection there is, now."""
        with self._lock:
            self._generation += 1
            self._cut_all = (self._generation, fault)

    def stall(self) -> None:
        """A black hole from now on: connections are accepted, and nothing passes."""
        with self._lock:
            self._stalled = True

    def heal(self) -> None:
        """Forward as at first; connections that were stalled are cut."""
        was_stalled = self._stalled
        with self._lock:
            self._armed, self._drop, self._stalled, self.bytes_per_second = None, None, False, None
        if was_stalled:
            self.cut()

    def close(self) -> None:
        """Cut everything and stop listening."""
        self._closed = True
        self.cut()
        for thread in self._threads:
            thread.join(_SEND_SECONDS + 5)
        self._listener.close()

    def _start(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, name="tcp-proxy", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closed:
            if select.select([self._listener], [], [], _POLL_SECONDS)[0]:
                client, _ = self._listener.accept()
                with self._lock:
                    self.accepted += 1
                    generation = self._generation
                self._start(self._serve, client, generation)

    def _serve(self, client: socket.socket, generation: int) -> None:
        server: socket.socket | None = None
        how: Fault | None = Fault.FIN
        try:
            while self._stalled and not self._cut_since(generation):
                time.sleep(_POLL_SECONDS)
            if not self._stalled and not self._closed:
                server = socket.create_connection(("127.0.0.1", self.upstream_port), _SEND_SECONDS)
                for one in (client, server):
                    one.settimeout(_SEND_SECONDS)
                    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                how = self._pump(client, server, generation)
        except ConnectionRefusedError:
            how = Fault.RESET
        except OSError:
            pass  # one side went away: the other is told below
        finally:
            if how is Fault.RESET:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
            client.close()
            if server is not None:
                server.close()

    def _pump(self, client: socket.socket, server: socket.socket, generation: int) -> Fault | None:
        tail, swallowing = b"", b""
        swallowed_at = 0.0
        while True:
            if fault := self._cut_since(generation):
                return fault
            if swallowed_at and time.monotonic() - swallowed_at > _SILENT_SECONDS:
                self.done.append(swallowing)
                return Fault.RESET
            if self._stalled:
                time.sleep(_POLL_SECONDS)
                continue
            ready = select.select([client, server], [], [], _POLL_SECONDS)[0]
            if client in ready:
                request = client.recv(_CHUNK)
                if not request:
                    return Fault.FIN
                swallowing = swallowing or self._taken_drop(tail + request)
                tail = (tail + request)[-64:]
                server.sendall(request)
            if server in ready:
                reply = server.recv(self._chunk())
                if not reply:
                    return Fault.FIN
                if swallowing:
                    swallowed_at = time.monotonic()
                elif fault := self._forward(client, reply):
                    return fault

    def _forward(self, client: socket.socket, reply: bytes) -> Fault | None:
        passing, fault = self._passing(len(reply))
        client.sendall(reply[:passing])
        if fault is Fault.STALL:
            self._stalled = True
            return None
        if fault is None and self.bytes_per_second:
            time.sleep(passing / self.bytes_per_second)
        return fault

    def _passing(self, size: int) -> tuple[int, Fault | None]:
        """How many of `size` reply bytes pass, and what happens after them."""
        with self._lock:
            armed = self._armed
            if armed is None or size < armed.left:
                passing, fault = size, None
                if armed is not None:
                    armed.left -= size
            else:
                passing, fault = armed.left, armed.fault
                self.done.append(fault)
                armed.left, armed.times = armed.after, armed.times - 1
                if not armed.times or fault is Fault.STALL:
                    self._armed = None
            self.replied += passing
        return passing, fault

    def _taken_drop(self, request: bytes) -> bytes:
        with self._lock:
            if self._drop is None or self._drop not in request:
                return b""
            taken, self._drops = self._drop, self._drops - 1
            if not self._drops:
                self._drop = None
            return taken

    def _cut_since(self, generation: int) -> Fault | None:
        number, fault = self._cut_all
        return fault if number > generation else None

    def _chunk(self) -> int:
        return max(1, min(_CHUNK, self.bytes_per_second // 20)) if self.bytes_per_second else _CHUNK


@contextlib.contextmanager
def tcp_proxy(server_url: str) -> Iterator[TcpProxy]:
    """A proxy before the server of a URL with a port; `proxy.url(server_url)` leads through it."""
    port = urlsplit(server_url).port
    assert port is not None, "the URL needs a port"
    proxy = TcpProxy(port)
    try:
        yield proxy
    finally:
        proxy.close()
