"""How Python's http.server reads streams of bytes. In and out as for node.js beside this file."""

import io
import json
import struct
import sys
from http.server import BaseHTTPRequestHandler


class Reader(BaseHTTPRequestHandler):
    """Reads requests from bytes, and has no socket."""

    protocol_version = "HTTP/1.1"

    def __init__(self, data):  # pylint: disable=super-init-not-called
        self.rfile = io.BytesIO(data)
        self.wfile = io.BytesIO()
        self.client_address = ("", 0)
        self.server = None
        self.close_connection = True
        self.requests = []
        self.refused = False

    def log_message(self, *_):
        """Says nothing."""

    def send_error(self, *_args, **_kwargs):
        """Notes that the request was refused."""
        self.refused = True

    def one(self):
        """Reads one request; whether there may be another."""
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            return False
        lengths = self.headers.get_all("content-length", [])
        body = self.rfile.read(int(lengths[0])) if lengths else b""
        self.requests.append(
            {
                "method": self.command,
                "target": self.path,
                "authorization": self.headers.get_all("authorization", []),
                "content_length": lengths,
                "transfer_encoding": self.headers.get_all("transfer-encoding", []),
                "body": len(body),
            }
        )
        return self.path != "/marker"


def main():
    """Reads streams until there are no more."""
    while True:
        prefix = sys.stdin.buffer.read(4)
        if len(prefix) < 4:
            return
        reader = Reader(sys.stdin.buffer.read(struct.unpack("<I", prefix)[0]))
        while reader.one():
            pass
        answer = {"requests": reader.requests, "refused": reader.refused}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


main()
