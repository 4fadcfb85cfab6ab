"""The documents: their commands run, on a small installation, and the messages they explain are the source's.

Blocks fenced as `bash` are executed in order; `# exits 1` beside a command states its status. Programs that
stay up, and `make`, are looked for only. Deploying on a host (`deploy/`) is tested elsewhere.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import muse_assets
from muse_assets.cli import cli
from muse_assets_tests.installations import write_small_catalog

PACKAGE = Path(muse_assets.__file__).parent
ROOT = PACKAGE.parent
RUNBOOK = ROOT / "docs" / "operations.md"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = Path(sys.executable).parent
STAYS_UP = ("dagster-webserver", "dagster-daemon", "muse ui")
# Two indexes are enough for most; the runbook's own first build is the second of vibe, to roll back from.
FIRST_DAYS = (
    "muse sample --songs 60",
    "muse run --index vibe --index title",
    "muse sample --days 1",
)
FAILURES = {"PermanentFailure", "PassingFailure", "Conflict", "Unconfirmed", "ReloadFailed"}


# --- commands ----------------------------------------------------------------------------------------


def commands(document: Path) -> list[str]:
    """The commands of the document's bash blocks, continued lines joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```", document.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an embedded installation, built and deployed, whose tables have changed since."""
    folder = tmp_path_factory.mktemp("documented")
    catalog = write_small_catalog(folder / "catalog.toml")
    for line in FIRST_DAYS:
        status, said = execute(folder, line)
        assert status == 0, said
    assert catalog.exists()
    return folder


@pytest.fixture
def folder(installed: Path, tmp_path: Path) -> Path:
    """A copy of it, beside what a checkout has."""
    for name in ("home", "catalog.toml"):
        source = installed / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    for name in ("muse_assets", "workspace.yaml", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.upper().startswith(("MUSE_", "DAGSTER_"))}
    return kept | {
        "MUSE_HOME": str(folder / "home"),
        "MUSE_CATALOG": str(folder / "catalog.toml"),
        "MUSE_LOG_DIR": str(folder / "logs"),
        "PATH": f"{PROGRAMS}:{os.environ['PATH']}",
    }


def execute(folder: Path, line: str) -> tuple[int, str]:
    """Exit status and output. `muse` runs in this process: 2 s of imports are saved each time."""
    given = environment(folder)
    if not line.startswith("muse "):
        given |= {"DAGSTER_HOME": str(folder / "instance")}
        done = subprocess.run(
            ["bash", "-ec", line],
            cwd=folder,
            env=given,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr
    words = subprocess.run(
        ["bash", "-ec", f"printf '%s\\0' {line}"],
        cwd=folder,
        env=given,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")[1:-1]
    outside = {name: None for name in os.environ if name.upper().startswith(("MUSE_", "DAGSTER_"))}
    before = Path.cwd()
    os.chdir(folder)
    try:
        done_here = CliRunner().invoke(cli, words, env={**outside, **given})
    finally:
        os.chdir(before)
    return done_here.exit_code, f"{done_here.output}\n{done_here.exception or ''}"


def exists(line: str) -> bool | None:
    """Whether the program or target of a command that is not executed is there; None for one that is."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        return (
            re.search(rf"^{re.escape(words[1])}:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
            is not None
        )
    if line.startswith(STAYS_UP):
        return (PROGRAMS / words[0]).exists()
    return None


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if commands(d)], ids=lambda d: d.name)
def test_every_command_of_a_document_runs(document: Path, folder: Path) -> None:
    wrong = []
    for command in commands(document):
        line = command.removeprefix(".venv/bin/")
        there = exists(line)
        if there is None:
            stated = re.search(r"# exits (\d+)", line)
            status, said = execute(folder, line)
            there = status == (int(stated[1]) if stated else 0)
            if not there:
                wrong.append(f"{command}: exit status {status}: {said[-2000:]}")
        elif not there:
            wrong.append(f"{command}: no such program or target")
    assert wrong == []


def test_the_documents_have_commands() -> None:
    assert len(commands(ROOT / "README.md")) > 10
    assert len(commands(RUNBOOK)) > 15


def test_a_command_within_a_sentence_has_options_that_exist() -> None:
    wrong = []
    for document in DOCUMENTS:
        for words in map(shlex.split, re.findall(r"`muse ([^`]+)`", document.read_text("utf-8"))):
            if any(set(word) & set("<>…") for word in words):
                continue
            name, given = words[0], [word.replace("...", "vibe") for word in words[1:]]
            command = cli.commands.get(name)
            if command is None:
                wrong.append(f"{document.name}: muse {name}: no such command")
                continue
            try:
                # As typed: a sentence may leave the operands out.
                command.make_context(name, given, resilient_parsing=not given)
            except click.NoSuchOption as error:
                wrong.append(f"{document.name}: muse {name}: {error.message}")
            except click.UsageError as error:
                if "Missing" not in error.message:
                    wrong.append(f"{document.name}: muse {name}: {error.message}")
    assert wrong == []


# --- messages ----------------------------------------------------------------------------------------

VARIES = "\N{HORIZONTAL ELLIPSIS}"


def quoted_messages() -> list[str]:
    """The first column of the runbook's tables of messages."""
    section = RUNBOOK.read_text("utf-8").split("## Every message and its remedy", 1)[1]
    return re.findall(r"^\| `([^`]*(?: [^`]*|…[^`]*))` \|", section, re.MULTILINE)


def words_of(node: ast.AST) -> str:
    """A string of the source, with VARIES for what is filled in."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else VARIES
    if isinstance(node, ast.JoinedStr):
        return "".join(words_of(part) if isinstance(part, ast.Constant) else VARIES for part in node.values)
    return VARIES


def source() -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            yield path, node


def explains(quoted: str, said: str) -> bool:
    """Whether the fixed parts of `quoted` stand in `said` in their order."""
    fixed = [re.escape(part.strip()) for part in quoted.split(VARIES) if part.strip(" .:;,()")]
    return bool(fixed) and re.search(".*".join(fixed), said, re.DOTALL) is not None


def test_every_quoted_message_is_the_sources() -> None:
    said = {words_of(node) for _, node in source() if isinstance(node, ast.Constant | ast.JoinedStr)}
    quoted = quoted_messages()
    assert len(quoted) > 80
    # These two are told by their punctuation: an answer of Redis, and a full disk.
    rotten = [q for q in quoted if re.search(r"\w", q) and not any(explains(q, text) for text in said)]
    assert rotten == []


def test_every_message_has_its_remedy() -> None:
    quoted, missing = quoted_messages(), []
    for path, node in source():
        if not (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in FAILURES
            and node.args
        ):
            continue
        said = words_of(node.args[0])
        # Without words of its own it hands on another's.
        if re.search(r"\w", said) and not any(explains(q, said) for q in quoted):
            missing.append(f"{path.relative_to(ROOT)}:{node.lineno}: {said}")
    assert missing == []


def test_every_check_of_the_gate_has_its_remedy() -> None:
    from muse_assets.snapshots.gate import DESCRIPTIONS

    text = RUNBOOK.read_text("utf-8")
    assert [name for name in DESCRIPTIONS if f"| `{name}` |" not in text] == []


def test_every_setting_and_link_that_is_named_exists() -> None:
    from muse_assets.settings import Settings

    known = {f"MUSE_{name.upper()}" for name in Settings.model_fields}
    text = RUNBOOK.read_text("utf-8")
    assert set(re.findall(r"MUSE_[A-Z_]+[A-Z]", text)) - known == set()
    files = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert [link for link in files if not (RUNBOOK.parent / link).exists()] == []
    anchors = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) - anchors == set()
