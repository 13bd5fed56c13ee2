"""Downloads over a bad line, and archives that mean harm."""
import hashlib, io, json, os, stat, tarfile, threading, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hapnb import files
from hapnb.files import download, file_hash, is_unpacked, unpack

DATA = os.urandom(300_000)
SHA, MD5 = hashlib.sha256(DATA).hexdigest(), hashlib.md5(DATA).hexdigest()


class Server:
    "A server on this machine whose faults are attributes; `asked` keeps the headers of all requests."
    def __init__(self):
        self.data, self.tag, self.asked = DATA, '"v1"', []
        self.hang_up, self.ranges, self.length, self.status, self.kind, self.wrong_start = None, True, True, None, "application/octet-stream", False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self): outer.answer(self)
            def log_message(self, *args): pass
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/set.bin"

    def answer(self, h):
        self.asked.append(dict(h.headers))
        if self.status: return h.send_error(self.status)
        start, asked = 0, h.headers.get("Range")
        if asked and self.ranges and h.headers.get("If-Range") in (None, self.tag): start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start and start >= len(self.data):
            h.send_response(416); h.send_header("Content-Range", f"bytes */{len(self.data)}"); h.send_header("Content-Length", "0"); h.end_headers()
            return
        body = self.data[start:]
        h.send_response(206 if start else 200)
        if start: h.send_header("Content-Range", f"bytes {start + self.wrong_start}-{len(self.data) - 1}/{len(self.data)}")
        if self.length: h.send_header("Content-Length", str(len(body)))
        if self.tag: h.send_header("ETag", self.tag)
        h.send_header("Content-Type", self.kind); h.end_headers()
        h.wfile.write(body[:self.hang_up])


@pytest.fixture
def server():
    s = Server()
    yield s
    s.http.shutdown(); s.http.server_close()


def ranges(server): return [a.get("Range") for a in server.asked]
def left(folder): return sorted(p.name for p in folder.iterdir())


def test_download(server, tmp_path):
    got = download(server.url, tmp_path / "new" / "set.bin", sha256=SHA, md5=MD5.upper(), progress=False)
    assert got.read_bytes() == DATA and left(tmp_path / "new") == ["set.bin"]
    download(server.url, got, sha256=SHA, progress=False)
    assert len(server.asked) == 1  # it was there
    assert server.asked[0]["Accept-Encoding"] == "identity"


def test_a_broken_line_is_continued(server, tmp_path):
    server.hang_up = 120_000
    assert download(server.url, tmp_path / "a", sha256=SHA, progress=False).read_bytes() == DATA
    assert ranges(server) == [None, "bytes=120000-", "bytes=240000-"] and server.asked[1]["If-Range"] == '"v1"'


def test_continued_by_the_next_call(server, tmp_path):
    server.hang_up = 120_000
    with pytest.raises(OSError, match=r"ended after 120,000 of 300,000 bytes. Tried 1 times; 120,000 bytes are kept, run it again"):
        download(server.url, tmp_path / "a", progress=False, tries=1)
    assert not (tmp_path / "a").exists()
    server.hang_up = None
    assert download(server.url, tmp_path / "a", md5=MD5, progress=False).read_bytes() == DATA
    assert ranges(server) == [None, "bytes=120000-"] and left(tmp_path) == ["a"]


@pytest.mark.parametrize("fault", ["changed", "no ranges", "no validator"])
def test_two_versions_are_never_mixed(server, tmp_path, fault):
    server.hang_up = 120_000
    if fault == "no validator": server.tag = None
    with pytest.raises(OSError): download(server.url, tmp_path / "a", progress=False, tries=1)
    server.hang_up = None
    if fault == "changed": server.data, server.tag = DATA[::-1], '"v2"'
    if fault == "no ranges": server.ranges = False
    assert download(server.url, tmp_path / "a", progress=False).read_bytes() == server.data
    assert ranges(server)[1] == (None if fault == "no validator" else "bytes=120000-")


def test_another_address_starts_again(server, tmp_path):
    server.hang_up = 120_000
    with pytest.raises(OSError): download(server.url, tmp_path / "a", progress=False, tries=1)
    server.hang_up = None
    download(server.url + "?other", tmp_path / "a", sha256=SHA, progress=False)
    assert ranges(server) == [None, None]


def test_nothing_is_left_to_fetch(server, tmp_path):
    (tmp_path / "a.part").write_bytes(DATA)
    (tmp_path / "a.part.json").write_text(json.dumps(dict(url=server.url, validator='"v1"')))
    assert download(server.url, tmp_path / "a", sha256=SHA, progress=False).read_bytes() == DATA
    assert ranges(server) == ["bytes=300000-"]


