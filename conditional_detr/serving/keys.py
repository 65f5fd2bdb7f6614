"""API keys: kept as hashes, compared in constant time, read again on request."""

import hashlib
import hmac
import re
from pathlib import Path

_HASH = re.compile(r"sha256:([0-9a-f]{64})", re.IGNORECASE)
_COMMENT = re.compile(r"(^|\s)#.*")
_SHORTEST = 16  # characters


class ApiKeys:
    """The keys of a file: one a line, as it is or as ``sha256:`` and 64 hexadecimal digits.

    A ``#`` at the start of a line or after a space begins a comment.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: no key, or a line that is none.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._digests = self._read()

    def reload(self) -> None:
        """Read the file again; after an error, the keys are as before.

        Raises:
            OSError, ValueError: as the constructor.
        """
        self._digests = self._read()

    def identify(self, authorization: str) -> str | None:
        """Return a name of the key for logs and limits, which does not reveal it; None without a known key.

        Args:
            authorization: the header's value, ``Bearer KEY``.
        """
        scheme, _, key = authorization.partition(" ")
        digest = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # all are compared, so that the time does not depend on which one matches
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return digest.hex()[:8] if scheme.lower() == "bearer" and any(matches) else None

    def _read(self) -> list[bytes]:
        try:
            content = self.path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: expected text in UTF-8: {error}") from error
        except OSError as error:
            reason = error.strerror or error
            raise type(error)(f"{self.path}: the file of API keys cannot be read: {reason}") from error
        digests = []
        for number, line in enumerate(content.splitlines(), 1):
            text = _COMMENT.sub("", line).strip()
            if not text:
                continue
            hashed = _HASH.fullmatch(text)
            if text.lower().startswith("sha256:") and not hashed:
                raise ValueError(f"{self.path}:{number}: expected 64 hexadecimal digits after sha256:")
            if not hashed and (len(text) < _SHORTEST or not text.isascii() or any(c.isspace() for c in text)):
                raise ValueError(
                    f"{self.path}:{number}: expected a key of at least {_SHORTEST} ASCII characters without spaces,"
                    f" got {len(text)} characters"
                )
            digests.append(bytes.fromhex(hashed[1]) if hashed else hashlib.sha256(text.encode()).digest())
        if not digests:
            raise ValueError(f"{self.path}: expected at least one key, got none")
        return digests
