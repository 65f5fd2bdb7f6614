"""Decide which URLs a program downloads for people it does not trust (server-side request forgery)."""

import ipaddress
import re
import socket
from typing import Any, NamedTuple, TypeAlias

SocketAddress: TypeAlias = tuple[socket.AddressFamily, tuple[Any, ...]]
"""An address family, and an address for ``socket.connect``."""

_MAX_LENGTH = 4096  # characters
_DEFAULT_PORTS = (80, 443)
_PLAIN_HOST = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f.]*:[0-9a-f:.]+\]"
# Narrower than the standards: where parsers disagree about the host, the URL does not match.
_URL = re.compile(rf"(https?)://({_PLAIN_HOST})(?::[0-9]{{1,5}})?(?:/[^\x00-\x20\\\x7f]*)?", re.ASCII | re.IGNORECASE)
_ENTRY = re.compile(rf"(\*|(?:\*\.)?(?:{_PLAIN_HOST}))(?::([1-9][0-9]{{0,4}}))?", re.ASCII | re.IGNORECASE)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)

_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_NOT_PUBLIC = [
    *map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24")),  # protocol assignments, 6to4 relays
    *map(ipaddress.ip_network, ("2001::/23", "2002::/16", "3fff::/20")),  # Teredo and others, 6to4, documentation
]


class RefusedUrlError(ValueError):
    """A URL that a :class:`UrlGuard` refuses."""


class _Entry(NamedTuple):
    """An entry of the allow list."""

    host: str
    ports: tuple[int, ...]


class UrlGuard:
    """Allow downloads from some hosts only, and never from addresses that are not public.

    Allowed are http and https without user name, on ports 80 and 443 or the port of the entry, of at most 4096
    characters, without whitespace, control characters and backslashes. A host is a name in ASCII (``xn--...`` for
    others) without a dot at its end, or an IP address in its usual form. A name is looked up once; if one of its
    addresses is not public, the URL is refused, and only the addresses that were checked are connected to. Redirects
    have to pass the same checks, are at most three, and do not lead from https to http. Proxies of the environment
    are not used, because a proxy looks up the name itself.

    Args:
        hosts: names such as ``"images.example.org"``; ``"*.example.org"`` for all names below it, not itself; ``"*"``
            for all public hosts; each with a port, such as ``"images.example.org:8443"``, or without. An IP address,
            with IPv6 in brackets, is trusted, also if it is private, and so are the loopback addresses of
            ``"localhost"``: list them only if everybody may read what they serve. Without hosts, all URLs are
            refused.

    Raises:
        TypeError: a host that is no string.
        ValueError: a host of another form.
    """

    def __init__(self, *hosts: str) -> None:
        self._entries = [_parse_entry(host) for host in hosts]

    def check_url(self, url: str, redirected_from: str = "") -> None:
        """Check the form of a URL; :meth:`resolve` checks its host and port.

        Raises:
            RefusedUrlError: a URL of another form, or a redirect from https to http.
        """
        if len(url) > _MAX_LENGTH:
            raise RefusedUrlError(f"expected a URL of at most {_MAX_LENGTH} characters, got {len(url)}")
        found = _URL.fullmatch(url)
        if not found:
            raise RefusedUrlError(
                "expected http:// or https://, a host name in ASCII or an IP address, and a path, without user name,"
                " spaces, control characters and backslashes"
            )
        _canonical_host(found[2])
        if redirected_from.lower().startswith("https:") and found[1].lower() != "https":
            raise RefusedUrlError("a redirect leads from https to http")

    def resolve(self, host: str, port: int) -> list[SocketAddress]:
        """Look up a host that is to be connected to, and return its addresses, all of them checked.

        Raises:
            OSError: the host is not found.
            RefusedUrlError: a host or port that is not allowed, or an address that is not public.
        """
        host = _canonical_host(host)
        entries = [entry.host for entry in self._entries if port in entry.ports]
        if not any(_covers(entry, host) for entry in entries):
            raise RefusedUrlError(f"the host {host!r} with port {port} is not allowed")
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        for *_, address in found:
            ip = ipaddress.ip_address(address[0])
            trusted = host in entries and (str(ip) == host or (host == "localhost" and ip.is_loopback))
            if not (trusted or is_public(ip)):
                raise RefusedUrlError(f"the host {host!r} has an address that is not public")
        return [(family, address) for family, *_, address in found]


def is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Return whether an address belongs to a host of the public internet, also behind IPv4-mapped IPv6 and NAT64."""
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped or ip in _NAT64:
            return is_public(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF))
        if ip not in _UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and not any(ip in network for network in _NOT_PUBLIC)


def _covers(entry: str, host: str) -> bool:
    """Return whether an entry of the allow list covers a host."""
    return entry in ("*", host) or (entry.startswith("*.") and host.endswith(entry[1:]))


def _canonical_host(host: str) -> str:
    """Return a name in lower case, or an IP address in its usual form; refuse numbers that only some parsers know."""
    host = host.lower().strip("[]")
    if ":" not in host and not _NUMBER.fullmatch(host.rpartition(".")[2]):
        return host
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        raise RefusedUrlError(f"expected a host name or an IP address in its usual form, got {host!r}") from None


def _parse_entry(text: str) -> _Entry:
    """Return an entry of the allow list."""
    if not isinstance(text, str):
        raise TypeError(f"hosts: expected strings, got {type(text).__name__}")
    found = _ENTRY.fullmatch(text)
    if not found:
        raise ValueError(
            "hosts: expected names such as 'images.example.org', '*.example.org', '*', '192.0.2.1' or '[2001:db8::1]',"
            f" with or without a port such as ':8443', got {text!r}"
        )
    return _Entry(_canonical_host(found[1]), (int(found[2]),) if found[2] else _DEFAULT_PORTS)