def test_a_partial_file_that_is_too_long(server, tmp_path):
    (tmp_path / "a.part").write_bytes(DATA + b"more")
    (tmp_path / "a.part.json").write_text(json.dumps(dict(url=server.url, validator='"v1"')))
    assert download(server.url, tmp_path / "a", sha256=SHA, progress=False).read_bytes() == DATA


def test_wrong_hash_leaves_nothing(server, tmp_path):
    with pytest.raises(OSError, match=rf"is not the file that was published: its sha256 is {SHA}, expected 0000"):
        download(server.url, tmp_path / "a", sha256="0" * 64, progress=False)
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.part").exists()
    (tmp_path / "b").write_bytes(b"something of mine")
    with pytest.raises(OSError, match="is there already, but it is not the file"): download(server.url, tmp_path / "b", md5=MD5, progress=False)
    assert (tmp_path / "b").read_bytes() == b"something of mine"  # never overwritten


def test_without_a_length(server, tmp_path):
    server.length = False
    assert download(server.url, tmp_path / "a", sha256=SHA, progress=False).read_bytes() == DATA


@pytest.mark.parametrize("status, says", [(404, "404.*may have moved"), (403, "403.*with a browser"), (500, "says 500")])
def test_the_server_says_no(server, tmp_path, status, says):
    server.status = status
    with pytest.raises(OSError, match=says): download(server.url, tmp_path / "a", progress=False)
    assert len(server.asked) == 1


def test_a_web_page_is_not_an_archive(server, tmp_path):
    server.kind, server.data = "text/html; charset=utf-8", b"<html>log in</html>"
    with pytest.raises(OSError, match="gave a web page, not set.zip"): download(server.url, tmp_path / "set.zip", progress=False)


def test_a_range_that_starts_elsewhere(server, tmp_path):
    server.hang_up, server.wrong_start = 120_000, True
    with pytest.raises(OSError, match="did not continue at byte 120000"): download(server.url, tmp_path / "a", progress=False)


def test_no_server_and_no_address(server, tmp_path):
    server.http.shutdown(); server.http.server_close()
    with pytest.raises(OSError, match="cannot reach .*Is there a network"): download(server.url, tmp_path / "a", progress=False, tries=1)
    with pytest.raises(ValueError, match="not a web address"): download("file:///etc/passwd", tmp_path / "a")
    with pytest.raises(ValueError, match="is a folder"): download(server.url, tmp_path)


def test_two_at_once(server, tmp_path):
    out, go = [], threading.Barrier(2)
    def get(): go.wait(); out.append(download(server.url, tmp_path / "a", sha256=SHA, progress=False))
    threads = [threading.Thread(target=get) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(out) == 2 and file_hash(out[0]) == SHA and len(server.asked) == 1


# ---- archives

GOOD = {"set/img/1.jpg": b"one", "set/img/2.jpg": b"two" * 1000, "set/list.txt": b"1 img/1.jpg\n"}


def tar(path, files, extra=(), mode="w:gz"):
    with tarfile.open(path, mode) as t:
        for name, data in files.items():
            info = tarfile.TarInfo(name); info.size = len(data); info.mode = 0o4777
            t.addfile(info, io.BytesIO(data))
        for name, kind, target in extra:
            info = tarfile.TarInfo(name); info.type, info.linkname = kind, target
            t.addfile(info)
    return path


def zipped(path, files, links=()):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in files.items(): z.writestr(zipfile.ZipInfo(name), data)
        for name, target in links:
            info = zipfile.ZipInfo(name); info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            z.writestr(info, target)
    return path


def made(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".unpacked")}


@pytest.mark.parametrize("name, mode", [("a.zip", None), ("a.tgz", "w:gz"), ("a.tar", "w"), ("a.tar.bz2", "w:bz2"), ("a.tar.xz", "w:xz"), ("no-ending", "w:gz")])
def test_unpack(tmp_path, name, mode):
    archive = zipped(tmp_path / name, GOOD) if mode is None else tar(tmp_path / name, GOOD, mode=mode)
    out = unpack(archive, tmp_path / "out", progress=False)
    assert made(out) == GOOD and out == tmp_path / "out"
    assert not (out / "set/img/1.jpg").stat().st_mode & 0o7000  # no setuid


BAD_NAMES = ["../x", "set/../../x", "/x", "C:\\x", "..\\x", "set\\..\\..\\x", "\\x", "c:x", ".."]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_name_that_escapes(tmp_path, name, kind):
    archive = (zipped if kind == "zip" else tar)(tmp_path / "a", {**GOOD, name: b"!"})
    with pytest.raises(ValueError, match="not safe to unpack, nothing was written"): unpack(archive, tmp_path / "in" / "out", progress=False)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock") == ["a"]


