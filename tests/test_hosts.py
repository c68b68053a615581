"""Public and internal hosts, callback URLs, base URLs: every spelling."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from evolink_async import Session
from evolink_async._hosts import (
    check_base_url,
    check_callback_url,
    internal_host_reason,
    is_loopback_host,
    is_public_address,
    shown_url,
    split_url,
)
from evolink_async.errors import ConfigurationError

INTERNAL_ADDRESSES = {
    "0.0.0.0": "unspecified",
    "0.1.2.3": "reserved",
    "10.0.0.1": "private",
    "100.64.0.1": "carrier-grade NAT",
    "100.127.255.255": "carrier-grade NAT",
    "127.0.0.1": "loopback",
    "127.255.255.254": "loopback",
    "169.254.169.254": "link-local",
    "172.16.0.1": "private",
    "172.31.255.255": "private",
    "192.0.0.192": "reserved",
    "192.0.2.1": "reserved",
    "192.88.99.1": "reserved",
    "192.168.255.255": "private",
    "198.18.0.1": "reserved",
    "203.0.113.9": "reserved",
    "224.0.0.1": "multicast",
    "239.255.255.255": "multicast",
    "240.0.0.1": "reserved",
    "255.255.255.255": "reserved",
    "::": "unspecified",
    "::1": "loopback",
    "::7f00:1": "reserved",
    "::ffff:127.0.0.1": "loopback",
    "::ffff:a00:1": "private",
    "::ffff:0:7f00:1": "reserved",
    "64:ff9b::7f00:1": "loopback",
    "64:ff9b::10.0.0.1": "private",
    "64:ff9b:1::1": "NAT64",
    "64:ff9b:1:ffff::808:808": "NAT64",
    "100::1": "reserved",
    "2001:0:4136:e378:8000:63bf:3fff:fdd2": "Teredo",
    "2001:2::1": "reserved",
    "2001:db8::1": "reserved",
    "2002:7f00:1::": "loopback",
    "2002:a00:1::1": "private",
    "2002:c0a8:101::1": "private",
    "3fff::1": "reserved",
    "4000::1": "reserved",
    "5f00::1": "reserved",
    "fc00::1": "private",
    "fd12:3456::1": "private",
    "fe80::1": "link-local",
    "fec0::1": "private",
    "ff02::1": "multicast",
}
PUBLIC_ADDRESSES = (
    "1.1.1.1",
    "8.8.8.8",
    "100.63.255.255",
    "100.128.0.1",
    "172.15.255.255",
    "172.32.0.1",
    "192.0.1.1",
    "223.255.255.255",
    "2606:4700:4700::1111",
    "2a00:1450::1",
    "::ffff:8.8.8.8",
    "2002:808:808::1",
    "64:ff9b::808:808",
)
# Of an IPv4 address, as inet_aton and URL parsers of browsers read them, or none at all.
ODD_SPELLINGS = """
127.1 127.0.1 0x7f000001 0X7F.1 0x7f.0x0.0x0.0x1 2130706433 017700000001 0177.0.0.1 00000177.0.0.1
0x 0 10.1 0xa9fea9fe 169.254.43518 3232235777 4294967295 010.8.8.8 134744072 8.8
08.8.8.8 256.1.1.1 1.2.3.4.5 4294967296 example.1 1..1
"""
INTERNAL_HOSTS = {
    **dict.fromkeys(ODD_SPELLINGS.split(), "usual spelling"),
    "1" * 5000: "usual spelling",
    # Dots and digits that become ASCII on the way.
    "127.0.0.1.": "loopback",
    "127.0.0.1..": "loopback",
    "\uff11\uff12\uff17.0.0.1": "loopback",
    "127\u30020\u30020\uff611": "loopback",
    "\u2460\u2461\u2466.0.0.1": "loopback",
    "\u0661\u0662\u0667.0.0.1": "loopback",
    "127.0.0.\u200b1": "loopback",
    "127.0.0.\ufe0f1": "loopback",
    "127.0.0\ufe0f.1": "loopback",
    "127.0.0.1\u034f": "loopback",
    "printer.loc\U000e0100al": "local network",
    # Names.
    "localhost": "this machine",
    "LOCALHOST": "this machine",
    "localhost.": "this machine",
    "foo.localhost": "this machine",
    "\u24dbocalhost": "this machine",
    "loc\u00adalhost": "this machine",
    "\U0001d40bocalhost": "this machine",
    "localho\u017ft": "this machine",
    "printer.local": "local network",
    "printer.LOCAL.": "local network",
    "metadata.google.internal": "private network",
    "router.home.arpa": "home network",
    "home.arpa": "home network",
    "nas.lan": "local network",
    "x.localdomain": "local network",
    "intranet": "private network",
    "wiki": "without a domain",
    "com": "without a domain",
    # No host at all.
    "": "not a host name",
    ".": "not a host name",
    "..": "not a host name",
    "a..b.com": "not a host name",
    ".example.com": "not a host name",
    "exa mple.com": "not a host name",
    "ex%61mple.com": "not a host name",
    "127.0.0.1%2f.example.com": "not a host name",
    "example.com/": "not a host name",
    "example.com\x00": "not a host name",
    "a" * 64 + ".com": "not a host name",
    "a." * 127 + "com": "not a host name",
    "exa\u2044mple.com": "not a host name",
    # IPv6 as written in URLs.
    "[::1]": "loopback",
    "::1%eth0": "loopback",
    "[fe80::1%25eth0]": "link-local",
    "[2606:4700::1%eth0]": "zone",
    "2606:4700::1%": "zone",
    "[::ffff:127.0.0.1]": "loopback",
    "[]": "not an address",
    "[127.0.0.1]": "not an address",
    "[v1.x]": "not an address",
    "1:2": "not an address",
}
PUBLIC_HOSTS = (
    "example.com",
    "EXAMPLE.COM.",
    "a_b.example.com",
    "b\u00fccher.example",
    "\u4f8b\u3048.jp",
    "xn--bcher-kva.example",
    "localhost.example.com",
    "local.example.com",
    "notlocal.com",
    "8.8.8.8",
    "[2606:4700:4700::1111]",
    "2606:4700:4700::1111",
    "1.2.3.4.example.com",
    "0x7f.example.com",
)


@pytest.mark.parametrize(("address", "words"), INTERNAL_ADDRESSES.items())
def test_internal_address(address: str, words: str) -> None:
    """An internal address is not public, and its host says of what kind it is."""
    assert not is_public_address(address)
    assert not is_public_address(ipaddress.ip_address(address))
    assert words in (internal_host_reason(address) or "")


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_public_address(address: str) -> None:
    """A public address is public, also inside another one."""
    assert is_public_address(address)
    assert internal_host_reason(address) is None


@pytest.mark.parametrize("text", ["", "example.com", "127.1", "::1%", "1.2.3.4/8", "\u0661.1.1.1"])
def test_no_address(text: str) -> None:
    """What is not an address is not a public one."""
    assert not is_public_address(text)


@pytest.mark.parametrize(("host", "words"), INTERNAL_HOSTS.items())
def test_internal_host(host: str, words: str) -> None:
    """An internal host is recognised in each spelling."""
    assert words in (internal_host_reason(host) or "")


@pytest.mark.parametrize("host", PUBLIC_HOSTS)
def test_public_host(host: str) -> None:
    """A host that may be public is accepted."""
    assert internal_host_reason(host) is None


@given(
    st.sampled_from(sorted(INTERNAL_ADDRESSES)).filter(lambda text: ":" not in text),
    st.lists(st.sampled_from(["d", "o", "x"]), min_size=4, max_size=4),
    st.integers(1, 4),
)
def test_respelled_address(address: str, bases: list[str], parts: int) -> None:
    """No mixture of bases and parts hides an internal IPv4 address."""
    spelled = _respell(int(ipaddress.IPv4Address(address)), bases, parts)
    assert socket.inet_aton(spelled) == ipaddress.IPv4Address(address).packed
    assert internal_host_reason(spelled) is not None
    assert check_callback_url(f"https://{spelled}/") is not None


def _respell(number: int, bases: list[str], parts: int) -> str:
    leading = [number >> (24 - 8 * i) & 0xFF for i in range(parts - 1)]
    last = number & (0xFFFFFFFF >> (8 * (parts - 1)))
    write: dict[str, Callable[[int], str]] = {"d": str, "o": "0{:o}".format, "x": hex}
    return ".".join(write[b](n) for b, n in zip(bases, [*leading, last], strict=False))


@given(
    st.from_regex(
        r"(0x[0-9a-f]{0,9}|[0-9]{1,11})(\.(0x[0-9a-f]{0,3}|[0-9]{1,4})){0,4}\.?", fullmatch=True
    )
)
def test_numeric_hosts_like_inet_aton(host: str) -> None:
    """A numeric host that the C library reads as an internal address is never accepted."""
    try:
        packed = socket.inet_aton(host.strip().rstrip("."))
    except (OSError, UnicodeEncodeError):
        packed = None
    if packed is not None and not is_public_address(ipaddress.IPv4Address(packed)):
        assert internal_host_reason(host) is not None


@given(st.text(max_size=40))
def test_any_text(text: str) -> None:
    """Any text as a host or URL gives an answer or our exception."""
    internal_host_reason(text)
    is_loopback_host(text)
    shown_url(text)
    check_callback_url(text)
    check_callback_url(f"https://{text}")
    for url in (text, f"https://{text}", f"http://localhost{text}"):
        try:
            base = check_base_url(url)
        except ValueError:
            continue
        assert check_base_url(base) == base


@given(
    st.text(
        st.sampled_from("ab.:/@?#[]%\\;1\u3002\uff0e\uff0f\u2100\ufe0f\u034f\u2460 \t-0x"),
        max_size=16,
    ),
    st.sampled_from(["https://", "HTTPS://", "https:", "https:/", "//", "https:///"]),
)
def test_parsers_agree(rest: str, scheme: str) -> None:
    """Where a URL is accepted, urllib and yarl, which connects, read the same host and port."""
    try:
        parts = split_url(scheme + rest)
    except ValueError:
        return
    if parts.scheme != "https" or internal_host_reason(parts.hostname or "") is not None:
        return
    url = URL(scheme + rest)
    assert url.port == (parts.port or 443)
    assert internal_host_reason(url.raw_host or "") is None
    if (parts.hostname or "").isascii():
        assert url.raw_host == parts.hostname


@given(
    st.sampled_from(["127.0.0.1", "10.1", "nas.local", "localhost"]),
    st.integers(0, 12),
    st.characters(),
)
def test_hidden_characters(host: str, at: int, character: str) -> None:
    """No character that yarl leaves out or maps makes an internal host look public."""
    spelled = host[:at] + character + host[at:]
    try:
        parts = split_url(f"https://{spelled}/")
        read = URL(f"https://{spelled}/").raw_host or ""
    except ValueError:
        return
    if internal_host_reason(read) is not None:
        assert internal_host_reason(parts.hostname or "") is not None
        assert check_callback_url(f"https://{spelled}/") is not None


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost", "127.0.0.1", "127.9.8.7", "::1", "[::1]"]
)
def test_loopback_host(host: str) -> None:
    """This machine's usual names are known."""
    assert is_loopback_host(host)


