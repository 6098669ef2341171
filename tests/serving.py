"""A local server in the place of the hub."""

import http.server
import threading
from contextlib import contextmanager


@contextmanager
def serving(answer):
    """A server whose handler answers every request; gives the requests and the port."""
    asked = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            answer(self)

        do_GET = do_POST = do_HEAD  # noqa: N815

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        yield asked, hub.server_port
        hub.shutdown()
