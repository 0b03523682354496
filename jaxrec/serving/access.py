"""Who may ask a server: a bearer token, which an address that others can reach has to have."""

import hmac
import json
import os
from collections.abc import Sequence
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from jaxrec.config import UserError

VARIABLE = "JAXREC_TOKEN"
LEAST = 16
"""The fewest characters of a token."""
OPEN = ("/healthz", "/readyz")
"""Routes that anybody may ask, since what watches a server has no token."""
REFUSED = {"error": "this server answers those who have its token; send the header Authorization: Bearer TOKEN"}


def read_tokens(file: Path | None) -> tuple[str, ...]:
    """The accepted tokens: those of a file, one a line, or of the environment (JAXREC_TOKEN); none where none is given.

    With two lines a token can be replaced while its users still have the old one.

    Raises:
      UserError: the file can't be read, is empty, or a token is short or no visible ASCII.
    """
    place = VARIABLE if file is None else f"--token-file {file}"
    if file is None:
        text = os.environ.get(VARIABLE, "")
        if not text.strip():
            return ()
    else:
        try:
            text = file.read_text()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise UserError(f"{place} can't be read: {reason}; give a file with a token") from error
    tokens = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not tokens:
        raise UserError(f"{place} holds no token; write one of {LEAST} characters or more into it")
    if any(len(token) < LEAST or not token.isascii() or not token.isprintable() or " " in token for token in tokens):
        raise UserError(
            f"{place}: a token has {LEAST} or more visible ASCII characters without spaces; give a longer one"
        )
    return tokens


def _is_open(path: str) -> bool:
    return any(path == each or path.startswith(f"{each}/") for each in OPEN)


class TokenGate:
    """ASGI middleware: refuses requests without a token with status 401, before their body is read."""

    def __init__(self, app: ASGIApp, tokens: Sequence[str]):
        self.app, self.tokens = app, [token.encode() for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] != "http" or _is_open(scope["path"]) or self._allows(scope):
            await self.app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(REFUSED).encode()})

    def _allows(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1:
            return False
        kind, _, token = given[0].partition(b" ")
        # Each is compared, in a time that tells nothing of it.
        found = [hmac.compare_digest(token.strip(), each) for each in self.tokens]
        return kind.lower() == b"bearer" and any(found)
