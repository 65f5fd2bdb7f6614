"""A camera with RTSP: a film as MPEG-TS in RTP, over the connection itself or by UDP."""

import re
import socket
import struct
import threading
import time

_PART = 7 * 188  # bytes of a packet: whole ones of MPEG-TS
_DESCRIPTION = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=film\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:video\r\n"


class Camera:
    """Serve one client: send MPEG-TS evenly over some seconds, then close the connection, or be silent.

    Attributes:
        url: where.
    """

    def __init__(self, content: bytes, *, seconds: float, transport: str, silent: bool):
        self._content, self._seconds, self._transport, self._silent = content, seconds, transport, silent
        self._server = socket.create_server(("127.0.0.1", 0))
        self._datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._datagrams.bind(("127.0.0.1", 0))
        self._closed = threading.Event()
        self.url = f"rtsp://127.0.0.1:{self._server.getsockname()[1]}/film"
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self):
        self._closed.set()
        self._thread.join()
        self._server.close()
        self._datagrams.close()

    def _run(self):
        connection, _ = self._server.accept()
        with connection, connection.makefile("rb") as requests:
            playing = False
            while not playing:
                first, *lines = iter(lambda: requests.readline().decode().strip(), "")
                method, headers = first.split()[0], dict(line.split(": ", 1) for line in lines)
                connection.sendall(self._answer(method, headers).encode())
                playing = method == "PLAY"
            self._send(connection)
            if self._silent:
                self._closed.wait(30)

    def _answer(self, method: str, headers: dict[str, str]) -> str:
        status, body, mine = "200 OK", "", {"CSeq": headers["CSeq"], "Session": "1"}
        if method == "OPTIONS":
            mine["Public"] = "DESCRIBE, SETUP, PLAY"
        elif method == "DESCRIBE":
            body = _DESCRIPTION
            mine |= {"Content-Type": "application/sdp", "Content-Length": str(len(body))}
        elif method == "SETUP":
            asked = headers["Transport"]
            ports = re.search("client_port=([0-9]+)-", asked)
            if (self._transport == "udp") != (ports is not None):
                status = "461 Unsupported transport"
            elif ports is None:
                mine["Transport"] = "RTP/AVP/TCP;unicast;interleaved=0-1"
            else:
                self._datagrams.connect(("127.0.0.1", int(ports[1])))
                port = self._datagrams.getsockname()[1]
                mine["Transport"] = f"{asked};server_port={port}-{port + 1}"
        return f"RTSP/1.0 {status}\r\n" + "".join(f"{name}: {mine[name]}\r\n" for name in mine) + f"\r\n{body}"

    def _send(self, connection: socket.socket) -> None:
        parts = [self._content[begin : begin + _PART] for begin in range(0, len(self._content), _PART)]
        for number, part in enumerate(parts):
            at = number / len(parts) * self._seconds
            packet = struct.pack(">BBHII", 0x80, 33, number, int(at * 90_000), 1) + part
            if self._transport == "udp":
                self._datagrams.send(packet)
            else:
                connection.sendall(struct.pack(">cBH", b"$", 0, len(packet)) + packet)
            time.sleep(self._seconds / len(parts))
