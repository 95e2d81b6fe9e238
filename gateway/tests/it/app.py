"""An app that knows nothing of Dormouse: WebSocket echo at /chat, server-sent events at /events."""

import base64
import hashlib
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class App(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path == "/chat":
            self.chat()
        elif self.path == "/events":
            self.events()
        else:
            body = self.path.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def chat(self):
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accept)
        self.end_headers()
        self.wfile.flush()
        while True:
            first, second = self.rfile.read(2)
            length = second & 127
            if length == 126:
                length = int.from_bytes(self.rfile.read(2), "big")
            elif length == 127:
                length = int.from_bytes(self.rfile.read(8), "big")
            assert second & 128, "clients mask"
            mask = self.rfile.read(4)
            masked = self.rfile.read(length)
            data = bytes(byte ^ mask[place % 4] for place, byte in enumerate(masked))
            kind = first & 15
            self.frame({8: 8, 9: 10}.get(kind, kind), data)
            if kind == 8:
                self.close_connection = True
                return

    def frame(self, kind, data):
        head = bytes([128 | kind])
        if len(data) < 126:
            head += bytes([len(data)])
        elif len(data) < 65536:
            head += b"\x7e" + len(data).to_bytes(2, "big")
        else:
            head += b"\x7f" + len(data).to_bytes(8, "big")
        self.wfile.write(head + data)
        self.wfile.flush()

    def events(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        # One event for each line that the test sends: each must arrive before the next is made.
        for number, _ in enumerate(sys.stdin):
            event = f"id: {number}\ndata: tick\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), App)
print(server.server_address[1], flush=True)
server.serve_forever()
