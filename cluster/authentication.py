"""The private state folder of the embedded cluster and the token that its dashboard, agents and drivers ask for.

Ray 2.60 reads the token from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token when RAY_AUTH_MODE=token; over
HTTP it takes `Authorization: Bearer TOKEN` or, from a browser, the cookie `ray-authentication-token`.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from configs.errors import TelarError

COOKIE = "ray-authentication-token"


def state_folder() -> Path:
    """Where the embedded cluster of this user keeps its state: $TELAR_HOME or /tmp/telar-UID; need not exist."""
    given = os.environ.get("TELAR_HOME")
    return Path(given).absolute() if given else Path(f"/tmp/telar-{os.getuid()}")


def make_state_folder() -> Path:
    """Create the state folder with mode 0700; raises TelarError when it is not this user's alone."""
    folder = state_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise TelarError(f"{folder} is no folder of this user; remove it or set TELAR_HOME to a folder of yours")
        if status.st_mode & 0o077:
            folder.chmod(0o700)
    except OSError as error:
        raise TelarError(
            f"{folder}: cannot be made a private folder ({error.strerror}); set TELAR_HOME to a folder you may write"
        ) from error
    return folder


def token_path() -> Path:
    """The file that holds the embedded cluster's token."""
    return state_folder() / "token"


def make_token() -> Path:
    """Write a token of 256 random bits, readable by this user only, unless there is one; returns its path."""
    path = make_state_folder() / "token"
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    path.chmod(0o600)
    return path


def token_headers() -> dict[str, str]:
    """HTTP headers that authenticate a request to the embedded cluster; empty before its token exists."""
    try:
        token = token_path().read_text().strip()
    except FileNotFoundError:
        return {}
    return {"Authorization": f"Bearer {token}"}


def ray_token() -> str | None:
    """The token that this process's cluster asks for, where its environment says so; None without authentication.

    In Ray's order: RAY_AUTH_TOKEN, the file RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token. Raises TelarError when
    RAY_AUTH_MODE=token and there is none.
    """
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return None
    given = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    if given:
        return given
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token")
    try:
        return path.read_text().strip()
    except OSError as error:
        raise TelarError(
            f"RAY_AUTH_MODE is token, but the token file {path} cannot be read ({error.strerror})"
        ) from error