@pytest.mark.parametrize(
    "host",
    ["", "127.1", "localhost.example.com", "x.localhost", "10.0.0.1", "::1%lo", "0.0.0.0", "::"],
)
def test_not_loopback_host(host: str) -> None:
    """Nothing else counts as this machine."""
    assert not is_loopback_host(host)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com",
        "https://example.com/hook",
        "https://example.com:8443/hook?token=a%20b&x=@#part",
        "HTTPS://EXAMPLE.COM/",
        "https://8.8.8.8/",
        "https://[2606:4700:4700::1111]:443/",
        "https://b\u00fccher.example/\u00fc",
        "https://example.com/" + "a" * (2048 - 20),
    ],
)
def test_good_callback(url: str) -> None:
    """A callback URL that follows the page's rules is accepted."""
    assert check_callback_url(url) is None


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "no scheme"),
        ("example.com/hook", "no scheme"),
        ("//example.com/hook", "scheme"),
        ("http://example.com/", "scheme is 'http'"),
        ("ftp://example.com/", "scheme"),
        ("javascript:alert(1)", "no host"),
        ("https:example.com", "no host"),
        ("https:///example.com", "no host"),
        ("https://example.com/" + "a" * (2049 - 20), "2049 characters"),
        ("https://user@example.com/", "user info"),
        ("https://user:pass@example.com/", "user info"),
        ("https://example.com@127.0.0.1/", "user info"),
        ("https://@example.com/", "user info"),
        ("https://example.com\\@127.0.0.1/", "backslash"),
        ("https://example.com/a b", "space"),
        ("https://example.com/\t", "control"),
        (" https://example.com/", "space"),
        ("https://example.com\n/", "control"),
        ("https://exam\tple.com/", "control"),
        ("https://example.com/\x00", "control"),
        ("https://example.com/\x1b[31m", "control"),
        ("https://example.com/\u202e", "control"),
        ("https://example.com/\ud800", "control"),
        ("https://example.com:0/", "port"),
        ("https://example.com:65536/", "port"),
        ("https://example.com:99999/", "port"),
        ("https://example.com:/", "unusual"),
        ("https://example.com:80:443/", "unusual"),
        ("https://example.com:\uff18\uff10/", "unusual"),
        ("https://example.com:-1/", "unusual"),
        ("https://[::1/", "not a URL"),
        ("https://example\u2100.com/", "not a URL"),
        ("https://[::1]x/", ""),
        ("https://x[::1]/", ""),
    ],
)
def test_bad_callback(url: str, words: str) -> None:
    """A callback URL that breaks a rule is refused, and the reason says which."""
    assert words in (check_callback_url(url) or "accepted")


