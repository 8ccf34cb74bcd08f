"""What requests may show: from where, and how large, is checked before anything is decoded."""

import contextlib
import http.server
import io
import os
import struct
import threading
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from pascalvl.runtime.server.config import MediaConfig
from pascalvl.runtime.server.errors import APIError
from pascalvl.runtime.server.fetch import Fetcher, domain, is_public
from pascalvl.runtime.server.media import Media, Source
from tests.engines.torch_reference import scene
from tests.runtime.server.served import data_url, encoded, picture_part, serving, text_part

PUBLIC = "93.184.216.34"
"""As which a server of this machine is reached here."""


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A file whose head promises so many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data or zlib.compress(b"\0")) + chunk(b"IEND", b"")


def animation(frames: int, side: int, form: str = "GIF") -> bytes:
    """Of pictures that differ, as else writers leave them out."""
    pictures = [Image.new("RGB", (side, side), (number * 8 % 256, number % 256, 0)) for number in range(frames)]
    file = io.BytesIO()
    pictures[0].save(file, form, save_all=True, append_images=pictures[1:], duration=40, lossless=True)
    return file.getvalue()


def opened(kind: str, file: bytes, detail: str = "auto", **config):
    taken = []
    with contextlib.ExitStack() as stack:
        media = Media.of(MediaConfig(**config))
        (found,) = media.opened([Source(kind, "", "it", detail)], [file], taken.append, stack)
        return found, sum(taken)


def refused(status: int, match: str, call, *arguments, **options) -> APIError:
    with pytest.raises(APIError, match=match) as raised:
        call(*arguments, **options)
    assert raised.value.status == status
    return raised.value


