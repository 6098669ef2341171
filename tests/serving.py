"""A local server in the place of the hub."""

import http.server
import threading
from contextlib import contextmanager


@contextmanager
def serving(answer):
    """A server whose handler answers every request; gives the requests and the port."""
    asked = []

    def handle(request):
        asked.append(request.path)
        answer(request)

    methods = dict.fromkeys(("do_HEAD", "do_GET", "do_POST"), handle) | {"log_message": lambda *_: None}
    handler = type("Hub", (http.server.BaseHTTPRequestHandler,), methods)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield asked, hub.server_port
        hub.shutdown()
