"""Downloads over a bad line, and archives that could do harm."""
import gzip, hashlib, io, json, os, stat, tarfile, threading, zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from hapnb import files
from hapnb.files import Limits, download, file_hash, is_unpacked, unpack
from hapnb.helpers import UserError

DATA = os.urandom(300_000)
SHA, MD5 = hashlib.sha256(DATA).hexdigest(), hashlib.md5(DATA).hexdigest()


class Server:
    "A server on this machine whose faults are attributes; `asked` keeps the headers of all requests."
    def __init__(self):
        self.data, self.tag, self.asked = DATA, '"v1"', []
        self.hang_up, self.ranges, self.length, self.status, self.wrong_start = None, True, True, None, False
        self.kind = "application/octet-stream"
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
        if asked and self.ranges and h.headers.get("If-Range") in (None, self.tag):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
        if start and start >= len(self.data):
            h.send_response(416)
            h.send_header("Content-Range", f"bytes */{len(self.data)}")
            h.send_header("Content-Length", "0")
            h.end_headers()
            return
        body = self.data[start:]
        h.send_response(206 if start else 200)
        size = len(self.data)
        if start: h.send_header("Content-Range", f"bytes {start + self.wrong_start}-{size - 1}/{size}")
        if self.length: h.send_header("Content-Length", str(len(body)))
        if self.tag: h.send_header("ETag", self.tag)
        h.send_header("Content-Type", self.kind)
        h.end_headers()
        h.wfile.write(body[:self.hang_up])


@pytest.fixture
def server():
    s = Server()
    yield s
    s.http.shutdown()
    s.http.server_close()


def ranges(server): return [a.get("Range") for a in server.asked]
def left(folder): return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


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
    says = r"ended after 120,000 of 300,000 bytes. Tried 1 times; 120,000 bytes are kept, run it again"
    with pytest.raises(OSError, match=says):
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


@pytest.mark.parametrize("note", ["", "[]", "[" * 100_000, '{"url": 3}', '{"url": "URL", "validator": 7}',
                                  '{"url": "URL", "validator": "a\\nb"}', "\xff"])
def test_a_damaged_note_of_a_download_counts_as_none(server, tmp_path, note):
    (tmp_path / "a.part").write_bytes(b"something else")
    (tmp_path / "a.part.json").write_bytes(note.replace("URL", server.url).encode("latin-1"))
    assert download(server.url, tmp_path / "a", sha256=SHA, progress=False).read_bytes() == DATA
    assert ranges(server) == [None]


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
    with pytest.raises(OSError, match="is there already, but it is not the file"):
        download(server.url, tmp_path / "b", md5=MD5, progress=False)
    # never overwritten
    assert (tmp_path / "b").read_bytes() == b"something of mine"


def test_without_a_length(server, tmp_path):
    server.length = False
    assert download(server.url, tmp_path / "a", sha256=SHA, progress=False).read_bytes() == DATA


@pytest.mark.parametrize("status, says", [(404, "404.*may have moved"), (500, "says 500")])
def test_the_server_says_no(server, tmp_path, status, says):
    server.status = status
    with pytest.raises(OSError, match=says): download(server.url, tmp_path / "a", progress=False)
    assert len(server.asked) == 1


def test_a_web_page_is_not_an_archive(server, tmp_path):
    server.kind, server.data = "text/html; charset=utf-8", b"<html>log in</html>"
    with pytest.raises(OSError, match="gave a web page, not set.zip"):
        download(server.url, tmp_path / "set.zip", progress=False)


def test_a_range_that_starts_elsewhere(server, tmp_path):
    server.hang_up, server.wrong_start = 120_000, True
    with pytest.raises(OSError, match="did not continue at byte 120000"):
        download(server.url, tmp_path / "a", progress=False)


def test_no_server_and_no_address(server, tmp_path):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(OSError, match="cannot reach .*Is there a network"):
        download(server.url, tmp_path / "a", progress=False, tries=1)
    with pytest.raises(ValueError, match="not a web address"): download("file:///etc/passwd", tmp_path / "a")
    with pytest.raises(ValueError, match="is a folder"): download(server.url, tmp_path)


