"""Proof of a shared secret at the start of a connection, both ways, with nonces that make replays worthless.

    acceptor  -> connector   magic, nonce A
    connector -> acceptor    nonce B, claim, HMAC(secret, "connector", A, B, claim)
    acceptor  -> connector   HMAC(secret, "acceptor", A, B, claim)

Plain challenge and response (ISO/IEC 9798-4, mutual); only bytes in and out, so that blocking, polled and asyncio
connections use the same code. Nothing is encrypted.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import struct

MAGIC = b"hmesh\x00\x00\x01"
NONCE = 16
MAC = 32
HELLO = len(MAGIC) + NONCE
"""Bytes of the acceptor's first message."""
ANSWER_HEAD = NONCE + 2
"""Bytes of the connector's answer before the claim; the last two are the claim's length."""
MAX_CLAIM = 4096


class AuthError(ConnectionError):
    """The other end does not know the secret, or does not speak this protocol."""


def mac(key: bytes, *parts: bytes) -> bytes:
    """Returns the HMAC-SHA256 of the parts, each with its length."""
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        digest.update(struct.pack("!Q", len(part)))
        digest.update(part)
    return digest.digest()


def equal(one: bytes, other: bytes) -> bool:
    """Compares in constant time."""
    return hmac.compare_digest(one, other)


class Acceptor:
    """The accepting end: send `hello`, then read ANSWER_HEAD bytes, then `rest(head)` bytes, then `check`."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._nonce = secrets.token_bytes(NONCE)
        self.hello = MAGIC + self._nonce
        self.session = b""
        """A key of this connection alone; set by `check`."""

    def rest(self, head: bytes) -> int:
        """Returns how many bytes follow the answer's head. Raises AuthError for a claim that is too long."""
        (size,) = struct.unpack("!H", head[NONCE:])
        if size > MAX_CLAIM:
            raise AuthError(f"a claim of {size} bytes is longer than {MAX_CLAIM}")
        return int(size) + MAC

    def check(self, head: bytes, rest: bytes) -> tuple[bytes, bytes]:
        """Returns (claim, proof to send back). Raises AuthError when the other end does not know the secret."""
        other, claim, proof = head[:NONCE], rest[:-MAC], rest[-MAC:]
        if not equal(proof, mac(self._secret, b"connector", self._nonce, other, claim)):
            raise AuthError("the other end does not know this job's secret")
        self.session = mac(self._secret, b"session", self._nonce, other)
        return claim, mac(self._secret, b"acceptor", self._nonce, other, claim)


class HandshakeEnded(ConnectionError):
    """The other end closed the connection before it had proved itself."""

    def __init__(self) -> None:
        super().__init__("the connection ended within the handshake")


class Connector:
    """The connecting end: read HELLO bytes, send `answer(hello)`, read MAC bytes, `check` them."""

    def __init__(self, secret: bytes, claim: bytes) -> None:
        if len(claim) > MAX_CLAIM:
            raise ValueError(f"a claim of {len(claim)} bytes is longer than {MAX_CLAIM}")
        self._secret, self._claim = secret, claim
        self._nonce = secrets.token_bytes(NONCE)
        self._expected = b""
        self.session = b""
        self._data, self._answered = b"", False

    def advance(self, sock: socket.socket) -> bool:
        """Reads on from a socket that doesn't block; returns True when the acceptor has proved itself.

        Raises OSError, HandshakeEnded and AuthError.
        """
        got = sock.recv((MAC if self._answered else HELLO) - len(self._data))
        if not got:
            raise HandshakeEnded
        self._data += got
        if not self._answered and len(self._data) == HELLO:
            sock.sendall(self.answer(self._data))
            self._data, self._answered = b"", True
        elif self._answered and len(self._data) == MAC:
            self.check(self._data)
            return True
        return False

    def answer(self, hello: bytes) -> bytes:
        """Returns what to send. Raises AuthError when the other end speaks another protocol."""
        if hello[: len(MAGIC)] != MAGIC:
            raise AuthError("the other end does not speak this protocol")
        other = hello[len(MAGIC) :]
        self._expected = mac(self._secret, b"acceptor", other, self._nonce, self._claim)
        self.session = mac(self._secret, b"session", other, self._nonce)
        proof = mac(self._secret, b"connector", other, self._nonce, self._claim)
        return self._nonce + struct.pack("!H", len(self._claim)) + self._claim + proof

    def check(self, proof: bytes) -> None:
        """Raises AuthError when the acceptor does not know the secret."""
        if not equal(proof, self._expected):
            raise AuthError("the accepting end does not know this job's secret")
