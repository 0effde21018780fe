"""Keys belong in the environment of the machines that use them: not into a configuration, nor into anything written.

A run's configuration, its URL and what it says are kept in storage, sent to the cluster and shown in its dashboard.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

# scheme://key:secret@ (a secret may hold slashes, a port is none), https://token@; also in fsspec's chains of URLs.
CREDENTIALS = re.compile(r"(://)[^/@\s:'\"]*:(?!\d+(?:/|$))[^@\s'\"]+@|(https?://)[^/@\s:?#'\"]+@")
SIGNED = re.compile(
    r"([?&](?:x-(?:amz|goog)-(?:signature|credential|security-token)|sig|signature|token|access_token|api_?key|key|"
    r"secret|password)=)[^&\s'\"#]+",
    re.IGNORECASE,
)
HIDDEN = "[hidden]"
SECRET_NAMES = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
# Variables of such names that hold no secret but where one lies, or a setting.
HARMLESS_NAMES = re.compile(r"_(PATH|FILE|DIR|MODE|URI|URL|ID)$|^TOKENIZERS_", re.IGNORECASE)
SHORTEST_SECRET = 8


def holds_secret(url: str) -> bool:
    """Whether a URL has a password, a key or a signature in it. `hf://user/set@revision` has none."""
    return bool(CREDENTIALS.search(url) or (("://" in url) and SIGNED.search(url)))


def advice(where: str, url: str) -> str:
    """What is wrong with a URL that holds a secret; the secret is not repeated."""
    return (
        f"{where}: {redacted(url, {})} has a key in it, and would be kept and shown with it; put keys into the "
        "environment of the machines (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, FSSPEC_FTP_PASSWORD and so on) or "
        "into fsspec's configuration, and write the URL without"
    )


def redacted(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` without credentials in URLs and without the values of variables of the environment that are secrets."""
    text = SIGNED.sub(rf"\1{HIDDEN}", CREDENTIALS.sub(rf"\1\2{HIDDEN}@", text))
    for name, value in (os.environ if environment is None else environment).items():
        if (
            len(value) >= SHORTEST_SECRET
            and value in text
            and SECRET_NAMES.search(name)
            and not HARMLESS_NAMES.search(name)
        ):
            text = text.replace(value, HIDDEN)
    return text
