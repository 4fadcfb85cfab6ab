"""Hosts of a network of their own on this machine: address, host name and disk of each are its own.

Here: making them, starting processes on them, cutting their power. Not here: what runs there (the tests).
One host is one network namespace; its disk is a folder that its processes see under a path they all share,
so that a file of another host's is not there. Tests that need this are not proven without root
(`faults.tools`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from muse_assets_tests.faults.tools import not_proven, require_root, require_tool
from muse_assets_tests.servers import dying_with_parent

# 198.18.0.0/15 is for measuring networks (RFC 2544): nothing of a machine's own is there.
_NETWORKS = [f"198.{second}.{third}" for second in (18, 19) for third in range(256)]
# As the host's own shell: name and disk, then the program in this very process.
_AS_HOST = 'hostname "$1" && mount --bind "$2" "$3" && shift 3 && exec "$@"'


@dataclass(frozen=True)
class NetworkHost:
    """One host. name: of it and its namespace; disk: its folder, which its processes see as `seen_as`."""

    name: str
    address: str
    disk: Path
    seen_as: Path

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> Process:
        """Start a program on it, with nothing but this environment; what it prints goes to `log`."""
        enter = ["ip", "netns", "exec", self.name, "unshare", "--uts"]
        shell = ["sh", "-c", _AS_HOST, "sh", self.name, str(self.disk), str(self.seen_as)]
        with log.open("ab") as output:
            started = subprocess.Popen(
                dying_with_parent([*enter, *shell, *command]),
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        return Process(started, log)

    def processes(self) -> set[int]:
        """The ids of all that run on it."""
        listed = _ip("netns", "pids", self.name)
        return set(map(int, listed.split()))

    def lose_power(self) -> None:
        """SIGKILL for all of it at once; returns when nothing runs any more."""
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


@dataclass(frozen=True)
class Process:
    """A program on a host, and where its output is."""

    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> None:
        """RuntimeError with the end of its output when it has ended."""
        if (status := self.process.poll()) is not None:
            raise RuntimeError(f"it ended with {status}: {self.tail()}")

    def tail(self) -> str:
        """The end of its output."""
        return self.log.read_text("utf-8", "replace")[-3000:]


@contextlib.contextmanager
def network(folder: Path, *names: str) -> Iterator[tuple[str, list[NetworkHost]]]:
    """Hosts that reach each other and this machine; this machine's address for them, and the hosts.

    folder: for their disks. Whatever still runs on them at the end is killed.
    """
    require_root()
    for tool in ("ip", "unshare", "hostname", "mount"):
        require_tool(tool)
    # Of this process, for another one may have hosts too; an interface's name has 15 bytes.
    number = os.getpid() % 65536
    subnet, bridge = _NETWORKS[number % len(_NETWORKS)], f"muse{number}"
    seen_as = folder / "disk"
    seen_as.mkdir()
    with contextlib.ExitStack() as undo:
        try:
            _ip("link", "add", bridge, "type", "bridge")
        except subprocess.CalledProcessError as error:
            not_proven(f"no network of its own can be made here: {error.stderr.strip()}")
        undo.callback(_ip, "link", "delete", bridge)
        _ip("address", "add", f"{subnet}.1/24", "dev", bridge)
        _ip("link", "set", bridge, "up")
        hosts = []
        for place, name in enumerate(names, 2):
            host = NetworkHost(f"{name}-{number}", f"{subnet}.{place}", folder / name, seen_as)
            host.disk.mkdir()
            cable = f"muse{number}-{place}"
            _ip("netns", "add", host.name)
            undo.callback(_ip, "netns", "delete", host.name)
            undo.callback(host.lose_power)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", host.name)
            # With its last process a namespace goes in its own time, and takes its end of the cable along.
            undo.callback(_ip, "link", "delete", cable)
            _ip("link", "set", cable, "master", bridge, "up")
            _ip("-netns", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                _ip("-netns", host.name, "link", "set", interface, "up")
            hosts.append(host)
        yield f"{subnet}.1", hosts


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    return done.stdout
