"""URLs of strangers: only listed hosts, and never addresses that are not public, in whatever way they are written."""

import copy
import gzip
import http.server
import ipaddress
import os
import pickle
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.parse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conditional_detr import Limits, UrlGuard
from conditional_detr.inference.downloads import fetch_url
from conditional_detr.inference.preparation import IMAGE_ERRORS
from conditional_detr.inference.sources import resolve_source
from conditional_detr.inference.url_guard import RefusedUrlError
from helpers.fuzzing import LIMITS

CONTENT = b"the bytes of an image"
PACKED = gzip.compress(CONTENT)
PUBLIC = "93.184.216.34"
GETADDRINFO, CONNECT = socket.getaddrinfo, socket.socket.connect


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers each path in another way: ``/to?URL`` and ``/chain3`` redirect, ``/swollen`` with a body without end."""

    def do_GET(self):
        path, _, target = self.path.partition("?")
        redirects = int(path.removeprefix("/chain") if path.startswith("/chain") else 0)
        if redirects or path in ("/to", "/swollen"):
            self.send_response(302)
            chain = f"/chain{redirects - 1}" if redirects > 1 else "/image"
            self.send_header("Location", urllib.parse.unquote(target) if path == "/to" else chain)
        else:
            self.send_response(200)
        if path == "/packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        try:
            if path == "/silent":
                time.sleep(1)
            while path == "/swollen":
                self.wfile.write(b"X")
                time.sleep(0.05)
            for _ in range(10_000 if path == "/endless" else 0):
                self.wfile.write(bytes(1 << 16))
            self.wfile.write(PACKED if path == "/packed" else CONTENT)
        except OSError:
            pass  # the client has disconnected

    def log_message(self, *_):
        pass


def serve(wrap=None):
    """Start a web server, yield its port, and stop it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if wrap:
        server.socket = wrap(server.socket)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def server():
    yield from serve()


class Network:
    """Stands in for name servers and the internet, and records what is looked up and connected to.

    Attributes:
        names: the answers to the first, second ... look-up of a name.
        routes: the local port that stands for a public address; without one, it refuses.
    """

    def __init__(self):
        self.names, self.routes, self.lookups, self.connections = {}, {}, [], []

    def getaddrinfo(self, host, port, *args, **options):
        self.lookups.append(host)
        if host not in self.names:
            options["flags"] = 0 if host == "localhost" else socket.AI_NUMERICHOST
            return GETADDRINFO(host, port, *args, **options)
        answers = self.names[host]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        return [found for ip in answer for found in GETADDRINFO(ip, port, *args, **options)]

    def connect(self, sock, address):
        self.connections.append(address[:2])
        ip, port = address[:2]
        if ip != "127.0.0.1":
            if ip not in self.routes:
                raise ConnectionRefusedError("refused")
            port = self.routes[ip]
        with socket.socket() as local:
            CONNECT(local, ("127.0.0.1", port))
            os.dup2(local.fileno(), sock.fileno())  # which may be a socket of IPv6


