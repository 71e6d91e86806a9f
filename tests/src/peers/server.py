import hashlib
import http.server
import json
import socket
import sys
import urllib.parse


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Nagle's algorithm and delayed acknowledgements add 40 ms to each answer otherwise.
    disable_nagle_algorithm = True

    def chunks(self):
        while True:
            size = int(self.rfile.readline().split(b";")[0], 16)
            if size == 0:
                while self.rfile.readline().strip():
                    pass
                return
            yield self.rfile.read(size)
            self.rfile.readline()

    def counted(self):
        left = int(self.headers.get("Content-Length", "0"))
        while left:
            block = self.rfile.read(min(left, 1 << 16))
            if not block:
                raise ConnectionError("closed in the body")
            left -= len(block)
            yield block

    def answer(self):
        digest, length = hashlib.sha256(), 0
        chunked = self.headers.get("Transfer-Encoding", "").lower() == "chunked"
        for block in self.chunks() if chunked else self.counted():
            digest.update(block)
            length += len(block)
        url = urllib.parse.urlsplit(self.path)
        if url.path == "/sse":
            self.events(urllib.parse.parse_qs(url.query))
            return
        body = json.dumps(
            {"method": self.command, "path": self.path, "len": length, "sha256": digest.hexdigest()}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def events(self, query):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        data = b"x" * int(query.get("bytes", ["10"])[0])
        for number in range(int(query.get("events", ["1"])[0])):
            event = b"id: %d\ndata: %s\n\n" % (number, data)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
        self.wfile.write(b"0\r\n\r\n")

    do_GET = do_POST = do_DELETE = do_PUT = do_HEAD = do_OPTIONS = answer

    def log_message(self, *arguments):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 512
    address_family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET


server = Server((sys.argv[1], int(sys.argv[2])), Handler)
print(f"listening {sys.argv[1]}:{server.server_address[1]}")
server.serve_forever()
