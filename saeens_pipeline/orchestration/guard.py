"""The guard before the UI: an ASGI middleware that refuses requests that foreign web pages can make. It starts no server."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

# With any port, because a port may be forwarded. No foreign page has such a name: its own name can lead here, but stays in the Host header.
_LOOPBACK = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d{1,5})?")


class Guard:
    """ASGI middleware: passes requests of the UI's own pages and programs to `app`. Other requests are answered with 403 and the reason.

    Dagster's webserver takes queries and mutations from GET requests and forms, with any Host and any Origin. Without a guard every page
    that a browser on this machine opens could start runs, and after DNS rebinding also read. Accepted is:

    * a Host header with a name of the loopback interface, or with the host of one of `addresses`, such as `https://lab.example.org`;
    * no Origin header, or the one that belongs to this Host; websockets need it, because browsers always send it;
    * GET, except for queries and mutations, and POST with the content type JSON, which browsers send to other hosts only with permission.
    """

    def __init__(self, app: App, addresses: Iterable[str] = ()) -> None:
        self.app = app
        self.addresses = {urlsplit(address).netloc.lower(): address.lower() for address in addresses}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer one request, or one websocket."""
        reason = self.refusal(scope)
        if reason is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": reason})  # before it was accepted: status 403
        else:
            headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"x-content-type-options", b"nosniff")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": f"refused: {reason}\n".encode()})

    def refusal(self, scope: Message) -> str | None:
        """Return the reason for which a request is refused, or None."""
        if scope["type"] == "lifespan":
            return None
        hosts, origins, types = (_values(scope, name) for name in (b"host", b"origin", b"content-type"))
        host = hosts[0].lower() if len(hosts) == 1 else ""
        address = self.addresses.get(host) or (f"http://{host}" if _LOOPBACK.fullmatch(host) else None)
        if address is None:
            return "this Host is not an address of the UI; `saeens ui --url` names that of a reverse proxy"
        if [origin.lower() for origin in origins] not in ([], [address]):
            return "the Origin is another site"
        if scope["type"] == "websocket":
            return None if origins else "a websocket needs an Origin"
        if scope["method"] in ("GET", "HEAD"):
            is_query = scope["path"].rstrip("/").endswith("/graphql") and scope["query_string"]
            return "queries and mutations are taken by POST only" if is_query else None
        is_json = len(types) == 1 and types[0].partition(";")[0].strip().lower() == "application/json"
        return None if scope["method"] == "POST" and is_json else "changes are taken by POST with the content type application/json only"


def _values(scope: Message, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]
