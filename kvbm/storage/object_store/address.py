"""Where a store lies: what a URL and its options may say, and how texts are freed of what nobody may read.

Credentials come from the environment or from a provider that the caller hands over, never from a URL or an option.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from urllib.parse import SplitResult, urlsplit

from kvbm.errors import ConfigError

SCHEMES = ("s3", "s3a", "gs", "az", "adl", "azure", "abfs", "abfss", "file", "memory")
OPTIONS = (
    "endpoint",
    "region",
    "account_name",
    "virtual_hosted_style_request",
    "unsigned_payload",
    "skip_signature",
    "checksum_algorithm",
    "server_side_encryption",
    "request_payer",
    "use_emulator",
)

_MAX_TEXT = 500
_SECRET_NAME = re.compile(r"^(AWS|AZURE|GOOGLE|GCS|GCP)_.*(KEY|SECRET|TOKEN|PASSWORD|SAS|CREDENTIAL|SIGNATURE)", re.I)
_USERINFO = re.compile(r"://[^/\s@]*@")
_QUERY = re.compile(r"\?[^\s)\"'>]*")


def check_url(url: str) -> SplitResult:
    """Take a URL apart.

    Raises
    ------
    ConfigError
        It names no store that we know, carries credentials or a query, or no bucket or directory. The message never
        repeats what may be secret.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigError("the URL of the object store cannot be read, give e.g. s3://bucket/folder") from None
    if parts.scheme not in SCHEMES:
        known = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ConfigError(f"an object store's URL begins with one of {known}, got {parts.scheme or 'no scheme'!r}")
    is_azure_container = parts.scheme in ("abfs", "abfss") and parts.password is None
    if "@" in parts.netloc and not is_azure_container:
        raise ConfigError(
            f"the {parts.scheme}:// URL carries credentials: leave them out, they come from the environment"
        )
    if parts.query or parts.fragment:
        raise ConfigError(
            f"the {parts.scheme}:// URL has a query or fragment: settings go in options, credentials in the environment"
        )
    if parts.scheme == "file" and (parts.netloc or not parts.path.strip("/")):
        raise ConfigError(f"a file URL names a directory, as file:///var/cache/blocks, got {safe_url(parts)!r}")
    if parts.scheme not in ("file", "memory") and not parts.netloc:
        raise ConfigError(f"the URL names no bucket, give e.g. {parts.scheme}://bucket/folder")
    return parts


def check_options(options: Mapping[str, str]) -> dict[str, str]:
    """Give the options that a store may have.

    Raises
    ------
    ConfigError
        One is not known, or carries credentials.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            raise ConfigError(
                f"option {name!r} of an object store is not known, use one of {', '.join(OPTIONS)}; credentials come "
                "from the environment"
            )
        if name == "endpoint" and ("@" in urlsplit(value).netloc or urlsplit(value).query):
            raise ConfigError("the endpoint carries credentials or a query: leave them out")
    return dict(options)


def check_prefix(prefix: str) -> str:
    """Give a prefix without slashes around it; `ConfigError` where a part of it cannot be a folder."""
    parts = [part for part in prefix.split("/") if part]
    for part in parts:
        if part in (".", "..") or not re.fullmatch(r"[A-Za-z0-9._=+-]+", part):
            raise ConfigError(f"prefix {prefix!r} is impossible, give names of letters, digits and ._=+- between /")
    return "/".join(parts)


def safe_url(parts: SplitResult) -> str:
    """Give the part of a URL that may be printed."""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def safe_text(error: BaseException) -> str:
    """Say in one line what an error says, without queries of URLs, user names in them, and values of credentials."""
    text = (str(error).strip() or repr(error)).partition("\n")[0].partition(": <?xml")[0]
    text = _QUERY.sub("", _USERINFO.sub("://", text))
    for name, value in os.environ.items():
        if len(value) >= 4 and _SECRET_NAME.match(name):
            text = text.replace(value, "***")
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."
