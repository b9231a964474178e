"""Who may call: a file of salted hashes, one line a token, read again whenever it changes; tokens are kept nowhere."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from index.errors import BrewlineError

ROLES = ("read", "write", "admin")
"""Each role may do what those before it may."""
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
LONGEST = 256
SALT_BYTES, HASH_BYTES = 16, 32
SCRYPT_N, SCRYPT_R, SCRYPT_P = 1024, 8, 1
# A token is 256 random bits, which no hash has to protect from guessing: a costlier one would only let strangers keep us busy.


class TokenError(BrewlineError):
    """The token file cannot be used, or a token cannot be added to it."""


@dataclass(frozen=True)
class Caller:
    """The name and role of a token."""

    name: str
    role: str

    def may(self, role: str) -> bool:
        """Whether the caller's role includes `role`."""
        return ROLES.index(self.role) >= ROLES.index(role)


@dataclass(frozen=True)
class Kept:
    """What the file holds of one token: "NAME ROLE scrypt SALT HASH", the last two in URL-safe base64."""

    caller: Caller
    salt: bytes = field(repr=False)
    digest: bytes = field(repr=False)

    def fits(self, token: str) -> bool:
        """Whether the token is the one that was hashed; takes milliseconds, and the same time for every wrong one."""
        return hmac.compare_digest(self.digest, _hash(token, self.salt))

    def line(self) -> str:
        """The line of the file."""
        salt, digest = (base64.urlsafe_b64encode(part).decode() for part in (self.salt, self.digest))
        return f"{self.caller.name} {self.caller.role} scrypt {salt} {digest}\n"


class TokenBook:
    """The tokens of a file, as the file is at this moment. A file that became unreadable lets nobody in.

    Raises TokenError at construction for a file that cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] = ()
        self._kept: dict[str, Kept] = {}
        self._verified: dict[bytes, Caller] = {}
        self._one_at_a_time = asyncio.Lock()
        self._refresh()

    async def caller(self, token: str) -> Caller | None:
        """Who has the token, None if nobody. A token is hashed slowly once and known by its SHA-256 from then on.

        Raises TokenError if the file changed and cannot be used.
        """
        self._refresh()
        quick = hashlib.sha256(token.encode()).digest()
        if quick in self._verified:
            return self._verified[quick]
        book, verified = self._kept, self._verified
        found = book.get(token.partition(".")[0])
        if found is None or len(token) > LONGEST:
            return None
        async with self._one_at_a_time:  # strangers who try tokens wait for each other, not the callers we know
            fits = await asyncio.to_thread(found.fits, token)
        self._refresh()
        if not fits or self._kept.get(found.caller.name) != found:
            return None
        if verified is self._verified:
            verified[quick] = found.caller
        return found.caller

    def _refresh(self) -> None:
        """What is known is what the file says now. A file that fails stays unread, so every call fails until it is mended."""
        try:
            now = self._path.stat()
        except OSError as error:
            self._seen = ()
            raise TokenError(f"token file {self._path}: {error.strerror}; make one with `brewline token make`") from error
        seen = (now.st_mtime_ns, now.st_ctime_ns, now.st_size, now.st_ino, now.st_mode)
        if seen != self._seen:
            self._seen, self._verified = (), {}
            self._kept = read_tokens(self._path)
            self._seen = seen


def read_tokens(path: Path) -> dict[str, Kept]:
    """The tokens of a file by name. Raises TokenError with the line, never with what stands in it."""
    try:
        if path.stat().st_mode & stat.S_IWOTH:
            raise TokenError(f"everybody can write into token file {path}, and so let themselves in: chmod 640 it")
        lines = path.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenError(
            f"token file {path} cannot be read ({type(error).__name__}); expected lines of `brewline token make`"
        ) from error
    found: dict[str, Kept] = {}
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            kept = _parsed(line)
            if kept is None or kept.caller.name in found:
                wrong = "is no line of `brewline token make`" if kept is None else "has a name that stands above already"
                raise TokenError(f"token file {path}, line {number} {wrong}; expected NAME ROLE scrypt SALT HASH, each name once")
            found[kept.caller.name] = kept
    return found


def make_token(path: Path, name: str, role: str) -> str:
    """The file (made if missing, for its owner only) has one line more, on the disk; returns the token, which is kept nowhere.

    Raises TokenError for a name that is taken or is none, an unknown role, or a file that cannot be used.
    """
    if NAME.fullmatch(name) is None or role not in ROLES:
        raise TokenError(f"name {name!r}, role {role!r}: expected 1 to 64 of A-Z a-z 0-9 _ - and one of {', '.join(ROLES)}")
    token, salt = f"{name}.{secrets.token_urlsafe(32)}", secrets.token_bytes(SALT_BYTES)
    line = Kept(Caller(name, role), salt, _hash(token, salt)).line()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise TokenError(f"token file {path}: {error.strerror}; name a file in a folder that you can write") from error
    with os.fdopen(descriptor, "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if name in read_tokens(path):
            raise TokenError(
                f"token file {path} has a {name} already; choose another name, and delete the old line when it is unused"
            )
        before = file.read()
        file.write((b"" if before.endswith(b"\n") or not before else b"\n") + line.encode())
        file.flush()
        os.fsync(file.fileno())
    return token


def _parsed(line: str) -> Kept | None:
    try:
        name, role, kind, salt, digest = line.split()
        kept = Kept(Caller(name, role), base64.urlsafe_b64decode(salt), base64.urlsafe_b64decode(digest))
    except ValueError:
        return None
    sound = NAME.fullmatch(name) and role in ROLES and kind == "scrypt"
    return kept if sound and len(kept.salt) == SALT_BYTES and len(kept.digest) == HASH_BYTES else None


def _hash(token: str, salt: bytes) -> bytes:
    return hashlib.scrypt(token.encode(), salt=salt, n=SCRYPT_N, r=SCRYPT_R, p=SCRYPT_P, dklen=HASH_BYTES)
