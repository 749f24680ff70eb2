"""Where a run directory is: an absolute path, or the URI of a folder in an object store."""

from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from bt_ray.errors import ConfigError

OBJECT_STORES = ("s3", "gs", "gcs")


def check_location(location: str) -> None:
    """Raises `ConfigError` if `location` is a URI, but none of an object store, or one with credentials in it."""
    parts = urlsplit(location)
    if not parts.scheme:
        return
    if parts.scheme not in OBJECT_STORES:
        raise ConfigError(f"{parts.scheme}:// is not supported: give a path, or a URI that begins with s3:// or gs://.")
    if parts.username or parts.password:
        raise ConfigError("credentials do not belong into a URI, which is kept and shown: put them into the environment.")
    if not parts.netloc:
        raise ConfigError(f"{location} names no bucket: write {parts.scheme}://bucket/folder.")


def parent_and_name(location: str) -> tuple[str, str]:
    """`location` as the location that it is in, and its name there."""
    parts = urlsplit(location)
    if not parts.scheme:
        path = Path(location).resolve()
        return str(path.parent), path.name
    above, _, name = parts.path.rstrip("/").rpartition("/")
    return urlunsplit(parts._replace(path=above)), name
