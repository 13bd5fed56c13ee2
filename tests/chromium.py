"""A headless Chromium for tests of pages: it speaks the DevTools protocol over a pipe, so it needs no package."""
import base64, json, os, select, shutil, subprocess, tempfile
from pathlib import Path

FOUND = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WHY_NOT = "no Chromium on this machine (Debian: apt install chromium)"
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
          "--no-first-run", "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe")


# seconds to wait for an answer, on a machine that may be busy
_PATIENCE = 60


class Browser:
    "A browser with one page. `errors` holds what the console and the page complained about."

    def __init__(self):
        self.home, self.errors = tempfile.TemporaryDirectory(ignore_cleanup_errors=True), []
        self._count = self.loads = 0
        (theirs_in, self._out), (self._in, theirs_out) = os.pipe(), os.pipe()

        def as_three_and_four():
            # the browser reads commands from descriptor 3 and answers on 4
            a, b = os.dup(theirs_in), os.dup(theirs_out)
            os.dup2(a, 3)
            os.dup2(b, 4)

        line = [FOUND, *_FLAGS, f"--user-data-dir={self.home.name}", "about:blank"]
        self.process = subprocess.Popen(line, preexec_fn=as_three_and_four, close_fds=False, start_new_session=True,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in)
        os.close(theirs_out)
        self._left, self.session = b"", None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"): self.send(f"{domain}.enable")

    def _next(self):
        "Read one message; messages end with a zero byte."
        while b"\0" not in self._left:
            if not select.select([self._in], [], [], _PATIENCE)[0]: raise TimeoutError(f"no answer in {_PATIENCE} s")
            got = os.read(self._in, 1 << 20)
            if not got: raise RuntimeError("the browser has gone")
            self._left += got
        text, _, self._left = self._left.partition(b"\0")
        return json.loads(text)

    def _note(self, event):
        "Keep what went wrong, and each request that leaves the machine."
        method, p = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown": self.errors.append(p["exceptionDetails"])
        if method == "Runtime.consoleAPICalled" and p["type"] in ("error", "warning"): self.errors.append(p["args"])
        if method == "Log.entryAdded" and p["entry"]["level"] in ("error", "warning"): self.errors.append(p["entry"])
        if method == "Network.requestWillBeSent" and p["request"]["url"].startswith("http"):
            self.errors.append(p["request"]["url"])
        self.loads += method == "Page.loadEventFired"

    def send(self, method, **params):
        "Send a command and wait for its result."
        self._count += 1
        message = dict(id=self._count, method=method, params=params)
        if self.session: message["sessionId"] = self.session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            got = self._next()
            if got.get("id") == self._count:
                if "error" in got: raise RuntimeError(f"{method}: {got['error']}")
                return got["result"]
            self._note(got)

    def open(self, path, width=1280, height=900, dark=False, fragment=""):
        "Load a file and wait until it has loaded."
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 500)
        scheme = [dict(name="prefers-color-scheme", value="dark" if dark else "light")]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        # the address of a page that is open already would only move within it
        for url in ("about:blank", Path(path).absolute().as_uri() + fragment):
            self.loads = 0
            self.send("Page.navigate", url=url)
            while not self.loads: self._note(self._next())

    def js(self, code):
        "Evaluate JavaScript, wait for its promise, and return its value."
        got = self.send("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in got: raise RuntimeError(str(got["exceptionDetails"]["exception"].get("description")))
        return got["result"].get("value")

    def press(self, key):
        "Press a key, as a user does."
        text = dict(text=key) if len(key) == 1 else dict(text="\r") if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, **text,
                  windowsVirtualKeyCode={"Enter": 13}.get(key, 0))
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def picture(self, path):
        "Write a screenshot."
        Path(path).write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._in)
        os.close(self._out)
        self.home.cleanup()
