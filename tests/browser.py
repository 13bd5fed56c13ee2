"""A headless Chromium for tests, driven by the DevTools protocol over a pipe: it needs no package and no port.

`with Browser() as b: b.open(path_or_url); b.js("document.title"); b.click("#go"); b.wait("done === true")`.
`b.errors` holds what the browser has complained about since `open`: exceptions, errors and warnings of the console,
and files that did not load. `Browser(network=False)` refuses all but local files and complains about each request.
`missing()` is the reason to skip where there is no browser. No wait is longer than `SECONDS`.
"""
import base64, json, os, select, shutil, signal, subprocess, tempfile, time
from pathlib import Path

# a machine that is busy needs a few seconds to start a browser
SECONDS = 60
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions",
         "--disable-background-networking", "--disable-component-update", "--disable-breakpad", "--no-first-run",
         "--hide-scrollbars", "--force-color-profile=srgb", "--remote-debugging-pipe")
# The browser reads commands from descriptor 3 and replies on 4. It ends when the other end of its pipe is closed, even
# if this process is killed, and then the shell removes the profile.
SHELL = '"$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1; rm -rf "$0"'
# every request goes to a port where nothing listens, also those of frames and workers
OFFLINE = ("--proxy-server=http://127.0.0.1:9", "--proxy-bypass-list=<-loopback>")
KEYS = {"Backspace": 8, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


def program():
    "The browser that `CHROMIUM` names, or the first that is on the path."
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def missing():
    "Why no browser can be driven here; None if one can."
    if not program(): return "no Chromium on this machine: `apt install chromium`, or set CHROMIUM to its path"


class Browser:
    "One page of a headless Chromium."
    def __init__(self, width=1280, height=900, dark=False, network=True):
        self.size, self.dark, self.network = (width, height), dark, network
        self.errors, self.frames = [], []
        self.last, self.loads, self.unread, self.session = 0, 0, b"", None

    def __enter__(self):
        self.folder = tempfile.mkdtemp(prefix="chromium")
        flags = [*FLAGS, *(() if self.network else OFFLINE), f"--user-data-dir={self.folder}"]
        command = ["sh", "-c", SHELL, self.folder, program(), *flags, "about:blank"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
                                        start_new_session=True)
        try:
            os.set_blocking(self.process.stdin.fileno(), False)
            self.connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        # the shell, the browser and its children are one group
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        # a child that has not quite ended may still write
        end = time.monotonic() + SECONDS
        while os.path.exists(self.folder):
            shutil.rmtree(self.folder, ignore_errors=time.monotonic() < end)

    def connect(self):
        "Make a page and ask for its events."
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.listen(self.session)
        self.look()

    def listen(self, session):
        "Ask for the events of a page or frame, and for those of frames in it that get a process of their own."
        frames = {"autoAttach": True, "waitForDebuggerOnStart": True, "flatten": True}
        for domain in ("Page", "Runtime", "Log", "Network"): self.post(f"{domain}.enable", {}, session)
        self.post("Target.setAutoAttach", frames, session)
        self.post("Runtime.runIfWaitingForDebugger", {}, session)

    def until(self, end, doing, read=(), write=()):
        "Wait until the pipe can be read or written; `doing` is named if that is too late."
        if not any(select.select(read, write, [], max(0, end - time.monotonic()))):
            raise TimeoutError(f"{doing}: not done after {SECONDS} s")

    def receive(self, end, doing):
        "The next message; messages end with a zero byte."
        while b"\0" not in self.unread:
            self.until(end, doing, read=[self.process.stdout])
            if not (more := os.read(self.process.stdout.fileno(), 1 << 20)):
                raise RuntimeError(f"{doing}: Chromium has ended")
            self.unread += more
        text, _, self.unread = self.unread.partition(b"\0")
        return json.loads(text)

    def post(self, method, params, session):
        "Call a method of the protocol; the number of the call, when the result is too late, and how errors name it."
        self.last += 1
        message = {"id": self.last, "method": method, "params": params}
        if session: message["sessionId"] = session
        end, doing, left = time.monotonic() + SECONDS, f"{method} {params}"[:200], json.dumps(message).encode() + b"\0"
        while left:
            self.until(end, doing, write=[self.process.stdin])
            try: left = left[os.write(self.process.stdin.fileno(), left):]
            except BrokenPipeError: raise RuntimeError(f"{doing}: Chromium has ended") from None
        return message["id"], end, doing

    def send(self, method, session=None, **params):
        "Call a method of the page (or of a frame) and return its result; events that arrive meanwhile go to `hear`."
        mine, end, doing = self.post(method, params, session or self.session)
        while (message := self.receive(end, doing)).get("id") != mine: self.hear(message)
        if "error" in message: raise RuntimeError(f"{doing}: {message['error']['message']}")
        return message["result"]

    def hear(self, message):
        "Count pages that have loaded; keep exceptions, complaints of the console, and requests that are not allowed."
        kind, params = message.get("method"), message.get("params", {})
        self.loads += kind == "Page.loadEventFired" and message["sessionId"] == self.session
        if kind == "Target.attachedToTarget" and self.session:
            self.frames.append(params["sessionId"])
            self.listen(params["sessionId"])
        if kind == "Target.detachedFromTarget": self.frames = [f for f in self.frames if f != params["sessionId"]]
        if kind == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}".strip())
        elif kind == "Network.requestWillBeSent" and not self.network and params["request"]["url"].startswith("http"):
            self.errors.append(f"asks the network for {params['request']['url']}")

    def look(self, width=None, height=None, dark=None):
        "Change the size of the window, or light and dark; a narrow window is that of a phone."
        self.size = (width or self.size[0], height or self.size[1])
        self.dark = self.dark if dark is None else dark
        self.send("Emulation.setDeviceMetricsOverride", width=self.size[0], height=self.size[1], deviceScaleFactor=1,
                  mobile=self.size[0] < 500)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self.dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page, fragment=""):
        "Open a file or an address and wait until it has loaded; forgets earlier errors."
        url = page if "://" in str(page) else Path(page).resolve().as_uri() + fragment
        # an address that differs in its fragment only would not be loaded again
        for to in ("about:blank", url):
            self.errors.clear()
            self.loads, end = 0, time.monotonic() + SECONDS
            done = self.send("Page.navigate", url=to)
            if done.get("errorText"): raise RuntimeError(f"{to}: {done['errorText']}")
            while not self.loads: self.hear(self.receive(end, f"open {to}"))
        # what a frame has complained about comes before its result
        for frame in self.frames: self.send("Runtime.evaluate", frame, expression="0")

    def js(self, expression):
        "The value of a JavaScript expression (or of the promise that it gives), as Python has it."
        done = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True,
                         timeout=SECONDS * 900)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"].get("exception", {}).get("description", expression))
        return done["result"].get("value")

    def wait(self, expression):
        "Wait until the page has loaded and a JavaScript expression is true; return its value."
        end = time.monotonic() + SECONDS
        while not (value := self.js(f"document.readyState === 'complete' && ({expression})")):
            if time.monotonic() > end: raise TimeoutError(f"never true in {SECONDS} s: {expression}")
            time.sleep(.05)
        return value

    def click(self, selector):
        "Click the middle of the first element that a CSS selector finds, as a mouse would."
        where = self.js(f"""(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;
            e.scrollIntoView({{block: "center"}}); const r = e.getBoundingClientRect();
            return [r.x + r.width / 2, r.y + r.height / 2]; }})()""")
        if where is None: raise LookupError(f"nothing on the page is {selector}")
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=where[0], y=where[1], button="left", clickCount=1)

    def type(self, text):
        "Type into what has the focus."
        self.send("Input.insertText", text=text)

    def press(self, key):
        "Press and release a key: a character, or a name of `KEYS`."
        text = {"text": "\r"} if key == "Enter" else {"text": key} if len(key) == 1 else {}
        code = {"code": key, "windowsVirtualKeyCode": KEYS[key]} if len(key) > 1 else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **code, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", key=key, **code)

    def screenshot(self, path, whole=False):
        "Save what the window shows (or the whole page) as PNG."
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(shot["data"]))
