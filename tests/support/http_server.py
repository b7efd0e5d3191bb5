"""HTTP servers on 127.0.0.1 that serve one archive or a folder, for the tests of downloads."""

import hashlib
import http.server
import io
import re
import tarfile
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from awnet.data import downloads


class Server:
    """A server on 127.0.0.1 that knows Range, breaks off when told to, and notes what it was asked."""

    def __init__(self):
        self.content = b""
        self.ranges = True
        self.length = True
        self.break_off_after = None
        self.asked = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                outer.asked.append(asked)
                body, start = outer.content, 0
                if outer.ranges and asked:
                    start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
                    if start >= len(body):
                        self.send_response(416)
                        self.end_headers()
                        return
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                else:
                    self.send_response(200)
                if outer.length:
                    self.send_header("Content-Length", str(len(body) - start))
                self.end_headers()
                stop = len(body) if outer.break_off_after is None else start + outer.break_off_after
                self.wfile.write(body[start:stop])

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def serve(self, monkeypatch, name, content, checksum=None):
        """Makes ``content`` the archive of data set ``name``."""
        self.content = content
        archive = downloads.ARCHIVES[name]
        url = f"http://127.0.0.1:{self.http.server_port}/{archive.url.rsplit('/', 1)[1]}"
        checksum = checksum or f"md5:{hashlib.md5(content).hexdigest()}"
        monkeypatch.setitem(downloads.ARCHIVES, name, replace(archive, url=url, checksum=checksum))

    def close(self):
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()


def tar_of(folder):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        tar.add(folder, folder.name)
    return file.getvalue()


class _Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def serving(folder):
    """Serves the files of ``folder``; gives its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Silent, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