LINKS = [("l", tarfile.SYMTYPE, "/etc/passwd"), ("l", tarfile.SYMTYPE, "../x"), ("set/l", tarfile.SYMTYPE, "../../x"), ("l", tarfile.SYMTYPE, "set/../../x"), ("l", tarfile.LNKTYPE, "../x"),
         ("l", tarfile.LNKTYPE, "/etc/passwd"), ("l", tarfile.SYMTYPE, ""), ("null", tarfile.CHRTYPE, ""), ("disk", tarfile.BLKTYPE, ""), ("pipe", tarfile.FIFOTYPE, ""), ("l", tarfile.SYMTYPE, "C:\\x")]


@pytest.mark.parametrize("link", LINKS, ids=lambda l: f"{l[0]}-{l[1].decode()}-{l[2]}")
def test_links_and_devices(tmp_path, link):
    with pytest.raises(ValueError, match="not safe"): unpack(tar(tmp_path / "a.tgz", GOOD, [link]), tmp_path / "out", progress=False)
    assert not made(tmp_path / "out")


def test_links_in_concert(tmp_path):
    "Each looks harmless alone."
    for i, extra in enumerate([
            [("a", tarfile.SYMTYPE, "set/img"), ("b", tarfile.SYMTYPE, "a/../../..")],  # through another link
            [("a", tarfile.SYMTYPE, "set"), ("a/x", tarfile.SYMTYPE, "img/1.jpg")],     # below a link
            [("A", tarfile.SYMTYPE, "set"), ("a/x", tarfile.LNKTYPE, "set/list.txt")],  # the same on a disk without cases
            [("set/list.txt", tarfile.SYMTYPE, "img/1.jpg")],                           # a file and a link of one name
            [("s", tarfile.SYMTYPE, "set/list.txt"), ("h", tarfile.LNKTYPE, "s")],      # a hard link to a link
            [("set/list.txt/x", tarfile.SYMTYPE, "../img/1.jpg")]]):                    # below a file
        with pytest.raises(ValueError, match="not safe"): unpack(tar(tmp_path / f"{i}.tgz", GOOD, extra), tmp_path / "out", progress=False)
    assert not made(tmp_path / "out")


def test_good_links(tmp_path):
    out = unpack(tar(tmp_path / "a.tgz", GOOD, [("first.jpg", tarfile.SYMTYPE, "set/img/1.jpg"), ("set/up", tarfile.SYMTYPE, "../set/list.txt"), ("same.txt", tarfile.LNKTYPE, "set/list.txt")]), tmp_path / "out", progress=False)
    assert (out / "first.jpg").read_bytes() == b"one" and (out / "same.txt").read_bytes() == GOOD["set/list.txt"] == (out / "set/up").read_bytes()
    assert (out / "first.jpg").is_symlink()


@pytest.mark.parametrize("target, good", [("set/list.txt", True), ("../x", False), ("/etc/passwd", False)])
def test_links_in_a_zip(tmp_path, target, good):
    archive = zipped(tmp_path / "a.zip", GOOD, [("l", target)])
    if good: assert (unpack(archive, tmp_path / "out", progress=False) / "l").read_bytes() == GOOD["set/list.txt"]
    else:
        with pytest.raises(ValueError, match="not safe"): unpack(archive, tmp_path / "out", progress=False)


def test_a_link_on_disk_that_leads_out(tmp_path):
    (tmp_path / "out").mkdir(); (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "out" / "set")
    with pytest.raises(ValueError, match="is a link that leads out"): unpack(tar(tmp_path / "a.tgz", GOOD), tmp_path / "out", progress=False)
    assert not made(tmp_path / "elsewhere")


@pytest.mark.parametrize("kind", ["zip", "tgz", "tar"])
@pytest.mark.parametrize("cut", [10, 1000, -700])
def test_a_damaged_archive(tmp_path, kind, cut):
    files = {**GOOD, "set/big.bin": os.urandom(40_000)}
    archive = zipped(tmp_path / "a", files) if kind == "zip" else tar(tmp_path / "a", files, mode="w:gz" if kind == "tgz" else "w")
    data = archive.read_bytes()
    archive.write_bytes(data[:cut] if kind != "tar" else data[:max(cut, 0) or 20_000])
    with pytest.raises((OSError, ValueError), match="Fetch it again"): unpack(archive, tmp_path / "out", progress=False)
    assert not (tmp_path / "out/.unpacked-a.json").exists() or not json.loads((tmp_path / "out/.unpacked-a.json").read_text())["done"]


def test_a_flipped_byte(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"big.bin": os.urandom(40_000)})
    data = bytearray(archive.read_bytes()); data[20_000] ^= 255
    archive.write_bytes(data)
    with pytest.raises(OSError, match="damaged"): unpack(archive, tmp_path / "out", progress=False)
    assert not made(tmp_path / "out")


