"""Makes the search server load the day's files, and takes them back when it does not come up.

Here: the reload hook and the health check. Not here: replacing a file (`deploying.py`), the record of
what was loaded last (`loaded.py`). The server reads its files only at start, so this runs once after the
day's deploys.
"""

from __future__ import annotations

import http.client
import os
import re
import shlex
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from muse_assets.catalog import IndexSpec
from muse_assets.durable_files import locked, sweep
from muse_assets.failures import MuseError, PermanentFailure
from muse_assets.manifest import read_manifest
from muse_assets.publishing.backups import backups, is_intact
from muse_assets.publishing.deploying import Deployment, rollback
from muse_assets.publishing.layout import check_directory, explained, loaded_file
from muse_assets.publishing.live import live_file
from muse_assets.publishing.loaded import loaded_contents, record_loaded

_OUTPUT_CHARACTERS = 500
# Shorter arguments are flags; hiding them would make the output unreadable.
_SECRET_CHARACTERS = 4
# A deploy holds an index's lock while it copies and hashes the file.
_LOCK_WAIT_SECONDS = 10.0


@dataclass(frozen=True)
class Reload:
    """covered: index -> sha256 of the live files the server had not loaded before. reloaded: whether it
    has now. message: one sentence for an operator.
    """

    covered: dict[str, str]
    reloaded: bool
    message: str
    seconds: float


class ReloadFailed(PermanentFailure):
    """The server did not come up on the live files. returned: the roll-backs that were made for it."""

    def __init__(self, what: str, *, next_step: str, returned: Sequence[Deployment]) -> None:
        super().__init__(what, next_step=next_step)
        self.returned = tuple(returned)


def reload_server(
    server: Path,
    specs: Sequence[IndexSpec],
    *,
    hook: str | None,
    health: str | None,
    timeout_seconds: float = 120.0,
    pause_seconds: float = 1.0,
) -> Reload:
    """Restart the search server if a live file of `specs` is not what it loaded last.

    hook: a command (never run by a shell) or an http(s) URL, which gets a POST. health: a command or URL
    (GET), tried every `pause_seconds` until it succeeds; hook and health share `timeout_seconds`. When
    one fails, the covered files that are still live go back to what was loaded last (to the newest intact
    backup, if nothing was), the hook runs again for them, and ReloadFailed says what happened. Without a
    hook nothing is run or recorded. Raises PermanentFailure for a damaged live file or an unusable
    setting, before anything is run. No message holds more of a setting than a URL's scheme, host, port
    and path, or a command's program.
    """
    started = time.monotonic()
    _check_setting("MUSE_RELOAD", hook)
    _check_setting("MUSE_RELOAD_HEALTH", health)
    check_directory(server)
    # No index can have this name: theirs begin with a letter.
    lock = server / ".locks" / ".reload.lock"
    with explained("Reload", server), locked(lock):
        sweep(loaded_file(server))
        loaded = loaded_contents(server)
        live = _live_contents(server, specs)
        covered = {index: sha256 for index, sha256 in live.items() if loaded.get(index) != sha256}
        if not covered:
            return Reload(
                {}, False, "The server has loaded every live file before; no restart is needed.", 0.0
            )
        if hook is None:
            message = (
                f"No reload hook is set (MUSE_RELOAD): restart the search server by hand to load"
                f" {', '.join(covered)}."
            )
            return Reload(covered, False, message, time.monotonic() - started)
        if (fault := _restart(hook, health, timeout_seconds, pause_seconds)) is not None:
            returned, lines = _go_back(server, specs, covered, loaded)
            if returned:
                second = _restart(hook, health, timeout_seconds, pause_seconds)
                lines.append(
                    "the server came up on them" if second is None else f"but the second try failed: {second}"
                )
            raise ReloadFailed(
                f"The search server in {server} did not take {', '.join(covered)}: {fault};"
                f" {'; '.join(lines)}.",
                next_step="look into the server's log; if it is down, restart it by hand.",
                returned=returned,
            )
        record_loaded(server, loaded | covered)
        message = f"The server loaded {', '.join(covered)}."
        return Reload(covered, True, message, time.monotonic() - started)


def _live_contents(server: Path, specs: Sequence[IndexSpec]) -> dict[str, str]:
    contents = {}
    for spec in specs:
        if (live := live_file(server, spec)) is None:
            continue
        # FAISS loads nearly every damaged file without a word and then answers wrongly.
        if live.damaged:
            raise PermanentFailure(
                f"Index {spec.name}: the live file {live.path} is damaged or was edited"
                f" (content {live.sha256[:12]}); the server was not restarted.",
                next_step="roll back, or deploy again with replace_damaged, then reload.",
            )
        contents[spec.name] = live.sha256
    return contents


def _go_back(
    server: Path, specs: Sequence[IndexSpec], covered: dict[str, str], loaded: dict[str, str]
) -> tuple[list[Deployment], list[str]]:
    """Put back what was loaded last; return the roll-backs, and a clause about every index."""
    returned, lines = [], []
    for spec in specs:
        if spec.name not in covered:
            continue
        try:
            to = loaded.get(spec.name) or _newest_backup(spec, server, covered[spec.name])
            if to is None:
                lines.append(f"{spec.name} stays, as there is nothing to go back to")
                continue
            if _is_older(spec, server, covered[spec.name], to):
                lines.append(f"{spec.name} stays, as it was rolled back since")
                continue
            # A newer deploy meanwhile stays: this restart says nothing about it.
            deployment = rollback(
                spec, server, to=to, replacing=covered[spec.name], lock_wait_seconds=_LOCK_WAIT_SECONDS
            )
        except MuseError as error:
            lines.append(f"{spec.name} could not go back: {error}")
        else:
            lines.append(f"{spec.name} went back to {deployment.sha256[:12]} of {deployment.partition}")
            returned.append(deployment)
    return returned, lines