def test_two_at_once(server, tmp_path):
    out, go = [], threading.Barrier(2)
    def get():
        go.wait()
        out.append(download(server.url, tmp_path / "a", sha256=SHA, progress=False))
    threads = [threading.Thread(target=get) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(out) == 2 and file_hash(out[0]) == SHA and len(server.asked) == 1


# ---- archives

GOOD = {"set/img/1.jpg": b"one", "set/img/2.jpg": b"two" * 1000, "set/list.txt": b"1 img/1.jpg\n"}


def tar(path, files, extra=(), mode="w:gz"):
    with tarfile.open(path, mode) as t:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o4777
            t.addfile(info, io.BytesIO(data))
        for name, kind, target in extra:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            t.addfile(info)
    return path


def zipped(path, files, links=()):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in files.items(): z.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
        for name, target in links:
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
            z.writestr(info, target)
    return path


def made(folder):
    files = [p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.mark.parametrize("name, mode", [("a.zip", None), ("a.tgz", "w:gz"), ("a.tar", "w"), ("a.tar.bz2", "w:bz2"),
                                        ("a.tar.xz", "w:xz"), ("no-ending", "w:gz")])
def test_unpack(tmp_path, name, mode):
    archive = zipped(tmp_path / name, GOOD) if mode is None else tar(tmp_path / name, GOOD, mode=mode)
    out = unpack(archive, tmp_path / "out", progress=False)
    assert made(out) == GOOD and out == tmp_path / "out"
    assert not (out / "set/img/1.jpg").stat().st_mode & 0o7000  # no setuid


SYM, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE
HOSTILE = {  # name of the fault: (more files, links and devices as (name, kind, target), words of the message)
    **{f"name {n[:20]}": ({n: b"!"}, [], "not safe")
       for n in ("../x", "set/../../x", "/x", "C:\\x", "..\\x", "set\\..\\..\\x", "\\x", "c:x", "..", "x" * 5000)},
    **{f"folders {n} deep": ({"d/" * n + "x": b"!"}, [], "folders deep") for n in (60, 1000)},
    "symlink to an absolute path": ({}, [("l", SYM, "/etc/passwd")], "not safe"),
    "symlink to a drive": ({}, [("l", SYM, "C:\\x")], "not safe"),
    "symlink out": ({}, [("l", SYM, "../x")], "outside the destination"),
    "symlink out of a folder": ({}, [("set/l", SYM, "../../x")], "outside the destination"),
    "symlink out by a detour": ({}, [("l", SYM, "set/../../x")], "outside the destination"),
    "symlink to nothing at all": ({}, [("l", SYM, "")], "without a target"),
    "symlink over a file": ({}, [("set/list.txt", SYM, "img/1.jpg")], "there twice"),
    "two links that lead out together": ({}, [("a", SYM, "set/img"), ("b", SYM, "a/../../..")], "not safe"),
    "two links, deeper than it looks": ({}, [("set/a", SYM, ".."), ("b", SYM, "set/a/../x")], "through another link"),
    "below a link": ({}, [("a", SYM, "set"), ("a/x", SYM, "img/1.jpg")], "below a file or a link"),
    "below a link in other letters": ({}, [("A", SYM, "set"), ("a/x", HARD, "set/list.txt")], "below a file or a link"),
    "below a file": ({}, [("set/list.txt/x", SYM, "../img/1.jpg")], "below a file or a link"),
    "hard link out": ({}, [("l", HARD, "../x")], "not safe"),
    "hard link to an absolute path": ({}, [("l", HARD, "/etc/passwd")], "not safe"),
    "hard link to nothing": ({}, [("l", HARD, "set/none")], "no earlier file"),
    "hard link to itself": ({}, [("l", HARD, "l")], "no earlier file"),
    "hard link to a later entry": ({}, [("l", HARD, "m"), ("m", HARD, "set/list.txt")], "no earlier file"),
    "hard link to a folder": ({}, [("d", tarfile.DIRTYPE, ""), ("l", HARD, "d")], "no earlier file"),
    "hard link to a link": ({}, [("s", SYM, "set/list.txt"), ("h", HARD, "s")], "no earlier file"),
    **{f"a device of type {k.decode()}": ({}, [("null", k, "")], "special file")
       for k in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)},
}


def refused(archive, out, says):
    "One clear message, and nothing is written."
    with pytest.raises(UserError, match=says) as e: unpack(archive, out, progress=False)
    assert "nothing was written" in str(e.value) and str(archive) in str(e.value) and len(str(e.value)) < 1000
    assert not made(out)


@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_tar_is_refused_before_anything_is_written(tmp_path, fault):
    more, extra, says = HOSTILE[fault]
    refused(tar(tmp_path / "a.tgz", {**GOOD, **more}, extra), tmp_path / "in" / "out", says)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock") == ["a.tgz"]


@pytest.mark.parametrize("fault", [f for f, (_, extra, _) in HOSTILE.items() if all(k == SYM for _, k, _ in extra)])
def test_a_hostile_zip_is_refused_before_anything_is_written(tmp_path, fault):
    more, extra, says = HOSTILE[fault]
    if fault == "symlink over a file": pytest.skip("zipfile itself drops the earlier of two entries of one name")
    refused(zipped(tmp_path / "a.zip", {**GOOD, **more}, [(n, t) for n, _, t in extra]), tmp_path / "in" / "out", says)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".lock") == ["a.zip"]