@pytest.mark.parametrize(
    "host", [*INTERNAL_ADDRESSES, *(host for host in INTERNAL_HOSTS if "/" not in host)]
)
def test_callback_to_internal_host(host: str) -> None:
    """A callback URL on an internal host is refused in every spelling."""
    bracketed = f"[{host}]" if ":" in host and "[" not in host else host
    assert check_callback_url(f"https://{bracketed}/hook") is not None
    assert check_callback_url(f"https://{bracketed}:8443/hook") is not None


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("https://api.evolink.ai", "https://api.evolink.ai"),
        ("https://api.evolink.ai/", "https://api.evolink.ai"),
        ("HTTPS://API.EVOLINK.AI:443/Proxy//", None),
        ("HTTPS://API.EVOLINK.AI:443/Proxy/", "https://api.evolink.ai/Proxy"),
        (
            "https://gateway.corp.internal:8443/evolink/v2",
            "https://gateway.corp.internal:8443/evolink/v2",
        ),
        ("https://10.0.0.7/", "https://10.0.0.7"),
        ("https://gateway", "https://gateway"),
        ("https://[fd00::1]:8443", "https://[fd00::1]:8443"),
        ("http://localhost:8080", "http://localhost:8080"),
        ("http://127.0.0.1:80/x", "http://127.0.0.1/x"),
        ("http://127.1.2.3", "http://127.1.2.3"),
        ("http://[::1]:9000/", "http://[::1]:9000"),
        ("https://localhost", "https://localhost"),
        ("http://example.com", None),
        ("http://10.0.0.1", None),
        ("http://localhost.example.com", None),
        ("http://127.1", None),
        ("https://127.1", None),
        ("https://0x7f000001", None),
        ("https://999.1.1.1", None),
        ("https://example.com.", None),
        ("https://b\u00fccher.example", None),
        ("https://[fe80::1%eth0]", None),
        ("https://[::x]", None),
        ("ftp://localhost", None),
        ("api.evolink.ai", None),
        ("", None),
        ("https://user:secret@api.evolink.ai", None),
        ("https://api.evolink.ai@evil.example", None),
        ("https://api.evolink.ai?x=1", None),
        ("https://api.evolink.ai/#x", None),
        ("https://api.evolink.ai/../x", None),
        ("https://api.evolink.ai/a%2e", None),
        ("https://api.evolink.ai/a b", None),
        ("https://api.evolink.ai\\x", None),
        ("https://api.evolink.ai:0", None),
        ("https://api.evolink.ai:443x", None),
        ("https://a..b", None),
    ],
)
def test_base_url(url: str, base: str | None) -> None:
    """A base URL is normalised, or refused in words that hold no user info or query."""
    if base is not None:
        assert check_base_url(url) == base
        return
    with pytest.raises(ValueError, match=r"^it (is|has|holds)|^its ") as caught:
        check_base_url(url)
    with pytest.raises(ConfigurationError, match=r"(?s)base_url='.*' is not allowed: ") as caught:
        Session("sk-a-key", base_url=url or "https:")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://h.example/a/b.png?Signature=x#y", "https://h.example/a/b.png"),
        ("https://user:pass@h.example/a@b", "https://h.example/a@b"),
        ("https://h.example#?x", "https://h.example"),
        ("https://h.example/\x1b[31m", "https://h.example/ [31m"),
        ("nonsense", "nonsense"),
    ],
)
def test_shown_url(url: str, shown: str) -> None:
    """What a message shows of a URL has no user info, no query and no control characters."""
    assert shown_url(url) == shown


def test_long_url_is_shown_short() -> None:
    """A message does not repeat a URL of any length."""
    assert len(shown_url("https://h.example/" + "a" * 10_000)) <= 200


@given(st.from_regex(r"https://[a-z.:@/?#\[\]]{1,20}", fullmatch=True))
def test_split_url_has_what_it_promises(url: str) -> None:
    """An accepted URL has a host, no user info, and a usable port."""
    try:
        parts = split_url(url)
    except ValueError:
        return
    assert parts == urlsplit(url)
    assert parts.hostname
    assert parts.username is None
    assert parts.port is None or 1 <= parts.port <= 65535
