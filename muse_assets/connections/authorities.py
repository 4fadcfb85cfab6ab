"""The CA file that a URL names, checked before any server is asked.

Here: whether it can serve. Not here: verifying a server by it (the drivers do), or the URLs' parameters
(`databases.py`, `redis_server.py`).
"""

from __future__ import annotations

import ssl

from muse_assets.failures import PermanentFailure


def check_authority(file: str, parameter: str) -> None:
    """Raise PermanentFailure unless `file` holds PEM certificates; the drivers would call the server down."""
    try:
        ssl.create_default_context(cafile=file)
    except OSError as error:  # SSLError is one
        reason = "holds no PEM certificate" if isinstance(error, ssl.SSLError) else f"{error.strerror}"
        raise PermanentFailure(
            f"The CA file {file}, which a URL names as {parameter}, cannot be used: {reason}.",
            next_step=f"correct {parameter} in the URL variable, or that file.",
        ) from None
