"""Files that are either whole or absent: all is written under a temporary name beside its place, then renamed."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_PARTIAL = ".partial-"


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the same folder; on success it replaces `path`, on any error it is removed.

    The error of a full disk (or any other `OSError`) keeps its type and gains the name of the file that was wanted.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_PARTIAL}{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise type(error)(error.errno, f"could not write {path}: {error.strerror or error}") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; on success it takes the place of `path`, on any error it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{_PARTIAL}{path.name}-", dir=path.parent))
    # mkdtemp makes folders private to the user; what is saved should have the permissions of any other new folder.
    temporary.chmod(0o777 & ~current_umask())
    try:
        yield temporary
        if path.exists():
            # Moved aside rather than deleted: the place is empty for the moment of a rename only.
            old = path.with_name(f"{_PARTIAL}old-{os.getpid()}-{path.name}")
            os.replace(path, old)
            os.replace(temporary, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(temporary, path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise type(error)(error.errno, f"could not write {path}: {error.strerror or error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def current_umask() -> int:
    """What the process takes off the permissions of new files; it can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return umask


def remove_partial(folder: str | os.PathLike[str]) -> None:
    """Removes what a killed process left half-written directly under `folder`."""
    for path in Path(folder).glob(f"{_PARTIAL}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically. NaN is refused, since other JSON readers do not take it."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf8")


def read_json(path: str | os.PathLike[str]) -> Any:
    return json.loads(Path(path).read_text(encoding="utf8"))


def fingerprint_strings(strings: Iterable[str]) -> str:
    """SHA-256 over strings and their borders, as hex."""
    digest = hashlib.sha256()
    for string in strings:
        data = string.encode("utf8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def fingerprint_json(value: Any) -> str:
    """SHA-256 over the canonical JSON of `value`, as hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf8")).hexdigest()


_WHOLE_BYTES = 1 << 30
_BLOCK = 1 << 20


def fingerprint_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's size and content, as hex; over 1 GiB of 256 blocks spread over it."""
    size = os.path.getsize(path)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        if size <= _WHOLE_BYTES:
            while block := file.read(_BLOCK):
                digest.update(block)
        else:
            for number in range(256):
                file.seek(number * (size - _BLOCK) // 255)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()
