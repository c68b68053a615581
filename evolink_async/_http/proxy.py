"""The environment's proxy, asked for once instead of once per request.

aiohttp's ``trust_env`` asks twice per request, in a thread, and lets a netrc file override
the API key; the standard library's own reading of the environment is used instead.
"""

from __future__ import annotations

import urllib.request
from urllib.parse import urlsplit

from evolink_async._hosts import is_loopback_host
from evolink_async.errors import ConfigurationError

__all__ = ["environment_proxy"]


def environment_proxy(url: str) -> str | None:
    """The proxy *url* is to be reached through, with its credentials; None for none.

    This machine is never reached through one.

    Raises:
        ConfigurationError: The environment names a proxy of another kind.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxy = urllib.request.getproxies().get(parts.scheme)
    if not proxy or is_loopback_host(host) or urllib.request.proxy_bypass(host):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    named = urlsplit(proxy)
    if named.scheme not in {"http", "https"} or not named.hostname:
        raise ConfigurationError(
            f"the proxy set in the environment for {parts.scheme} is not an http proxy; "
            f"unset {parts.scheme}_proxy or name one such as http://proxy.example:3128"
        )
    return proxy