@pytest.mark.parametrize("limit", [dict(files=2), dict(size=100), dict(depth=1)], ids=lambda l: next(iter(l)))
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_over_a_limit_is_refused(tmp_path, limit, kind):
    archive = (zipped if kind == "zip" else tar)(tmp_path / "a", GOOD)
    with pytest.raises(UserError, match="nothing was written"):
        unpack(archive, tmp_path / "out", progress=False, limits=Limits(**limit))
    assert not made(tmp_path / "out") and made(unpack(archive, tmp_path / "out", progress=False)) == GOOD


@pytest.mark.parametrize("kind", ["zip", "tgz", "bz2"])
def test_a_bomb_is_refused_by_its_ratio(tmp_path, kind):
    big = {"zeros": bytes(120_000_000)}
    mode = f"w:{kind.replace('t', '')}"
    archive = zipped(tmp_path / "a", big) if kind == "zip" else tar(tmp_path / "a", big, mode=mode)
    refused(archive, tmp_path / "out", "would unpack to more than")


def test_bytes_without_end_after_the_last_entry_are_refused(tmp_path):
    archive = tar(tmp_path / "a.tgz", GOOD)
    archive.write_bytes(archive.read_bytes() + gzip.compress(bytes(250_000_000)))
    refused(archive, tmp_path / "out", "after its last entry")


@pytest.mark.parametrize("note", ["", "null", "[]", "[" * 100_000, '{"done": "yes"}', '{"done": 1}', "\xff\xfe"])
def test_a_damaged_note_of_an_earlier_unpacking_counts_as_none(tmp_path, note):
    archive = tar(tmp_path / "a.tgz", GOOD)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.unpacked-a.tgz.json").write_bytes(note.encode("latin-1"))
    assert not is_unpacked(archive, tmp_path / "out")
    assert made(unpack(archive, tmp_path / "out", progress=False)) == GOOD and is_unpacked(archive, tmp_path / "out")


def test_good_links(tmp_path):
    links = [("first.jpg", SYM, "set/img/1.jpg"), ("set/up", SYM, "../set/list.txt")]
    links += [("same.txt", HARD, "set/list.txt")]
    out, text = unpack(tar(tmp_path / "a.tgz", GOOD, links), tmp_path / "out", progress=False), GOOD["set/list.txt"]
    assert (out / "first.jpg").read_bytes() == b"one"
    assert (out / "same.txt").read_bytes() == text == (out / "set/up").read_bytes()
    assert (out / "first.jpg").is_symlink()


def test_a_good_link_in_a_zip(tmp_path):
    archive = zipped(tmp_path / "a.zip", GOOD, [("l", "set/list.txt")])
    assert (unpack(archive, tmp_path / "out", progress=False) / "l").read_bytes() == GOOD["set/list.txt"]


