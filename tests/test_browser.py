"""The driver of the browser that other tests use: what it hears, and that it neither waits for ever nor stays."""
import os, signal, subprocess, sys, time
from pathlib import Path

import pytest

import browser

pytestmark = pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))
FRAME = "<script>console.error('inner'); throw Error('deep')</script><img src='http://192.0.2.1/b.png'>"
PAGE = f"""<!doctype html><script>console.warn('outer')</script><img src='http://192.0.2.1/a.png'><img src='none.png'>
<iframe sandbox='allow-scripts' srcdoc="{FRAME}"></iframe>"""


def remains(folder):
    "Is the profile there, or a process that uses it?"
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return os.path.exists(folder) or str(folder) in found


def test_errors_are_heard_and_waits_end(tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text(PAGE)
    with browser.Browser(network=False) as b:
        b.open(tmp_path / "page.html")
        heard = "\n".join(b.errors)
        for word in ("outer", "inner", "deep", "a.png", "b.png", "none.png"): assert word in heard
        with pytest.raises(RuntimeError, match="none.html: net::ERR_FILE_NOT_FOUND"): b.open(tmp_path / "none.html")
        with pytest.raises(LookupError, match="#none"): b.click("#none")
        with pytest.raises(RuntimeError, match="nothing is not defined"): b.js("nothing")
        monkeypatch.setattr(browser, "SECONDS", 1)
        with pytest.raises(TimeoutError, match="never true in 1 s: 1 > 2"): b.wait("1 > 2")
        with pytest.raises(TimeoutError, match="Promise.*not done after 1 s"): b.js("new Promise(() => 0)")
        monkeypatch.undo()
        assert b.js("1 + 1") == 2, "late results are not taken for later ones"
        assert remains(b.folder)
    assert not remains(b.folder)


def test_a_browser_ends_with_the_process_that_opened_it():
    code = "import browser, time\nwith browser.Browser() as b:\n    print(b.folder, flush=True)\n    time.sleep(600)"
    test = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
    folder = test.stdout.readline().strip()
    test.send_signal(signal.SIGKILL)
    test.communicate()
    end = time.monotonic() + browser.SECONDS
    while remains(folder) and time.monotonic() < end: time.sleep(.1)
    assert not remains(folder)


def test_a_browser_that_does_not_start_says_so_and_leaves_nothing(monkeypatch):
    monkeypatch.setenv("CHROMIUM", "false")
    b = browser.Browser()
    with pytest.raises(RuntimeError, match="Chromium has ended"): b.__enter__()
    assert not remains(b.folder)
