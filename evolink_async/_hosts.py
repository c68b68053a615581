"""Which hosts and URLs are public, without I/O and for every spelling of an address.

A callback URL must be https on a public host (API page of the model, ``callback_url``). A
result link must lead to a public host, otherwise a false answer could make us fetch from the
network we run in. The base URL may be any trusted host, but the API key is sent to another
machine over https only.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from typing import Final
from urllib.parse import SplitResult, urlsplit

from evolink_async._text import printable

__all__ = [
    "check_base_url",
    "check_callback_url",
    "internal_host_reason",
    "is_loopback_host",
    "is_public_address",
    "shown_url",
    "split_url",
]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_RESERVED: Final = "a reserved address"

# Listed here, because `ipaddress.is_global` differs between patch releases of Python.
_INTERNAL: Final = tuple(
    (ipaddress.ip_network(network), words)
    for network, words in (
        ("0.0.0.0/32", "the unspecified address"),
        ("0.0.0.0/8", _RESERVED),
        ("10.0.0.0/8", "a private address"),
        ("100.64.0.0/10", "a carrier-grade NAT address"),
        ("127.0.0.0/8", "a loopback address"),
        ("169.254.0.0/16", "a link-local address"),
        ("172.16.0.0/12", "a private address"),
        ("192.0.0.0/24", _RESERVED),
        ("192.0.2.0/24", _RESERVED),
        ("192.88.99.0/24", _RESERVED),
        ("192.168.0.0/16", "a private address"),
        ("198.18.0.0/15", _RESERVED),
        ("198.51.100.0/24", _RESERVED),
        ("203.0.113.0/24", _RESERVED),
        ("224.0.0.0/4", "a multicast address"),
        ("240.0.0.0/4", _RESERVED),
        ("::/128", "the unspecified address"),
        ("::1/128", "a loopback address"),
        ("64:ff9b:1::/48", "a NAT64 address for local use"),
        ("2001::/32", "a Teredo address"),
        ("2001::/23", _RESERVED),
        ("2001:db8::/32", _RESERVED),
        ("3fff::/20", _RESERVED),
        ("fc00::/7", "a private address"),
        ("fe80::/10", "a link-local address"),
        ("fec0::/10", "a private address"),
        ("ff00::/8", "a multicast address"),
    )
)
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")

_INTERNAL_NAMES: Final = (
    ("localhost", "this machine's own name"),
    ("localdomain", "a name of the local network"),
    ("local", "a name of the local network"),
    ("internal", "a name of a private network"),
    ("intranet", "a name of a private network"),
    ("private", "a name of a private network"),
    ("corp", "a name of a private network"),
    ("home", "a name of a home network"),
    ("lan", "a name of the local network"),
    ("home.arpa", "a name of a home network"),
)

_ASCII_LABEL: Final = re.compile(r"[a-z0-9_-]{1,63}")
_NUMBER: Final = re.compile(r"0x[0-9a-f]*|[0-9]+")
_UNUSUAL: Final = "not an IPv4 address in its usual spelling"
_NETLOC: Final = re.compile(r"(\[[^\[\]@]*:[^\[\]@]*\]|[^\[\]:@]+)(?::([0-9]{1,5}))?")
_DEFAULT_PORTS: Final = {"https": 443, "http": 80}
_BASE_PATH: Final = re.compile(r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*/?")
_UNSEEN: Final = frozenset({"Cc", "Cf", "Cs", "Zs", "Zl", "Zp"})
# Characters that IDNA and resolvers skip although they are no format characters: joiners,
# fillers, variation selectors (DerivedCoreProperties.txt, Default_Ignorable_Code_Point).
_IGNORED: Final = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)
_DOTS: Final = str.maketrans(dict.fromkeys("\u3002\uff0e\uff61", "."))


def is_public_address(ip: str | Address) -> bool:
    """True if *ip* is a unicast address of the public internet; False for any other text.

    For an IPv4 address inside an IPv6 one (mapped, 6to4, NAT64) the IPv4 address decides.
    """
    try:
        return _internal_address_reason(ipaddress.ip_address(ip)) is None
    except ValueError:
        return False


def _internal_address_reason(address: Address) -> str | None:
    address = _unwrapped(address)
    for network, words in _INTERNAL:
        if address in network:
            return words
    unicast = address.version == 4 or address in _GLOBAL_UNICAST
    return None if unicast and address.is_global else _RESERVED


def _unwrapped(address: Address) -> Address:
    """The address that packets to *address* are delivered to."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def internal_host_reason(host: str) -> str | None:
    """Why *host* cannot be a public host, in words; None if it may be one.

    Args:
        host: A name or an address from a URL, with or without brackets, in any spelling that
            some resolver accepts: ``127.1``, ``0x7f000001``, full-width digits.
    """
    if ":" in host or "[" in host:
        return _ipv6_reason(host)
    name = _normalised(host)
    labels = name.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        return _ipv4_reason(name)
    if not _is_name(labels):
        return "not a host name"
    for suffix, words in _INTERNAL_NAMES:
        if name == suffix or name.endswith("." + suffix):
            return words
    return "a name without a domain" if len(labels) == 1 else None


