"""A headless Chromium for tests, driven through the DevTools protocol: pages, clicks, screenshots, console errors.

`with Browser() as b: b.open(path_or_url); b.js("document.title"); b.click("#go"); b.wait("done === true")`.
`b.errors` holds what the console has reported since `open`: exceptions, errors, files that did not load.
`missing()` is the reason to skip where there is no browser. `Browser(network=False)` refuses all but local files.
"""
import base64, json, os, shutil, subprocess, tempfile, time, urllib.request
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions",
         "--disable-background-networking", "--no-first-run", "--hide-scrollbars", "--remote-debugging-port=0",
         "--remote-allow-origins=*", "--force-color-profile=srgb")


def program():
    "The browser that `CHROMIUM` names, or the first that is on the path."
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def missing():
    "Why no browser can be driven here; None if one can."
    if not program(): return "no Chromium on this machine: install it, or set CHROMIUM to its path"
    try: import websocket  # noqa: F401
    except ImportError: return "the package websocket-client is not installed"
    return None


class Browser:
    "One page of a headless Chromium."
    def __init__(self, width=1280, height=900, dark=False, network=True):
        self.size, self.dark, self.network = (width, height), dark, network
        self.errors, self.last = [], 0

    def __enter__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="chromium"))
        # the browser writes its port into a file, so that two tests never ask for the same one
        self.process = subprocess.Popen([program(), *FLAGS, f"--user-data-dir={self.folder}", "about:blank"],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try: self.connect()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def connect(self, seconds=300):
        "Connect to the first page and ask for the events of its console."
        import websocket
        port = self.folder / "DevToolsActivePort"
        end = time.monotonic() + seconds
        while not (port.exists() and port.read_text().count("\n")):
            if self.process.poll() is not None or time.monotonic() > end: raise RuntimeError("Chromium did not start")
            time.sleep(.1)
        with urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json") as answer:
            page = next(p for p in json.load(answer) if p["type"] == "page")
        self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=seconds, max_size=None)
        for domain in ("Page", "Runtime", "Log", "Network"): self.send(f"{domain}.enable")
        if not self.network: self.send("Network.setBlockedURLs", urls=["http://*", "https://*"])
        self.look()

    def send(self, method, **params):
        "Call a method of the protocol and return its result; events that arrive meanwhile go to `hear`."
        self.last += 1
        mine = self.last
        self.socket.send(json.dumps({"id": mine, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == mine: break
            self.hear(message)
        if "error" in message: raise RuntimeError(f"{method}: {message['error']['message']}")
        return message["result"]

    def hear(self, message):
        "Keep exceptions, console errors, and files that did not load."
        kind, params = message.get("method"), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        elif kind == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif kind == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}".strip())

    def look(self, width=None, height=None, dark=None):
        "Change the size of the window, or light and dark."
        self.size = (width or self.size[0], height or self.size[1])
        self.dark = self.dark if dark is None else dark
        self.send("Emulation.setDeviceMetricsOverride", width=self.size[0], height=self.size[1], deviceScaleFactor=1,
                  mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if self.dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page, seconds=300):
        "Open a file or an address and wait until it has loaded; forgets earlier errors."
        self.errors.clear()
        url = page if "://" in str(page) else Path(page).resolve().as_uri()
        # a page that only scrolls would not load again
        self.send("Page.navigate", url="about:blank")
        done = self.send("Page.navigate", url=url)
        if done.get("errorText"): raise RuntimeError(f"{url}: {done['errorText']}")
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'", seconds)

    def js(self, expression):
        "The value of a JavaScript expression (or of the promise that it gives), as Python has it."
        done = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"].get("exception", {}).get("description", expression))
        return done["result"].get("value")

    def wait(self, expression, seconds=120):
        "Wait until a JavaScript expression is true and return its value."
        end = time.monotonic() + seconds
        while not (value := self.js(expression)):
            if time.monotonic() > end: raise TimeoutError(f"never true in {seconds} s: {expression}")
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

    def key(self, name, code):
        "Press and release one key, such as `key('Enter', 13)`."
        text = {"text": "\r"} if name == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=name, code=name, windowsVirtualKeyCode=code, **text)

    def screenshot(self, path, whole=False):
        "Save what the window shows (or the whole page) as PNG."
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        Path(path).write_bytes(base64.b64decode(shot["data"]))