@pytest.fixture
def network(monkeypatch):
    network = Network()
    monkeypatch.setattr(socket, "getaddrinfo", network.getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", lambda sock, address: network.connect(sock, address))
    return network


def fetch(url, *hosts, **limits):
    return fetch_url(url, "image", Limits(guard=UrlGuard(*hosts), **limits))


def assert_refused(url, network, *hosts, reason=""):
    network.connections.clear()
    with pytest.raises(RefusedUrlError, match=f"^image: the URL is refused: .*{reason}") as caught:
        fetch(url, *hosts)
    assert network.connections == []
    return str(caught.value)


NUMBERS = ["2130706433", "017700000001", "0x7f000001", "0X7F.1", "0177.0.0.1", "0x7f.0.0.0x1", "127.1", "127.0.1"]
NUMBERS += ["0", "127.0.0.01", "127.0.0.1.", "256.1.1.1", "1.2.3.4.5", "[127.0.0.1]", "[::ffff:127.1]", "::1", "[::1"]
NUMBERS += ["[fe80::1%25lo]", "[fe80::1%lo]", "[::1%251]", "[v1.127.0.0.1]", "%31%32%37.0.0.1", "127%2e0.0.1"]
NUMBERS += ["１２７.0.0.1", "①②⑦.⓪.⓪.①", "127。0。0。1", "127．0．0．1", "[::１]", "0x7f000001.", "1.0x"]  # noqa: RUF001

NAMES = ["localhost.", "images.test.", ".images.test", "images..test", "*.images.test", "images%2etest", "", "."]
NAMES += ["b\xfccher.test", "\u24d8mages.test", "images.test%00.evil.test", "images.test,evil.test", "a;images.test"]
NAMES += ["user@images.test", "user:password@images.test", ":@images.test", "images.test@evil.test"]
NAMES += ["images.test:80@evil.test", "images.test#@evil.test", "images.test?@evil.test", "images.test%2f@evil.test"]
NAMES += ["images.test\\@evil.test", "evil.test\\.images.test", "images.test&@evil.test", "images.test%40evil.test"]
NAMES += ["ima\tges.test", "ima\nges.test", "images.test\r\n", "\x00images.test", " images.test", "images.test "]
NAMES += ["images.test:", "images.test:80:80", "images.test:+80", "images.test:-1", "images.test:\uff18\uff10"]
NAMES += ["images.test:x", "images.test:000080", "images.test: 80", "images.test:0x50", "evil.test\u3000.images.test"]
NAMES += ["/images.test", "\u212amages.test", "\u017fimages.test"]

URLS = ["", "//images.test/", "images.test", "http:images.test", "http:/images.test/", "http:\\\\images.test\\"]
URLS += ["file:///etc/passwd", "ftp://images.test/", "gopher://images.test/", "data:,x", "jar:http://images.test/"]
URLS += ["<URL:http://images.test/>", " http://images.test/", "\x01http://images.test/", "url:http://images.test/"]
URLS += ["http://images.test/a b", "http://images.test/\n", "http://images.test/a\tb", "http://images.test/\x7f"]
URLS += ["http://images.test/\\a", "http://images.test/ HTTP/1.1\r\nHost: evil.test", "http\u017f://images.test/"]


@pytest.mark.parametrize(
    "url", [*(f"{scheme}://{host}/" for host in NUMBERS + NAMES for scheme in ("http", "HTTPS")), *URLS], ids=ascii
)
def test_forms_that_parsers_read_in_different_ways_are_not_even_looked_up(network, url):
    network.names["images.test"] = network.names["evil.test"] = [[PUBLIC]]
    assert_refused(url, network, "*", "images.test", "localhost", reason="expected ")
    assert network.lookups == []


def test_length(network):
    network.names["images.test"] = [[PUBLIC]]
    url = "http://images.test/".ljust(4096, "a")
    with pytest.raises(OSError, match="refused"):  # by the network
        fetch(url, "*")
    assert_refused(url + "a", network, "*", reason="at most 4096 characters, got 4097")


NOT_PUBLIC = ["0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.127.255.255", "127.0.0.1", "127.255.255.254"]
NOT_PUBLIC += ["169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.8", "192.0.0.170"]
NOT_PUBLIC += ["192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.19.255.255", "198.51.100.1"]
NOT_PUBLIC += ["203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"]
NOT_PUBLIC += ["::", "::1", "0:0:0:0:0:0:0:1", "::ffff:127.0.0.1", "::ffff:7f00:1", "::FFFF:10.0.0.1"]
NOT_PUBLIC += ["::ffff:0.0.0.0", "::127.0.0.1", "::7f00:1", "::8.8.8.8", "::ffff:0:127.0.0.1", "64:ff9b::7f00:1"]
NOT_PUBLIC += ["64:ff9b::10.0.0.1", "64:ff9b:1::7f00:1", "64:ff9b:1::808:808", "100::1", "2001::1", "2001:4:112::1"]
NOT_PUBLIC += ["2001:20::1", "2001:0:808:808::f5ff:fffe", "2001:db8::1", "2002:7f00:1::", "2002:808:808::1"]
NOT_PUBLIC += ["3fff::1", "4000::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "febf::1", "fec0::1"]
NOT_PUBLIC += ["ff02::1", "ff0e::1"]


@pytest.mark.parametrize("ip", NOT_PUBLIC)
@pytest.mark.parametrize("answer", ["{}", "{} 93.184.216.34", "93.184.216.34 2606:2800:220:1::1 {}"])
def test_addresses_that_are_not_public(network, ip, answer):
    """As a literal, and as any of the addresses of a name; the message does not contain the name's addresses."""
    reason = "has an address that is not public"
    assert_refused(f"http://[{ip}]/" if ":" in ip else f"http://{ip}/", network, "*", reason=reason)
    network.names["images.test"] = [answer.format(ip).split()]
    for host in ("*", "images.test", "*.test"):
        message = assert_refused("http://images.test/", network, host, reason=reason)
        assert message == "image: the URL is refused: the host 'images.test' has an address that is not public"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST", "LocalHost"])
def test_the_wildcard_does_not_cover_localhost(network, host):
    assert_refused(f"http://{host}/", network, "*", reason="'localhost' has an address that is not public")


@pytest.mark.parametrize("ip", [PUBLIC, "8.8.8.8", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(network, server, ip):
    """Also those of a name server that translates IPv4 for a network with IPv6 only (RFC 6147)."""
    address = str(ipaddress.ip_address(ip))
    network.routes = {address: server, ip: server}
    network.names["images.test"] = [[ip]]
    for url in ("http://images.test/image", f"http://[{ip}]/" if ":" in ip else f"http://{ip}/"):
        assert fetch(url, "*") == CONTENT


def forms(ip):
    """Return many ways to write an IPv4 address, or to reach it through IPv6."""
    number, parts = int(ip), str(ip).split(".")
    low, lower = number & 0xFFFFFF, number & 0xFFFF
    embedded = [(0, 0), (0xFFFF, 0), (0xFFFF, 16), (0x64FF9B << 64, 0), (0x64FF9B0001 << 48, 0)]
    numbers = [(high << 32 << shift) + number for high, shift in embedded]
    numbers += [(0x2002 << 112) + (number << 80), (0x20010000 << 96) + (~number & 0xFFFFFFFF)]
    v6 = [ipaddress.IPv6Address(value) for value in numbers]
    hosts = [str(ip), str(number), hex(number), f"0{number:o}", f"{parts[0]}.{low}", f"{parts[0]}.{parts[1]}.{lower}"]
    hosts += [".".join(f"0{int(part):o}" for part in parts), ".".join(hex(int(part)) for part in parts), f"{ip}."]
    hosts += [text for address in v6 for text in (f"[{address}]", f"[{address.exploded}]", f"[{address}]".upper())]
    return hosts + [f"[{prefix}{ip}]" for prefix in ("::", "::ffff:", "::ffff:0:", "64:ff9b::", "64:ff9b:1::")]


@settings(LIMITS, max_examples=50)
@given(ip=st.ip_addresses(v=4).filter(lambda ip: not ip.is_global))
def test_no_form_of_an_ipv4_address_that_is_not_global(network, ip):
    for host in forms(ip):
        assert_refused(f"http://{host}/", network, "*")
        network.names["images.test"] = [[str(ip)]]
        assert_refused("http://images.test/", network, "*")


@LIMITS
@given(ip=st.ip_addresses(v=6).filter(lambda ip: not ip.is_global))
def test_no_form_of_an_ipv6_address_that_is_not_global(network, ip):
    for text in (str(ip), ip.exploded, str(ip).upper()):
        assert_refused(f"http://[{text}]/", network, "*")
        network.names["images.test"] = [[text]]
        assert_refused("http://images.test/", network, "*")


@pytest.mark.parametrize(
    ("hosts", "url", "allowed"),
    [
        ((), "http://images.test/", False),
        (("*",), "http://images.test/", True),
        (("images.test",), "http://images.test", True),
        (("images.test",), "http://IMAGES.Test/", True),
        (("IMAGES.test",), "http://images.test/", True),
        (("images.test",), "http://images.test:80/", True),
        (("images.test",), "http://images.test:443/", True),
        (("images.test",), "http://images.test:22/", False),
        (("images.test",), "http://images.test:8080/", False),
        (("images.test",), "http://images.test:0/", False),
        (("images.test",), "http://images.test:65616/", False),  # 80 modulo 65536
        (("images.test:8080",), "http://images.test:8080/", True),
        (("images.test:8080",), "http://images.test/", False),
        (("*:8080",), "http://images.test:8080/", True),
        (("*:8080",), "http://images.test/", False),
        (("images.test",), "http://more.images.test/", False),
        (("*.images.test",), "http://more.images.test/", True),
        (("*.images.test",), "http://even.more.images.test/", True),
        (("*.images.test",), "http://images.test/", False),
        (("*.images.test",), "http://evilimages.test/", False),
        (("*.images.test",), "http://evil-images.test/", False),
        (("*.images.test", "images.test"), "http://images.test.evil.test/", False),
        (("*.images.test", "images.test"), "http://evil.test/images.test/", False),
        (("xn--bcher-kva.test",), "http://xn--bcher-kva.test/", True),
        (("my_images.test",), "http://my_images.test/@user/a@2x.png?a=b:c#@d", True),
        (("2606:2800:220:1::1".join("[]"),), "http://[2606:2800:0220:0001:0::1]/", True),
        ((PUBLIC,), f"http://{PUBLIC}/", True),
        ((PUBLIC,), "http://images.test/", False),
    ],
)
def test_hosts_and_ports(network, hosts, url, allowed):
    host = urllib.parse.urlsplit(url).hostname
    network.names[host] = [[host if ":" in host else PUBLIC]]
    if allowed:
        with pytest.raises(OSError, match=r"the URL cannot be fetched: .*refused"):  # by the network
            fetch(url, *hosts)
        assert len(network.connections) == 1
    else:
        assert_refused(url, network, *hosts, reason="is not allowed")
        assert network.lookups == []


NO_HOSTS = ["", " ", "http://images.test", "images.test/a", "images.test.", ".test", "*images.test", "images.*", "**"]
NO_HOSTS += ["a b", "user@images.test", "b\xfccher.test", "::1", "[::1", "[::g]", "*.[::1]", "127.1", "2130706433"]
NO_HOSTS += ["127.0.0.1/8", "*.0.0.1", "images.test:", "images.test:0", "images.test:x", "images.test:080"]
NO_HOSTS += ["images.test:100000"]


@pytest.mark.parametrize("host", NO_HOSTS, ids=ascii)
def test_hosts_of_another_form(host):
    with pytest.raises(ValueError, match="expected "):
        UrlGuard("images.test", host)


def test_private_addresses_that_are_listed_are_trusted_with_their_port_only(network, server):
    url = f"http://127.0.0.1:{server}/image"
    assert fetch(url, f"127.0.0.1:{server}") == CONTENT
    assert fetch(url.replace("127.0.0.1", "LOCALHOST"), f"localhost:{server}") == CONTENT
    for hosts in [(), ("127.0.0.1",), (f"*:{server}",), (f"127.0.0.2:{server}",), (f"*:{server}", "127.0.0.1")]:
        assert_refused(url, network, *hosts)
    listed = f"127.0.0.1:{server}"
    assert_refused(url.replace("127.0.0.1", "[::ffff:127.0.0.1]"), network, listed, f"*:{server}")
    network.names = {"images.test": [["127.0.0.1"]], "localhost": [["10.0.0.1"]]}
    assert_refused(url.replace("127.0.0.1", "images.test"), network, listed, f"images.test:{server}")
    assert_refused(url.replace("127.0.0.1", "localhost"), network, f"localhost:{server}")


def test_a_name_is_looked_up_once_and_what_was_checked_is_connected_to(network, server):
    network.names["images.test"] = [["2606:2800:220:1::1", PUBLIC], ["127.0.0.1"]]
    network.routes[PUBLIC] = server
    assert fetch("http://images.test/image", "*") == CONTENT
    assert network.lookups == ["images.test"]
    assert network.connections == [("2606:2800:220:1::1", 80), (PUBLIC, 80), ("127.0.0.1", server)][:2]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("http://169.254.169.254/latest/meta-data/", "'169.254.169.254' has an address that is not public"),
        ("http://[::ffff:169.254.169.254]/", "not public"),
        ("//127.0.0.1/", "not public"),
        ("http://images.test/image", "not public"),  # which has got another address
        ("http://private.test/", "'private.test' has an address that is not public"),
        ("http://2852039166/", "expected a host name or an IP address in its usual form"),
        ("http://images.test@127.0.0.1/", "expected http"),
        ("http:\\\\127.0.0.1\\", "expected http"),
        ("http://images.test:8080/", "port 8080 is not allowed"),
        ("ftp://images.test/", "expected http"),
    ],
)
def test_redirects_pass_the_same_checks(network, server, target, reason):
    network.names = {"images.test": [[PUBLIC], ["127.0.0.1"]], "private.test": [["10.0.0.1"]]}
    network.routes[PUBLIC] = server
    with pytest.raises(RefusedUrlError, match=reason):
        fetch(f"http://images.test/to?{urllib.parse.quote(target)}", "*")
    assert network.connections == [(PUBLIC, 80)]


@pytest.mark.parametrize("target", ["file:///etc/passwd", "data:,x", "gopher://127.0.0.1/", "FILE:/etc/passwd"])
def test_redirects_to_other_schemes(network, server, target):
    with pytest.raises(
        (OSError, RefusedUrlError), match=r"image: the URL (cannot be fetched: .*not allowed|is refused)"
    ):
        fetch(f"http://127.0.0.1:{server}/to?{target}", f"127.0.0.1:{server}")


def test_redirects_to_hosts_that_are_not_listed(network, server):
    network.names["evil.test"] = [[PUBLIC]]
    with pytest.raises(RefusedUrlError, match=r"'evil\.test' with port 80 is not allowed"):
        fetch(f"http://127.0.0.1:{server}/to?http://evil.test/", f"127.0.0.1:{server}")
    assert network.lookups == ["127.0.0.1"]


def test_three_redirects_are_followed(network, server):
    url, host = f"http://127.0.0.1:{server}", f"127.0.0.1:{server}"
    assert fetch(f"{url}/chain3", host) == CONTENT
    with pytest.raises(RefusedUrlError, match="more than 3 redirects"):
        fetch(f"{url}/chain4", host)
    with pytest.raises(RefusedUrlError, match="more than 3 redirects"):
        fetch(f"{url}/to?/to", host)
    network.names["images.test"] = [[PUBLIC]]
    network.routes[PUBLIC] = server
    assert fetch(f"{url}/to?http://images.test/chain1", host, "images.test") == CONTENT


def test_limits_hold_under_the_guard(network, server):
    url, host = f"http://127.0.0.1:{server}", f"127.0.0.1:{server}"
    with pytest.raises(ValueError, match="expected at most 1000000 bytes, got"):
        fetch(f"{url}/endless", host, max_bytes=10**6)
    assert fetch(f"{url}/swollen", host, timeout=5) == CONTENT
    assert fetch(f"{url}/packed", host) == PACKED  # not unpacked, which has no limit
    start = time.monotonic()
    with pytest.raises(OSError, match="timed out"):
        fetch(f"{url}/silent", host, timeout=0.2)
    assert time.monotonic() - start < 0.9


def test_a_slow_name_server_does_not_outlast_the_deadline(network, server, monkeypatch):
    """And no connection is opened after it."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **o: time.sleep(0.5) or network.getaddrinfo(*a, **o))
    with pytest.raises(OSError, match=r"timed out after 0\.1 s"):
        fetch(f"http://127.0.0.1:{server}/image", f"127.0.0.1:{server}", timeout=0.1)
    time.sleep(0.6)
    assert network.lookups == ["127.0.0.1"]
    assert network.connections == []


def test_proxies_of_the_environment_are_not_used(network, server, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://10.0.0.1:3128")
        monkeypatch.setenv(name.upper(), "http://10.0.0.1:3128")
    network.names["images.test"] = [[PUBLIC]]
    network.routes[PUBLIC] = server
    assert fetch("http://images.test/image", "*") == CONTENT
    assert network.connections == [(PUBLIC, 80)]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A certificate for images.test, with its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl, which makes a certificate, is not installed")
    path = tmp_path_factory.mktemp("tls") / "images.test.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=images.test", "-days", "2"]
    command += ["-addext", "subjectAltName=DNS:images.test", "-keyout", path, "-out", path.with_suffix(".crt")]
    subprocess.run(command, check=True, capture_output=True)
    path.write_text(path.read_text() + path.with_suffix(".crt").read_text())
    return path


@pytest.fixture(scope="module")
def tls(certificate):
    """A web server with TLS: its port, and the host names that clients asked for."""
    context, names = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), []
    context.load_cert_chain(certificate)
    context.sni_callback = lambda _, name, __: names.append(name)
    for port in serve(lambda sock: context.wrap_socket(sock, server_side=True)):
        yield port, names


def test_tls_checks_the_host_name(network, tls, certificate, monkeypatch):
    port, asked = tls
    network.names = {"images.test": [[PUBLIC]], "other.test": [[PUBLIC]]}
    network.routes[PUBLIC] = port
    with pytest.raises(OSError, match="certificate verify failed"):
        fetch("https://images.test/image", "*")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert fetch("https://images.test/image", "*") == CONTENT
    assert asked[-1] == "images.test"
    with pytest.raises(OSError, match=r"certificate is not valid for 'other\.test'"):
        fetch("https://other.test/image", "*")
    assert fetch("https://images.test/to?/image", "*") == CONTENT
    with pytest.raises(RefusedUrlError, match="a redirect leads from https to http"):
        fetch("https://images.test/to?http://images.test/image", "*")
    assert {port for _, port in network.connections} == {443}


def test_guards_are_copied_with_their_limits_and_refuse_as_errors_of_images(network):
    limits = Limits(guard=UrlGuard("images.test"))
    for same in (copy.deepcopy(limits), pickle.loads(pickle.dumps(limits))):
        with pytest.raises(IMAGE_ERRORS, match=r"^http://evil\.test/a\.png: the URL is refused: "):
            resolve_source("http://evil.test/a.png", "image", same)
    with pytest.raises(TypeError, match="hosts: expected strings, got tuple"):
        UrlGuard(("images.test",))
