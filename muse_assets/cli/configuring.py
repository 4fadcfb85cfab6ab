"""Settings as a command reads them: a value that cannot be used ends in one sentence.

Here: checking settings before any work. Not here: their names and defaults (`settings.py`).
"""

from __future__ import annotations

from pydantic import ValidationError

from muse_assets.failures import PermanentFailure
from muse_assets.settings import Settings


def read_settings() -> Settings:
    """This process's settings; PermanentFailure names each variable whose value cannot be used."""
    try:
        return Settings()
    except ValidationError as error:
        # Without the value: the variable beside it may hold a password that was put here by mistake.
        faults = "; ".join(
            f"MUSE_{'_'.join(map(str, fault['loc'])).upper()}: {fault['msg']}" for fault in error.errors()
        )
        raise PermanentFailure(f"{faults}.", next_step="correct or unset the environment variable.") from None


def check_connections(settings: Settings) -> None:
    """Fail before the first run when no run could succeed.

    Raises PermanentFailure for a URL that cannot be used, naming its variable, and PassingFailure for an
    embedding database that is out of reach: each of the seven runs would wait for it through its retries.
    The playlist database and Redis may be down: the indexes are built and deployed without them.
    """
    from muse_assets.connections.databases import connected, engine_for
    from muse_assets.connections.redis_server import connect

    databases = {
        "MUSE_EMBEDDING_DB_URL": settings.embedding_url(),
        "MUSE_PLAYLIST_DB_URL": settings.playlist_url(),
    }
    for variable, url in databases.items():
        try:
            engine_for(url)
        except PermanentFailure as error:
            raise PermanentFailure(f"{variable}: {error.what}", next_step=error.next_step) from None
    if settings.redis_url is not None:
        connect(settings.redis_url.get_secret_value()).close()
    with connected(engine_for(settings.embedding_url()), "connecting before the first run"):
        pass
