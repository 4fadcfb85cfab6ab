"""What an installation sets by environment variable, with the embedded default for each.

Here: names, defaults and validation. Not here: connecting (`resources/`). Secrets (passwords and
tokens in URLs) exist only in these variables; `repr` hides them.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from muse_assets.catalog import Catalog, load_catalog


class Settings(BaseSettings):
    """Every setting, read from `MUSE_<NAME>`; unset means the embedded default under `home`."""

    model_config = SettingsConfigDict(
        env_prefix="MUSE_",
        frozen=True,
        env_ignore_empty=True,
        hide_input_in_errors=True,  # a refused value may be a secret
    )

    home: Path = Field(Path(".muse"), description="Folder of everything that is not set otherwise")
    embedding_db_url: SecretStr | None = Field(None, description="SQLAlchemy URL of the embedding tables")
    playlist_db_url: SecretStr | None = Field(None, description="SQLAlchemy URL of the program tables")
    redis_url: SecretStr | None = Field(None, description="redis://, rediss:// or unix:// URL")
    work_dir: Path | None = Field(None, description="Clusters and dated snapshots")
    server_dir: Path | None = Field(None, description="Where the search server reads its live files")
    log_dir: Path = Field(Path("logs"), description="Folder of the logs by job, of alerts, of legacy verbs")
    playlist_layout: Literal["song_tables", "song_pool"] = Field(
        "song_tables", description="One table per program, or one pool table with a program column"
    )
    # These two may carry a token.
    reload: str | None = Field(
        None, repr=False, description="Command or http(s) URL (POST) after the day's deploys"
    )
    reload_health: str | None = Field(
        None, repr=False, description="Command or http(s) URL (GET) that must then succeed"
    )
    dask_scheduler: str | None = Field(
        None,
        pattern=r"^(tcp|tls)://[^\s/@]+:\d+$",
        description="Dask scheduler (tcp:// or tls://host:port) whose workers encode large builds",
    )
    alert_url: SecretStr | None = Field(None, description="Webhook (http or https) that red runs are told to")
    ui_url: str | None = Field(None, description="Where people reach the Dagster UI: alerts link to it")
    automation: Literal["running", "stopped"] = Field(
        "stopped", description="Initial state of the schedule and the sensors"
    )
    retrain_hours: str = Field(
        "01-05",
        pattern=r"^([01][0-9]|2[0-3])-([01][0-9]|2[0-3])$",
        description="Hours of the day (Seoul) in which a drifted index with auto_retrain may be retrained",
    )
    catalog: Path | None = Field(None, description="TOML file with an installation's catalog overrides")

    @field_validator("alert_url")
    @classmethod
    def _is_web_address(cls, url: SecretStr | None) -> SecretStr | None:
        if url is not None and not url.get_secret_value().lower().startswith(("http://", "https://")):
            raise ValueError("it is not an http or https URL")
        return url

    @cached_property
    def root(self) -> Path:
        """`home` as an absolute path."""
        return self.home.expanduser().resolve()

    @property
    def embedded_databases(self) -> bool:
        """Whether both databases are the embedded default's SQLite files."""
        return self.embedding_db_url is None and self.playlist_db_url is None

    def embedding_url(self) -> str:
        """SQLAlchemy URL of the embedding database. May hold a password: never log it."""
        return _secret_or(self.embedding_db_url, f"sqlite:///{self.root / 'embeddings.sqlite'}")

    def playlist_url(self) -> str:
        """SQLAlchemy URL of the playlist database. May hold a password: never log it."""
        return _secret_or(self.playlist_db_url, f"sqlite:///{self.root / 'playlists.sqlite'}")

    def redis_address(self) -> str:
        """URL of Redis, empty for the embedded Valkey. May hold a password: never log it."""
        return _secret_or(self.redis_url, "")

    def valkey_directory(self) -> Path:
        """Folder of the embedded Valkey."""
        return self.root / "valkey"

    def work_directory(self) -> Path:
        """Folder of clusters and snapshots."""
        return (self.work_dir or self.root / "work").expanduser().resolve()

    def server_directory(self) -> Path:
        """Folder the search server loads from."""
        return (self.server_dir or self.root / "server").expanduser().resolve()

    def quiet_hours(self) -> tuple[int, int]:
        """`retrain_hours` as the first hour and the one after the last; over midnight the first is larger."""
        first, _, end = self.retrain_hours.partition("-")
        return int(first), int(end)

    def load_catalog(self) -> Catalog:
        """The catalog with this installation's overrides."""
        return load_catalog(self.catalog)


def _secret_or(secret: SecretStr | None, default: str) -> str:
    return secret.get_secret_value() if secret is not None else default