def test_not_an_archive(tmp_path):
    (tmp_path / "a.zip").write_text("<html>404</html>")
    with pytest.raises(ValueError, match="neither a zip nor a tar"): unpack(tmp_path / "a.zip", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no archive"): unpack(tmp_path / "b.zip", tmp_path / "out")


def test_an_encrypted_zip(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"x": b"1"})
    data = bytearray(archive.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)): data[data.index(mark) + at] |= 1
    archive.write_bytes(data)
    with pytest.raises(ValueError, match="encrypted"): unpack(archive, tmp_path / "out", progress=False)


def test_interrupted_and_continued(tmp_path, monkeypatch):
    archive, write, calls = tar(tmp_path / "a.tgz", GOOD), files._write, []
    def stop(source, to, size, what):
        if len(calls) == 2: raise KeyboardInterrupt
        calls.append(what); write(source, to, size, what)
    monkeypatch.setattr(files, "_write", stop)
    with pytest.raises(KeyboardInterrupt): unpack(archive, tmp_path / "out", progress=False)
    assert made(tmp_path / "out") == dict(list(GOOD.items())[:2])
    more = []
    monkeypatch.setattr(files, "_write", lambda *a: (more.append(a[3]), write(*a)))
    assert made(unpack(archive, tmp_path / "out", progress=False)) == GOOD and more == ["set/list.txt"]
    assert made(unpack(archive, tmp_path / "out", progress=False)) == GOOD and more == ["set/list.txt"]  # done: nothing is written


def test_another_archive_of_that_name_is_unpacked_anew(tmp_path):
    unpack(tar(tmp_path / "a.tgz", GOOD), tmp_path / "out", progress=False)
    unpack(tar(tmp_path / "a.tgz", {**GOOD, "set/list.txt": b"changed, and longer"}), tmp_path / "out", progress=False)
    assert (tmp_path / "out/set/list.txt").read_bytes() == b"changed, and longer"


def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda p: type("Usage", (), dict(free=100)))
    with pytest.raises(OSError, match="nothing was written"): unpack(tar(tmp_path / "a.tgz", GOOD), tmp_path / "out", progress=False)
    assert not made(tmp_path / "out")


def test_a_disk_that_has_room_for_the_rest_only(tmp_path, monkeypatch):
    "What an interrupted run wrote is not counted once more."
    archive, write = tar(tmp_path / "a.tgz", GOOD), files._write
    def stop(source, to, size, what):
        if what == "set/list.txt": raise KeyboardInterrupt
        write(source, to, size, what)
    monkeypatch.setattr(files, "_write", stop)
    with pytest.raises(KeyboardInterrupt): unpack(archive, tmp_path / "out", progress=False)
    monkeypatch.setattr(files, "_write", write)
    for free in (len(GOOD["set/list.txt"]) - 1, len(GOOD["set/list.txt"])):
        monkeypatch.setattr(files.shutil, "disk_usage", lambda p: type("Usage", (), dict(free=free)))
        if free < len(GOOD["set/list.txt"]):
            with pytest.raises(OSError, match="nothing was written"): unpack(archive, tmp_path / "out", progress=False)
    assert made(unpack(archive, tmp_path / "out", progress=False)) == GOOD


def test_files_that_were_lost_later(tmp_path):
    archive = tar(tmp_path / "a.tgz", GOOD)
    out = unpack(archive, tmp_path / "out", progress=False)
    (out / "set/img/1.jpg").unlink(); (out / "set/list.txt").write_bytes(b"cut")
    assert is_unpacked(archive, out) and made(unpack(archive, out, progress=False)) != GOOD  # finished is finished
    assert made(unpack(archive, out, progress=False, again=True)) == GOOD and is_unpacked(archive, out)
    tar(archive, {**GOOD, "set/more.txt": b"x" * 4000 + os.urandom(2000)})
    assert not is_unpacked(archive, out)  # another archive
    archive.unlink()
    assert is_unpacked(archive, out) and unpack(archive, out, progress=False) == out
    with pytest.raises(FileNotFoundError, match="no archive"): unpack(archive, out, progress=False, again=True)
    assert not is_unpacked(archive, tmp_path)


def test_two_unpack_at_once(tmp_path, monkeypatch):
    "The second waits, and finds it done."
    archive, write, written, go = tar(tmp_path / "a.tgz", GOOD), files._write, [], threading.Barrier(2)
    monkeypatch.setattr(files, "_write", lambda *a: (written.append(a[3]), write(*a)))
    def both(): go.wait(); unpack(archive, tmp_path / "out", progress=False)
    threads = [threading.Thread(target=both) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert made(tmp_path / "out") == GOOD and sorted(written) == sorted(GOOD)
