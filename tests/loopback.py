"""HTTP servers on 127.0.0.1 for tests."""

import http.server
import socket
import sys
import threading


class Server(http.server.ThreadingHTTPServer):
    """A server on a free port, or the given one, in a thread of its own.

    Closing it ends its connections, too. A client that keeps one would otherwise go on talking to the closed server
    when the system has given the port to another one.
    """

    def __init__(self, handler, port=0):
        super().__init__(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.connections = set()

    def start(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:  # it has ended by itself
                pass

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        """Says nothing of connections that ended: it is done on purpose."""
        if not isinstance(sys.exception(), (OSError, ValueError)):
            super().handle_error(request, client_address)