def _ipv6_reason(host: str) -> str | None:
    address, _, zone = host.removeprefix("[").removesuffix("]").partition("%")
    try:
        reason = _internal_address_reason(ipaddress.IPv6Address(address))
    except ValueError:
        return "not an address"
    return reason or ("an address with a zone" if zone or "%" in host else None)


def _ipv4_reason(name: str) -> str | None:
    # Resolvers read 010.8.8.8 as 8.8.8.8 or as 10.8.8.8, so only the usual spelling is safe.
    try:
        return _internal_address_reason(ipaddress.IPv4Address(name))
    except ValueError:
        return _UNUSUAL


def _normalised(host: str) -> str:
    """*host* as a lenient resolver may read it: lower case, ASCII forms, nothing invisible."""
    text = unicodedata.normalize("NFKC", host).casefold().translate(_DOTS)
    text = _IGNORED.sub("", unicodedata.normalize("NFKC", text))
    shown = (c for c in text if unicodedata.category(c) != "Cf")
    return "".join(str(unicodedata.decimal(c, c)) for c in shown).rstrip(".")


def _is_name(labels: list[str]) -> bool:
    return sum(map(len, labels)) + len(labels) <= 254 and all(map(_is_label, labels))


def _is_label(label: str) -> bool:
    if label.isascii():
        return _ASCII_LABEL.fullmatch(label) is not None
    letters = (c for c in label if c not in "-_")
    return len(label) <= 63 and all(unicodedata.category(c)[0] in "LMN" for c in letters)


def is_loopback_host(host: str) -> bool:
    """True for ``localhost``, ``127.0.0.0/8`` and ``::1`` in their usual spellings only."""
    bare = host.lower().removeprefix("[").removesuffix("]")
    if bare == "localhost":
        return True
    try:
        return ipaddress.ip_address(bare).is_loopback and "%" not in bare
    except ValueError:
        return False


def split_url(url: str) -> SplitResult:
    """The parts of *url*, if every parser reads the same host and port from it.

    The result has a host, no user info, and a port that is absent or 1 to 65535.

    Raises:
        ValueError: The URL is ambiguous; the message says why, without the URL.
    """
    if "\\" in url or any(unicodedata.category(c) in _UNSEEN for c in url):
        # Parsers differ: urlsplit drops tabs and line ends, browsers read a backslash as a slash.
        raise ValueError("it holds a space, a control character or a backslash")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError("it is not a URL") from None
    if "@" in parts.netloc:
        raise ValueError("it holds user info")
    match = _NETLOC.fullmatch(parts.netloc)
    if match is None:
        raise ValueError(
            "it has no host, or an unusual one" if parts.scheme else "it has no scheme"
        )
    if match[2] is not None and not 1 <= int(match[2]) <= 65535:
        raise ValueError("its port is not 1 to 65535")
    return parts


def shown_url(url: str) -> str:
    """*url* for a message: without user info and query, which may hold secrets."""
    scheme, separator, rest = re.split(r"[?#]", url, maxsplit=1)[0].partition("//")
    authority, slash, path = rest.partition("/")
    return printable(f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path}", 200)


def check_callback_url(url: str) -> str | None:
    """Why the API would refuse *url* as a callback URL, None if it would not.

    The rules of the API's page: https, at most 2048 characters, no internal address.
    Names are not resolved.
    """
    if len(url) > 2048:
        return f"it has {len(url)} characters"
    try:
        parts = split_url(url)
    except ValueError as exc:
        return str(exc)
    if parts.scheme != "https":
        return f"its scheme is {printable(parts.scheme, 20)!r}"
    reason = internal_host_reason(parts.hostname or "")
    return None if reason is None else f"its host is {reason}"


def check_base_url(url: str) -> str:
    """*url* as origin and path, in lower case, without a default port or final slash.

    https is required unless the host is this machine (``localhost``, ``127.0.0.0/8``,
    ``::1``): the API key must not cross a network in clear.

    Raises:
        ValueError: It cannot be the base of the API; the message says why, without the URL.
    """
    parts = split_url(url)
    host = parts.hostname or ""
    loopback = is_loopback_host(host)
    if parts.scheme != "https" and not (parts.scheme == "http" and loopback):
        raise ValueError("it is not https")
    if parts.query or parts.fragment:
        raise ValueError("it has a query or a fragment")
    if not _BASE_PATH.fullmatch(parts.path):
        raise ValueError("its path is not plain")
    if not loopback and not _is_unambiguous_host(host):
        raise ValueError("its host is not a plain host name or address")
    host = f"[{host}]" if ":" in host else host
    port = "" if parts.port in {None, _DEFAULT_PORTS[parts.scheme]} else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def _is_unambiguous_host(host: str) -> bool:
    """True for a host that every parser reads alike; it may be internal."""
    if ":" in host:
        return "%" not in host and internal_host_reason(host) != "not an address"
    if _NUMBER.fullmatch(_normalised(host).split(".")[-1]):
        return _ipv4_reason(host) != _UNUSUAL
    return host.isascii() and not host.endswith(".") and _is_name(host.split("."))
