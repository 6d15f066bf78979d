"""A headless Chromium that is driven over a pipe, by the DevTools protocol, and a server of one folder."""

import base64
import contextlib
import functools
import json
import os
import select
import shutil
import subprocess
import tempfile
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = [
    "--headless=new",
    "--no-sandbox",  # which root may not, and in a container often nobody
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-gpu",
    "--hide-scrollbars",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no server but our own
    "--remote-debugging-pipe",
]


def find_chromium() -> str | None:
    """The program: that of the environment variable CHROMIUM, or one on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def find_onnxruntime_web() -> Path | None:
    """The npm package: that of the environment variable ONNXRUNTIME_WEB, or one that npm has installed globally."""
    if os.environ.get("ONNXRUNTIME_WEB"):
        return Path(os.environ["ONNXRUNTIME_WEB"])
    places = [Path("node_modules")]
    if shutil.which("npm"):
        done = subprocess.run(["npm", "root", "--global"], capture_output=True, text=True, timeout=60)
        places.append(Path(done.stdout.strip() or "node_modules"))
    found = [place / "onnxruntime-web" for place in places]
    return next((path for path in found if (path / "package.json").is_file()), None)


@contextlib.contextmanager
def serve(folder: Path, headers: dict[str, str] | None = None):
    """Serve a folder on this machine; gives the address and the list of paths that were asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def end_headers(self):
            for name, value in ({"Cache-Control": "no-store"} | (headers or {})).items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


class Chromium:
    """`with Chromium(program) as browser:` opens one page; `browser.log` has what its console said."""

    def __init__(self, program: str):
        self.program, self.calls, self.buffer = program, 0, b""
        self.log: list[str] = []
        self.session = None

    def __enter__(self) -> "Chromium":
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (to_read, self.to_browser), (self.from_browser, to_write) = os.pipe(), os.pipe()
        # the protocol is spoken on descriptors 3 and 4; a shell can redirect these
        script = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        command = ["bash", "-c", script, self.program, *OPTIONS, f"--user-data-dir={self.profile.name}", "about:blank"]
        self.process = subprocess.Popen(
            command, pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(to_read)
        os.close(to_write)
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        self.session = self.send("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(self, *exception):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired, RuntimeError):
            self.session = None
            self.send("Browser.close", wait=10)
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        os.close(self.to_browser)
        os.close(self.from_browser)
        self.profile.cleanup()

    def send(self, method: str, wait: float = 60, **parameters) -> dict:
        """Call a method of the protocol and return its result."""
        self.calls += 1
        message = {"id": self.calls, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.to_browser, data) :]
        end = time.monotonic() + wait
        while True:
            answer = self.receive(end - time.monotonic())
            if answer.get("id") == message["id"]:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.note(answer)

    def receive(self, wait: float) -> dict:
        """Return the next message."""
        while b"\0" not in self.buffer:
            if not select.select([self.from_browser], [], [], max(0, wait))[0]:
                raise RuntimeError(f"Chromium said nothing in time; its console before: {self.log}")
            piece = os.read(self.from_browser, 1 << 20)
            if not piece:
                raise RuntimeError(f"Chromium ended; its console before: {self.log}")
            self.buffer += piece
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def note(self, event: dict) -> None:
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.log.append(json.dumps(parameters["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded":
            self.log.append(parameters["entry"]["text"] + " " + parameters["entry"].get("url", ""))
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.log.append(" ".join(str(value.get("value", value)) for value in parameters["args"]))

    def open(self, url: str, width: int = 1280, height: int = 900, dark: bool = False, scale: float = 1) -> None:
        """Show a page in a window of some size, in the light or the dark scheme; phones have a touch screen."""
        phone = width < 600
        self.send("Page.navigate", url="about:blank")  # an address that differs after # would not load anew
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete'")

    def evaluate(self, expression: str, wait: float = 60):
        """Return the value of an expression in the page, awaited if it is a promise."""
        result = self.send(
            "Runtime.evaluate", wait, expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in result:
            details = result["exceptionDetails"]
            raise RuntimeError(f"{expression}: {details.get('exception', {}).get('description', details['text'])}")
        return result["result"].get("value")

    def wait_for(self, expression: str, wait: float = 60) -> None:
        """Wait until an expression is true in the page."""
        end = time.monotonic() + wait
        while not self.evaluate(expression):
            if time.monotonic() > end:
                shown = self.evaluate("document.body?.innerText")
                raise AssertionError(f"{expression} did not become true; console: {self.log}; page: {shown}")
            time.sleep(0.05)

    def press(self, key: str, times: int = 1) -> None:
        """Press a key, such as "ArrowRight", "Tab", "Enter" or " "."""
        codes = {"Tab": 9, "Enter": 13, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
        text = {"Enter": "\r", " ": " "}.get(key)
        for _ in range(times):
            values = {"key": key, "windowsVirtualKeyCode": codes[key]} | ({"text": text} if text else {})
            self.send("Input.dispatchKeyEvent", type="keyDown", **values)
            self.send("Input.dispatchKeyEvent", type="keyUp", **values)

    def choose_file(self, selector: str, path: Path) -> None:
        """Give a file to an `<input type="file">`."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write a picture of the page, all of it or what the window shows."""
        data = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
