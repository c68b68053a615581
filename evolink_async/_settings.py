"""What a session is made with, checked."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from attrs import field, frozen

from evolink_async import _clock as clocks
from evolink_async._checks import instance, number, refuse, whole
from evolink_async._clock import Clock
from evolink_async._hosts import check_base_url, shown_url
from evolink_async._http.retry import RetryPolicy, Timeout
from evolink_async._http.secret import Secret
from evolink_async._polling.policy import PollPolicy
from evolink_async.errors import ConfigurationError

if TYPE_CHECKING:
    import aiohttp

__all__ = ["Settings", "read_api_key"]

DEFAULT_BASE_URL: Final = "https://api.evolink.ai"


def read_api_key(given: str | None) -> Secret:
    """The API key *given*, or the environment's.

    Raises:
        ConfigurationError: There is none, or it cannot be one.
    """
    key = os.environ.get("EVOLINK_API_KEY", "") if given is None else given
    if not isinstance(key, str) or not key.strip():
        raise ConfigurationError(
            "no API key is given",
            field="api_key",
            way_past="api_key",
            advice="pass Session(api_key=...) or set EVOLINK_API_KEY; keys are made at "
            "https://evolink.ai/dashboard/keys",
        )
    key = key.strip()
    if not all("!" <= c <= "~" for c in key):
        raise ConfigurationError("the API key has characters that no key has; copy it again")
    return Secret(key)


def _base_url(given: str | None) -> str:
    url = given or os.environ.get("EVOLINK_BASE_URL") or DEFAULT_BASE_URL
    try:
        return check_base_url(url)
    except ValueError as exc:
        allowed = "an https address such as https://api.evolink.ai, or http on this machine"
        raise refuse("base_url", shown_url(url), allowed, exc) from None


def _clock(given: Clock | None) -> Clock:
    return clocks.default() if given is None else given


@frozen(kw_only=True)
class Settings:
    """The settings of a `Session`, which has their meanings."""

    api_key: Secret
    base_url: str = field(converter=_base_url)
    max_in_flight: int
    max_connections: int
    max_requests_per_second: float | None
    poll: PollPolicy
    retry: RetryPolicy
    timeout: Timeout
    http: aiohttp.ClientSession | None
    clock: Clock = field(converter=_clock)

    def __attrs_post_init__(self) -> None:
        whole("max_in_flight", self.max_in_flight)
        whole("max_connections", self.max_connections)
        if self.max_requests_per_second is not None:
            number("max_requests_per_second", self.max_requests_per_second, above=True)
        instance("poll", self.poll, PollPolicy)
        instance("retry", self.retry, RetryPolicy)
        instance("timeout", self.timeout, Timeout)

    def permits(self) -> int:
        """HTTP requests in flight at once.

        Never more than a connector handed in has connections: its pool must not queue.
        """
        connector = self.http.connector if self.http is not None else None
        if connector is None:
            return self.max_connections
        limits = [limit for limit in (connector.limit, connector.limit_per_host) if limit > 0]
        return min([self.max_connections, *limits])