@pytest.fixture
def site():
    """A web server here, whose paths answer what is put into it: status, headers, body, or a function."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append((self.path, self.headers["Host"]))
            answer = pages[self.path]
            if callable(answer):
                answer(self)
                return
            status, headers, body = answer
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    pages, seen, connected = {}, [], []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def connect(address, port, seconds):
        connected.append(address)
        import socket

        return socket.create_connection(server.server_address, seconds)

    def fetcher(*domains, resolve=lambda host, port: [PUBLIC], most=1000, seconds=5.0):
        return Fetcher(frozenset(domains), most, seconds, resolve, connect)

    site.pages, site.seen, site.connected, site.fetcher = pages, seen, connected, fetcher
    yield site
    server.shutdown()
    server.server_close()


def test_a_file_of_an_allowed_host(site):
    site.pages["/a.png?x=1"] = (200, {}, b"picture")
    assert site.fetcher("a.test").fetch("http://a.test/a.png?x=1", "it") == b"picture"
    assert site.seen == [("/a.png?x=1", "a.test")]
    assert site.connected == [PUBLIC]


@pytest.mark.parametrize(
    "url",
    [
        "http://b.test/a",
        "http://a.test.b.test/a",
        "http://xa.test/a",
        "http://a.test@b.test/a",
        "http://b.test#@a.test/",
        "http://user@a.test/a",
        "http://127.0.0.1/a",
        "http://[::1]/a",
        "http://2130706433/a",
        "ftp://a.test/a",
        "gopher://a.test/a",
        "http:///a",
        "http://a.test:0/a",
        "http://a.test:99999/a",
        "http://a.test/\r\nX: y",
        "http://a.test\\@b.test/",
        "http://a.test/" + "x" * 5000,
    ],
)
def test_urls_that_are_not_fetched(site, url):
    refused(400, "it is", site.fetcher("a.test").fetch, url, "it")
    assert site.connected == []


@pytest.mark.parametrize(
    "target", ["http://b.test/x", "http://127.0.0.1/x", "//b.test/x", "file:///etc/passwd", "http://inner.test/x"]
)
def test_redirects_are_checked_as_urls_are(site, target):
    """The name of ``inner`` is allowed, and leads to where nobody is to be led."""
    site.pages["/a"] = (302, {"Location": target}, b"")
    fetcher = site.fetcher(
        "a.test", "inner.test", resolve=lambda host, port: ["10.0.0.1" if host == "inner.test" else PUBLIC]
    )
    refused(400, "it is", fetcher.fetch, "http://a.test/a", "it")
    assert [path for path, _ in site.seen] == ["/a"]


def test_redirects_that_lead_somewhere_or_nowhere(site):
    site.pages |= {"/a": (301, {"Location": "b"}, b""), "/b": (200, {}, b"there"), "/c": (307, {"Location": "/c"}, b"")}
    assert site.fetcher("a.test").fetch("http://a.test/a", "it") == b"there"
    refused(422, "more than 3 redirects", site.fetcher("a.test").fetch, "http://a.test/c", "it")


def test_a_name_is_looked_up_once_for_each_request(site):
    """DNS rebinding: what a second look would find is not asked for."""
    answers = [[PUBLIC], ["127.0.0.1"]]
    site.pages["/a"] = (200, {}, b"picture")
    fetcher = site.fetcher("a.test", resolve=lambda host, port: answers.pop(0))
    assert fetcher.fetch("http://a.test/a", "it") == b"picture"
    assert site.connected == [PUBLIC]
    refused(400, "not public", fetcher.fetch, "http://a.test/a", "it")


def test_one_address_that_is_not_public_is_enough(site):
    for addresses in ([PUBLIC, "10.0.0.1"], ["::ffff:10.0.0.1"], ["fd00::1", PUBLIC]):
        fetcher = site.fetcher("a.test", resolve=lambda host, port, found=addresses: found)
        refused(400, "not public", fetcher.fetch, "http://a.test/a", "it")
    assert site.connected == []


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (PUBLIC, True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("64:ff9b::5db8:d822", True),
        ("64:ff9b::a00:1", False),
        ("64:ff9b:1::5db8:d822", False),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("192.0.2.1", False),
        ("::1", False),
        ("::", False),
        ("::ffff:93.184.216.34", False),
        ("::ffff:127.0.0.1", False),
        ("::7f00:1", False),
        ("2002:7f00:1::", False),
        ("2002:5db8:d822::", False),
        ("2001:0:1::1", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("2001:db8::1", False),
        ("nonsense", False),
    ],
)
def test_public_addresses(address, expected):
    assert is_public(address) is expected


def test_bounds_of_what_is_fetched(site):
    def drip(handler):
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(100):
                handler.wfile.write(b"x")
                time.sleep(0.05)

    def endless(handler):
        handler.send_response(200)
        handler.end_headers()
        with contextlib.suppress(OSError):
            while True:
                handler.wfile.write(b"x" * 1000)

    site.pages |= {
        "/stated": (200, {}, b"x" * 1001),
        "/endless": endless,
        "/drip": drip,
        "/packed": (200, {"Content-Encoding": "gzip"}, b"x"),
        "/none": (404, {}, b""),
        "/short": (200, {"Content-Length": "100"}, b"x"),
        "/all": (200, {}, b"x" * 1000),
    }
    fetcher = site.fetcher("a.test", seconds=0.5)
    assert len(fetcher.fetch("http://a.test/all", "it")) == 1000
    for path, status, match in (
        ("stated", 413, "too large"),
        ("endless", 413, "too large"),
        ("drip", 422, "more than 0.5 seconds"),
        ("packed", 422, "compresses"),
        ("none", 422, "answers 404"),
        ("short", 422, "cannot be fetched"),
    ):
        start = time.monotonic()
        refused(status, match, fetcher.fetch, f"http://a.test/{path}", "it")
        assert time.monotonic() - start < 3


def test_names_of_hosts():
    assert domain("Images.Example.com.") == "images.example.com"
    for name in ("", "http://a.test", "a.test/", "a.test:80", "a@b", "ä.test"):
        with pytest.raises(Exception, match="expected a host's name"):
            domain(name)


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """A media root with a file, links that lead out of it, and one that does not."""
    folder = tmp_path / "root"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "a b.png").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "x").write_bytes(b"outside")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to(tmp_path)
    (folder / "within").symlink_to("deep")
    os.mkfifo(folder / "pipe")
    return folder


def read(root, url, **config):
    return Media.of(MediaConfig(root=root, **config)).read(Source("image", url, "it"))


def test_files_below_the_root(root):
    for url in ("deep/a b.png", f"file://{root}/deep/a%20b.png", str(root / "deep" / "a b.png"), "within/a b.png"):
        assert read(root, url) == b"inside"


@pytest.mark.parametrize(
    "url",
    ["../secret", "out", "up/secret", "deep/../../secret", "../root2/x", "pipe", "deep", "nowhere", "", "a\0b", "."],
)
def test_files_that_are_not(root, url):
    error = refused(400, "no file below", read, root, url)
    for path in (url, str(root / url), f"file://{root}/{url}"):
        assert str(refused(400, "it ", read, root, path)) == str(error)  # tells nothing of what is outside


def test_absolute_paths_and_none_without_a_root(root):
    refused(400, "no file below", read, root, "/etc/passwd")
    refused(400, "no file below", read, root, "file:///etc/passwd")
    for url in ("/etc/passwd", "file:///etc/passwd", "x.png"):
        assert refused(400, "media-root", read, None, url).code == "local_files_not_allowed"
    refused(400, "scheme", read, root, "file://host/etc/passwd")


def test_a_folder_that_becomes_a_link_meanwhile(root, monkeypatch):
    """Between the check of a path and its use."""
    (root / "turned").mkdir()
    (root / "turned" / "secret").write_bytes(b"inside")
    resolved = os.path.realpath

    def turn(path, **options):
        found = resolved(path, **options)
        (root / "turned" / "secret").unlink()
        (root / "turned").rmdir()
        (root / "turned").symlink_to(root.parent)
        return found

    monkeypatch.setattr(os.path, "realpath", turn)
    refused(400, "no file below", read, root, "turned/secret")


def test_large_files(root):
    refused(413, "too large", read, root, "deep/a b.png", file_bytes=5)
    refused(413, "too large", read, root, encoded(b"x" * 6, "image/png"), file_bytes=5)


# Bombs ----------------------------------------------------------------------------------------------------------------


def test_a_picture_is_what_it_was():
    picture = scene(1, 96, 64)
    file = io.BytesIO()
    picture.save(file, "PNG")
    found, taken = opened("image", file.getvalue())
    np.testing.assert_array_equal(np.asarray(found), np.asarray(picture.convert("RGB")))
    assert taken == 96 * 64 * 3


def test_low_detail():
    """As Frigate asks: at most the area of 512x512."""
    file = io.BytesIO()
    Image.new("RGB", (2048, 1024)).save(file, "JPEG")
    assert opened("image", file.getvalue())[0].size == (2048, 1024)
    assert opened("image", file.getvalue(), "low")[0].size == (724, 362)


@pytest.mark.parametrize(
    ("width", "height", "match"),
    [(60000, 60000, "too large|pixels"), (100_000, 1, "too thin"), (1, 100_000, "too thin"), (8000, 8000, "too large")],
)
def test_pictures_that_are_not_decoded(width, height, match):
    start = time.monotonic()
    refused(422, match, opened, "image", png(width, height))
    assert time.monotonic() - start < 1


def test_pixels_of_all_pictures_together():
    media = Media.of(MediaConfig(request_pixels=10_000))
    file = png(80, 80, zlib.compress(b"\0" * 81 * 80))
    sources = [Source("image", "", "it")] * 2
    with contextlib.ExitStack() as stack:
        assert len(media.opened(sources[:1], [file], lambda _: None, stack)) == 1
        refused(422, "10000 pixels together", media.opened, sources, [file] * 2, lambda _: None, stack)


def test_too_many_pictures():
    refused(400, "17 pictures", Media.of(MediaConfig()).check_count, 17)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_animations_are_bounded(form):
    file = animation(30, 40, form)
    video, _ = opened("video", file)
    assert len(video.frames) == 30
    refused(422, "31? ?frames|too large", opened, "video", file, frames=29)
    refused(422, "pixels in all frames", opened, "video", file, request_pixels=20 * 1600)
    refused(422, "too large", opened, "video", file, picture_pixels=1500)


def clip(path, frames=30, size=(64, 48), codec="mpeg4"):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = size
        for number in range(frames):
            picture = Image.new("RGB", size, (number * 8 % 256, 0, 0))
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path.read_bytes()


def test_video_files_are_bounded(tmp_path):
    file = clip(tmp_path / "a.mp4")
    assert len(opened("video", file)[0].frames) == 30
    refused(422, "30 frames", opened, "video", file, frames=20)
    refused(422, "pixels in a frame", opened, "video", file, picture_pixels=3000)
    refused(422, "pixels in all frames", opened, "video", file, video_pixels=64 * 48 * 20)
    unstated = clip(tmp_path / "a.ts", codec="mpeg2video")  # does not say how many there are
    refused(422, "21 frames", opened, "video", unstated, frames=20)


def test_videos_name_no_other_files(tmp_path):
    """Playlists and the like, by which FFmpeg would read what the server can."""
    clip(tmp_path / "secret.ts", codec="mpeg2video")
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n"
    concat = f"ffconcat version 1.0\nfile '{tmp_path}/secret.ts'\n"
    for file in (playlist.encode(), concat.encode()):
        refused(422, "cannot be read as a video", opened, "video", file)


def test_formats_that_run_programs_are_not_read():
    refused(
        422, "not a picture", opened, "image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    )


# Through HTTP ---------------------------------------------------------------------------------------------------------


def test_through_http(nano_engine_bundle, tmp_path):
    scene(1, 96, 64).save(tmp_path / "a.png")
    question = text_part("Describe the picture.")
    with serving(nano_engine_bundle, "--media-root", tmp_path, "--max-pictures", 2) as served:
        inside = served.chat([picture_part(f"file://{tmp_path}/a.png"), question], max_tokens=20)
        encoded_too = served.chat([picture_part(data_url(scene(1, 96, 64))), question], max_tokens=20)
        assert inside[0] == encoded_too[0] == 200
        assert inside[1]["choices"] == encoded_too[1]["choices"]
        assert served.chat([picture_part("file:///etc/passwd"), question])[0] == 400
        for url in ("http://169.254.169.254/latest/meta-data", "https://example.com/a.png"):
            status, body = served.chat([picture_part(url), question])
            assert (status, body["error"]["code"]) == (400, "media_domain_not_allowed")
            assert body["error"]["param"] == "messages[0].content[0].image_url.url"
        url = data_url(scene(1, 64, 64))
        assert served.chat([picture_part(url)] * 3 + [question])[0] == 400
        file = encoded(animation(8, 64), "image/gif")
        status, body = served.chat([{"type": "video_url", "video_url": {"url": file}}, question])
        assert status == 200
        assert served.chat([text_part("See:"), picture_part(data_url(scene(1, 96, 64))), question])[0] == 200
        assert served.figure("pascalvl_picture_cache_entries") == 2
        assert served.figure("pascalvl_picture_cache_hits_total") >= 1
        served.wait_until("pascalvl_request_memory_bytes", 0)