def _is_older(spec: IndexSpec, server: Path, live_sha256: str, loaded_sha256: str) -> bool:
    """Whether the live file was built before the loaded one: an operator took that one back."""
    live, loaded = (read_manifest(server, spec.name, sha256) for sha256 in (live_sha256, loaded_sha256))
    return bool(live and loaded and live.built_at < loaded.built_at)


def _newest_backup(spec: IndexSpec, server: Path, live_sha256: str) -> str | None:
    """The newest intact content that is not live: what the server ran on, if nothing was recorded."""
    with explained(f"Index {spec.name}", server):
        for backup in backups(spec, server):
            if backup.manifest and backup.manifest.sha256 != live_sha256 and is_intact(backup):
                return backup.manifest.sha256
    return None


def _restart(hook: str, health: str | None, timeout_seconds: float, pause_seconds: float) -> str | None:
    """Run the hook, then the health check until it succeeds; return what failed, or None."""
    deadline = time.monotonic() + timeout_seconds
    if (fault := _call(hook, "POST", timeout_seconds)) is not None:
        return f"the reload hook failed: {fault}"
    while health is not None:
        # The last try may begin just before the deadline and is still given a moment.
        fault = _call(health, "GET", max(deadline - time.monotonic(), pause_seconds))
        if fault is None:
            return None
        if time.monotonic() + pause_seconds >= deadline:
            return f"the health check did not succeed within {timeout_seconds:g} s: {fault}"
        time.sleep(pause_seconds)
    return None


def _call(setting: str, method: str, timeout_seconds: float) -> str | None:
    if _is_url(setting):
        return _request(setting, method, timeout_seconds)
    return _run(shlex.split(setting), timeout_seconds)


def _run(command: list[str], timeout_seconds: float) -> str | None:
    # A file and not a pipe: a daemon that the command leaves behind would hold a pipe open.
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        except OSError as error:
            return f"{command[0]}: {error.strerror}"
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            return f"{command[0]} did not end within {timeout_seconds:g} s"
        if code == 0:
            return None
        output.seek(max(0, output.seek(0, os.SEEK_END) - (1 << 20)))
        text = _masked(output.read().decode("utf-8", "replace"), command[1:])[-_OUTPUT_CHARACTERS:]
        return f"{command[0]} ended with {code}: {text or 'no output'}"


def _masked(output: str, arguments: Sequence[str]) -> str:
    """The output in one line, without the arguments: any of them, or a part of one, may be a secret."""
    whole = [" ".join(argument.split()) for argument in arguments]
    parts = [part for argument in arguments for part in re.split(r"[\s=:@?&'\"]+", argument)]
    text = " ".join(output.split())
    # The longest first, or a part would hide the rest of its argument from the search.
    for secret in sorted({*whole, *parts}, key=len, reverse=True):
        if len(secret) >= _SECRET_CHARACTERS:
            text = text.replace(secret, "***")
    return text


def _request(url: str, method: str, timeout_seconds: float) -> str | None:
    parts = urlsplit(url)
    # The query may hold a token.
    shown = f"{method} {parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
    request = urllib.request.Request(url, data=b"" if method == "POST" else None, method=method)  # noqa: S310
    try:
        # The scheme was checked to be http or https.
        with urllib.request.urlopen(request, timeout=timeout_seconds):  # noqa: S310
            return None
    except urllib.error.HTTPError as error:
        return f"{shown} answered {error.code}"
    except (http.client.HTTPException, ValueError) as error:
        # Their words repeat the URL or the answer.
        return f"{shown}: {type(error).__name__}"
    except OSError as error:
        return f"{shown}: {getattr(error, 'reason', None) or error or type(error).__name__}"


def _is_url(setting: str) -> bool:
    return setting.lower().startswith(("http://", "https://"))


def _check_setting(variable: str, setting: str | None) -> None:
    if setting is not None and (remedy := _remedy(setting)) is not None:
        raise PermanentFailure(
            f"{variable} is neither a command nor an http(s) URL that can be called; nothing was run.",
            next_step=f"correct {variable}: {remedy}.",
        )


def _remedy(setting: str) -> str | None:
    """What to change in a hook or health check, without any of its characters; None if it is usable."""
    if not setting.isprintable():
        return "take the control characters out"
    try:
        if not _is_url(setting):
            command = shlex.split(setting)
            # Messages name the program; a mistyped URL or TOKEN=... in its place may be a secret.
            named = command and "://" not in command[0] and "=" not in command[0]
            return None if named else "begin with a program, http:// or https://"
        parts = urlsplit(setting)
        if "@" in parts.netloc:
            return "a URL takes no user part; put the token in the query or use a command"
        if " " in setting or not setting.isascii():
            return "percent-encode the URL's spaces and letters beyond ASCII"
        # Reading the port checks it.
        return None if parts.hostname and parts.port != 0 else "the URL needs a host, and a port above 0"
    except ValueError:
        return "balance the quotes of a command, or give the URL a port from 1 to 65535"