def test_a_link_on_disk_that_leads_out(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", tmp_path / "out" / "set")
    with pytest.raises(ValueError, match="outside the destination"):
        unpack(tar(tmp_path / "a.tgz", GOOD), tmp_path / "out", progress=False)
    assert not made(tmp_path / "elsewhere")


@pytest.mark.parametrize("kind", ["zip", "tgz", "tar"])
@pytest.mark.parametrize("cut", [10, 1000, -700])
def test_a_damaged_archive(tmp_path, kind, cut):
    files = {**GOOD, "set/big.bin": os.urandom(40_000)}
    mode = "w:gz" if kind == "tgz" else "w"
    archive = zipped(tmp_path / "a", files) if kind == "zip" else tar(tmp_path / "a", files, mode=mode)
    data = archive.read_bytes()
    archive.write_bytes(data[:cut] if kind != "tar" else data[:max(cut, 0) or 20_000])
    with pytest.raises((OSError, ValueError), match="Fetch it again"): unpack(archive, tmp_path / "out", progress=False)
    assert not is_unpacked(archive, tmp_path / "out")


def test_a_flipped_byte(tmp_path):
    archive = zipped(tmp_path / "a.zip", {"big.bin": os.urandom(40_000)})
    data = bytearray(archive.read_bytes())
    data[20_000] ^= 255
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
        calls.append(what)
        write(source, to, size, what)
    monkeypatch.setattr(files, "_write", stop)
    with pytest.raises(KeyboardInterrupt): unpack(archive, tmp_path / "out", progress=False)
    assert made(tmp_path / "out") == dict(list(GOOD.items())[:2])
    more = []
    monkeypatch.setattr(files, "_write", lambda *a: (more.append(a[3]), write(*a)))
    assert made(unpack(archive, tmp_path / "out", progress=False)) == GOOD and more == ["set/list.txt"]
    # done: nothing is written
    assert made(unpack(archive, tmp_path / "out", progress=False)) == GOOD and more == ["set/list.txt"]


def test_another_archive_of_that_name_is_unpacked_anew(tmp_path):
    unpack(tar(tmp_path / "a.tgz", GOOD), tmp_path / "out", progress=False)
    unpack(tar(tmp_path / "a.tgz", {**GOOD, "set/list.txt": b"changed, and longer"}), tmp_path / "out", progress=False)
    assert (tmp_path / "out/set/list.txt").read_bytes() == b"changed, and longer"


def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda p: type("Usage", (), dict(free=100)))
    with pytest.raises(OSError, match="nothing was written"):
        unpack(tar(tmp_path / "a.tgz", GOOD), tmp_path / "out", progress=False)
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
            with pytest.raises(OSError, match="nothing was written"):
                unpack(archive, tmp_path / "out", progress=False)
    assert made(unpack(archive, tmp_path / "out", progress=False)) == GOOD


def test_files_that_were_lost_later(tmp_path):
    archive = tar(tmp_path / "a.tgz", GOOD)
    out = unpack(archive, tmp_path / "out", progress=False)
    (out / "set/img/1.jpg").unlink()
    (out / "set/list.txt").write_bytes(b"cut")
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
    def both():
        go.wait()
        unpack(archive, tmp_path / "out", progress=False)
    threads = [threading.Thread(target=both) for _ in range(2)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert made(tmp_path / "out") == GOOD and sorted(written) == sorted(GOOD)


@pytest.mark.parametrize("at", [1536, 1024, 1100])
def test_a_tar_that_ends_between_or_inside_its_headers_is_refused(tmp_path, at):
    tar(tmp_path / "a.tar", {"a.txt": b"x", "b.txt": b"y"}, mode="w:")
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[:at])
    with pytest.raises(OSError, match="a.tar is damaged or cut short"): unpack(tmp_path / "a.tar", tmp_path / "out")


def test_a_tar_with_a_damaged_header_in_its_middle_is_refused(tmp_path):
    tar(tmp_path / "a.tar", {"a.txt": b"x", "b.txt": b"y"}, mode="w:")
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[data.rindex(b"b.txt")] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(OSError, match="a.tar is damaged or cut short"): unpack(tmp_path / "a.tar", tmp_path / "out")


def test_a_zip_entry_without_a_name_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z: z.writestr(zipfile.ZipInfo(""), b"x")
    with pytest.raises(UserError, match="has no name"): unpack(tmp_path / "a.zip", tmp_path / "out")


def test_a_wrong_checksum_of_gzip_names_the_archive(tmp_path):
    tar(tmp_path / "a.tgz", {"a.txt": b"x"})
    data = bytearray((tmp_path / "a.tgz").read_bytes())
    data[-8] ^= 255
    (tmp_path / "a.tgz").write_bytes(data)
    with pytest.raises(OSError, match="a.tgz is damaged or cut short"): unpack(tmp_path / "a.tgz", tmp_path / "out")
