"""Makes the search server load the day's files, and takes them back when it does not come up.

Here: the reload hook, the health check, the record of what was loaded last. Not here: replacing a file
(`deploying.py`). The server reads its files only at start, so this runs once after the day's deploys.
"""

from __future__ import annotations

import http.client
import json
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
from muse_assets.durable_files import locked, sweep, write_text
from muse_assets.failures import MuseError, PermanentFailure
from muse_assets.publishing.deploying import rollback
from muse_assets.publishing.layout import check_directory, explained, loaded_file
from muse_assets.publishing.live import live_file

_OUTPUT_CHARACTERS = 500


@dataclass(frozen=True)
class Reload:
    """covered: index -> sha256 of the live files the server had not loaded before. reloaded: whether it
    has now. message: one sentence for an operator.
    """

    covered: dict[str, str]
    reloaded: bool
    message: str
    seconds: float


def reload_server(
    server: Path,
    specs: Sequence[IndexSpec],
    *,
    hook: str | None,
    health: str | None,
    timeout_seconds: float = 120.0,
    pause_seconds: float = 1.0,
    lock_wait_seconds: float = 0.0,
) -> Reload:
    """Restart the search server if a live file of `specs` is not what it loaded last.

    hook: a command (never run by a shell) or an http(s) URL, which gets a POST. health: a command or URL
    (GET), tried every `pause_seconds` until it succeeds; hook and health share `timeout_seconds`. When
    one fails, the covered files go back to what was loaded last, the hook runs again for them, and
    PermanentFailure says what happened. Without a hook nothing is run or recorded.
    Raises PermanentFailure too for a damaged live file or an unusable setting, before anything is run.
    """
    started = time.monotonic()
    for setting in (hook, health):
        _check_setting(setting)
    check_directory(server)
    # No index can have this name: theirs begin with a letter.
    lock = server / ".locks" / ".reload.lock"
    with explained("Reload", server), locked(lock, wait_seconds=lock_wait_seconds):
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
            report = _go_back(server, [s for s in specs if s.name in covered], loaded)
            if report.returned:
                second = _restart(hook, health, timeout_seconds, pause_seconds)
                report.lines.append(
                    "the server came up on them" if second is None else f"but the second try failed: {second}"
                )
            raise PermanentFailure(
                f"The search server in {server} did not take {', '.join(covered)}: {fault};"
                f" {'; '.join(report.lines)}.",
                next_step="look into the server's log; if it is down, restart it by hand.",
            )
        write_text(loaded_file(server), json.dumps(loaded | covered, indent=1, sort_keys=True) + "\n")
        message = f"The server loaded {', '.join(covered)}."
        return Reload(covered, True, message, time.monotonic() - started)


def loaded_contents(server: Path) -> dict[str, str]:
    """Index -> sha256 that the server last loaded well. PermanentFailure if the record is unreadable."""
    path = loaded_file(server)
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        content = None
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise PermanentFailure(
            f"{path} is not a JSON object of hashes.",
            next_step="remove it; the next reload covers every live file and writes it anew.",
        )
    return content


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


@dataclass(frozen=True)
class _Return:
    returned: bool
    lines: list[str]


def _go_back(server: Path, specs: Sequence[IndexSpec], loaded: dict[str, str]) -> _Return:
    lines, returned = [], False
    for spec in specs:
        if spec.name not in loaded:
            lines.append(f"{spec.name} stays, as nothing was loaded before it")
            continue
        try:
            deployment = rollback(spec, server, to=loaded[spec.name], lock_wait_seconds=10.0)
        except MuseError as error:
            lines.append(f"{spec.name} could not go back: {error}")
        else:
            lines.append(f"{spec.name} went back to {deployment.sha256[:12]} of {deployment.partition}")
            returned = True
    return _Return(returned, lines)


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
        output.seek(0)
        text = " ".join(output.read(1 << 20).decode("utf-8", "replace").split())[-_OUTPUT_CHARACTERS:]
        return f"{command[0]} ended with {code}: {text or 'no output'}"


def _request(url: str, method: str, timeout_seconds: float) -> str | None:
    parts = urlsplit(url)
    # The query may hold a token, the user part a password.
    shown = f"{method} {parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
    request = urllib.request.Request(url, data=b"" if method == "POST" else None, method=method)  # noqa: S310
    try:
        # The scheme was checked to be http or https.
        with urllib.request.urlopen(request, timeout=timeout_seconds):  # noqa: S310
            return None
    except urllib.error.HTTPError as error:
        return f"{shown} answered {error.code}"
    except (OSError, http.client.HTTPException) as error:
        return f"{shown}: {getattr(error, 'reason', None) or error or type(error).__name__}"


def _is_url(setting: str) -> bool:
    return setting.startswith(("http://", "https://"))


def _check_setting(setting: str | None) -> None:
    if setting is None:
        return
    try:
        usable = bool(urlsplit(setting).hostname) if _is_url(setting) else bool(shlex.split(setting))
    except ValueError:
        usable = False
    if not usable:
        raise PermanentFailure(
            "The reload hook or health check is neither a command nor an http(s) URL.",
            next_step="correct MUSE_RELOAD or MUSE_RELOAD_HEALTH (quotes must be balanced).",
        )
