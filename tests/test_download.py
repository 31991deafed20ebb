"""What cached_download promises, against a server of this machine whose faults are switched on (helpers.py)."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from helpers import BODY, ROOT, in_a_fork
from runtime.files import UserError, cached_download, download


def plant_part(folder, content, tag):
    """What a killed download leaves behind."""
    (folder / "weights.pth.part").write_bytes(content)
    (folder / "weights.pth.etag").write_text(tag)


def test_a_file_arrives_whole_and_leaves_only_itself_and_its_lock(server, tmp_path):
    """Catches a lost last block, left-over temporary files."""
    path = cached_download(server.url, folder=tmp_path)
    assert path == tmp_path / "weights.pth" and path.read_bytes() == BODY
    assert sorted(p.name for p in tmp_path.iterdir()) == ["weights.pth", "weights.pth.lock"]


def test_a_second_call_makes_no_request(server, tmp_path):
    """Catches asking the server "has it changed?", which would fail on a compute node without a network."""
    cached_download(server.url, folder=tmp_path)
    cached_download(server.url, folder=tmp_path)
    assert len(server.requests) == 1


def test_the_cache_is_torch_hubs_and_quoted_names_become_plain(server, tmp_path, monkeypatch):
    """Catches a second cache beside torch.hub's, files called epoch%3D319, %2F leading out of the folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    base, cache = server.url.removesuffix("weights.pth"), tmp_path / "hub" / "checkpoints"
    assert cached_download(base + "epoch%3D319.ckpt?download=1") == cache / "epoch=319.ckpt"
    assert cached_download(base + "..%2F..%2Fevil.pth") == cache / "evil.pth"


def test_a_cut_connection_is_resumed_in_the_same_call(server, tmp_path):
    """Catches a wrong offset, starting from zero at each drop, trusting a short reply."""
    server.cuts = [300_000, 1, 200_000]
    assert cached_download(server.url, folder=tmp_path).read_bytes() == BODY
    assert [r.get("Range", "all") for r in server.requests] == [
        "all",
        "bytes=300000-",
        "bytes=300001-",
        "bytes=500001-",
    ]


def test_a_part_of_an_earlier_run_is_resumed(server, tmp_path):
    """Catches fetching 6 GB again after an interruption. The first bytes are marked to prove that they stay."""
    plant_part(tmp_path, b"x" * 1000, '"v1"')
    assert cached_download(server.url, folder=tmp_path).read_bytes() == b"x" * 1000 + BODY[1000:]
    assert server.requests[0]["Range"] == "bytes=1000-"


@pytest.mark.parametrize("ignores_if_range", [False, True])
def test_a_file_that_changed_on_the_server_is_not_spliced(server, tmp_path, ignores_if_range):
    """Catches half of version 1 followed by half of version 2, also from a server that ignores If-Range."""
    server.ignores_if_range, server.etag = ignores_if_range, '"v2"'
    plant_part(tmp_path, b"x" * 1000, '"v1"')
    assert cached_download(server.url, folder=tmp_path).read_bytes() == BODY


def test_a_range_that_starts_elsewhere_than_asked_is_not_appended(server, tmp_path):
    """Catches believing status 206 alone; a proxy may round ranges down to its own blocks."""
    server.align = 512
    plant_part(tmp_path, BODY[:1000], '"v1"')
    assert cached_download(server.url, folder=tmp_path).read_bytes() == BODY
    assert ["Range" in r for r in server.requests] == [True, False]


@pytest.mark.parametrize("tag", ["", 'W/"v1"'])
def test_without_a_strong_tag_a_part_is_not_resumed(server, tmp_path, tag):
    """Catches resuming although nothing proves that the bytes belong together."""
    server.etag, server.cuts = tag, [1000]
    assert cached_download(server.url, folder=tmp_path).read_bytes() == BODY
    assert [r.get("Range") for r in server.requests] == [None, None]


def test_a_server_without_ranges_sends_all_again(server, tmp_path):
    """Catches appending a whole file (200) to the part that is there."""
    server.ranges = False
    plant_part(tmp_path, b"x" * 1000, '"v1"')
    assert cached_download(server.url, folder=tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("extra", [b"", b"too much"])
def test_a_part_that_is_already_complete_or_too_long_is_fetched_again(server, tmp_path, extra):
    """Catches dying of status 416 for ever after a kill between the last byte and the rename."""
    plant_part(tmp_path, BODY + extra, '"v1"')
    assert cached_download(server.url, folder=tmp_path).read_bytes() == BODY
    assert len(server.requests) == 2


def test_a_truncated_file_is_an_error_and_never_gets_its_name(server, tmp_path):
    """Catches urllib's silence about a body shorter than its Content-Length."""
    server.cuts = [10] * 9
    with pytest.raises(UserError, match=r"closed after 40 of 1,004,000 bytes"):
        cached_download(server.url, folder=tmp_path)
    assert not (tmp_path / "weights.pth").exists()


def test_bytes_without_end_are_cut_off_and_thrown_away(server, tmp_path, monkeypatch):
    """Catches a server that fills the disk, and leaves it full."""
    monkeypatch.setattr(download, "MOST", 3 * len(BODY))
    server.endless = True
    with pytest.raises(UserError, match="it does not end after 0.003012 GB"):
        cached_download(server.url, folder=tmp_path)
    assert not list(tmp_path.glob("weights.pth*.part")) and not (tmp_path / "weights.pth").exists()


@pytest.mark.parametrize("length", ["many", "-5", "1e6", "99999999999999999999"])
def test_a_length_that_is_no_number_or_not_true_is_no_traceback(server, tmp_path, length):
    """The last is never reached: an error. The others say nothing, and the file is whole when the connection ends."""
    server.length = length
    if length.isdigit():
        with pytest.raises(UserError, match="HTTP Error 416"):  # for what follows the last byte
            cached_download(server.url, folder=tmp_path)
        assert not (tmp_path / "weights.pth").exists()
    else:
        assert cached_download(server.url, folder=tmp_path).read_bytes() == BODY


def test_a_length_shorter_than_the_body_is_a_truncated_file_which_its_hash_shows(server, tmp_path):
    """The rest of such a reply is never read. So every published file is fetched with a hash, or has one inside."""
    server.length = str(len(BODY) // 2)
    with pytest.raises(UserError, match="its SHA-256 starts with"):
        cached_download(server.url, sha256_prefix=hashlib.sha256(BODY).hexdigest()[:8], folder=tmp_path)
    assert not (tmp_path / "weights.pth").exists() and not (tmp_path / "weights.pth.part").exists()
    server.length = None
    assert cached_download(server.url, folder=tmp_path).read_bytes() == BODY


def test_redirects_are_followed_over_the_network_only_and_not_for_ever(server, tmp_path):
    """With the part that is there. Catches: a reply that makes us copy a file of this machine; a loop."""
    plant_part(tmp_path, BODY[:1000], '"v1"')
    server.redirect = server.url.replace("/files/", "/elsewhere/")
    assert cached_download(server.url, folder=tmp_path).read_bytes() == BODY
    assert server.requests[-1]["Range"] == "bytes=1000-"
    for i, server.redirect in enumerate((f"file://{tmp_path}/weights.pth", server.url, "http://")):
        with pytest.raises(UserError, match="could not download") as error:
            cached_download(server.url, folder=tmp_path / str(i))
        assert "\n" not in str(error.value) and not (tmp_path / str(i) / "weights.pth").exists()


def test_a_wrong_hash_is_an_error_and_the_bytes_are_thrown_away(server, tmp_path):
    """Catches an unchecked digest; a bad part that every later run would "complete" and refuse again."""
    right = hashlib.sha256(BODY).hexdigest()
    with pytest.raises(UserError, match=f"SHA-256 starts with {right[:8]}, expected 00000000"):
        cached_download(server.url, sha256_prefix="00000000", folder=tmp_path)
    assert not (tmp_path / "weights.pth").exists() and not (tmp_path / "weights.pth.part").exists()
    assert cached_download(server.url, sha256_prefix=right[:8].upper(), folder=tmp_path).read_bytes() == BODY


def test_no_network_is_one_line_with_address_place_and_flag(server, tmp_path, monkeypatch):
    """Catches a traceback, a long wait, or a message after which one still does not know what to do."""
    server.shutdown()
    server.server_close()  # its port is now closed
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    with pytest.raises(UserError) as caught:
        cached_download(server.url, flag="--dino", folder=tmp_path)
    message = str(caught.value)
    assert "\n" not in message and server.url in message
    assert f"put it at {tmp_path / 'weights.pth'}, or pass its path with --dino" in message
    assert not waits  # there is nothing to wait for


@pytest.mark.parametrize("status, requests", [(404, 1), (503, 4)])
def test_a_refusal_ends_at_once_and_a_server_in_trouble_is_asked_again(server, tmp_path, status, requests):
    """Catches retrying what can never work; giving up on what often does; saving the error page as weights."""
    server.status = status
    with pytest.raises(UserError, match=str(status)):
        cached_download(server.url, folder=tmp_path)
    assert len(server.requests) == requests and not (tmp_path / "weights.pth").exists()


def test_a_silent_connection_is_dropped_and_resumed(server, tmp_path, monkeypatch):
    """Catches hanging for ever on a connection that is open and dead."""
    monkeypatch.setattr(download, "TIMEOUT", 0.3)
    server.stalls, server.cuts = True, [2 * download.BLOCK + 5]  # the 5 bytes of an unfinished block are lost
    assert cached_download(server.url, folder=tmp_path).read_bytes() == BODY
    assert [r.get("Range") for r in server.requests] == [None, f"bytes={2 * download.BLOCK}-"]


def test_a_folder_that_cannot_be_made_is_the_same_one_line_error(server, tmp_path):
    """Catches a bare FileExistsError; the reader must still learn what was wanted and where."""
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="could not download"):
        cached_download(server.url, folder=tmp_path / "file")
    assert server.requests == []


def test_ranks_that_ask_at_once_download_once(server, tmp_path):
    """Catches two writers in one part. Threads will do: a flock belongs to the open file, not to the process."""
    paths = []
    ranks = [
        threading.Thread(target=lambda: paths.append(cached_download(server.url, folder=tmp_path))) for _ in range(4)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=20)
    assert len(paths) == 4 and paths[0].read_bytes() == BODY and len(server.requests) == 1


def test_a_kill_half_way_leaves_nothing_under_the_final_name(server, tmp_path):
    """Catches writing straight to the final name; a lock that outlives its owner. Then the next run resumes."""
    server.stalls, server.cuts = True, [700_000]
    child = in_a_fork(lambda: cached_download(server.url, folder=tmp_path))
    part = tmp_path / "weights.pth.part"
    try:
        assert server.stalled.wait(30)
        deadline = time.monotonic() + 10
        while not (part.exists() and part.stat().st_size > 600_000) and time.monotonic() < deadline:
            time.sleep(0.02)  # until the child has written what it got
    finally:
        child.kill()
        child.join(10)
    assert part.stat().st_size > 600_000 and not (tmp_path / "weights.pth").exists()
    server.stalls = False
    server.go_on.set()
    assert cached_download(server.url, folder=tmp_path).read_bytes() == BODY
    assert "Range" in server.requests[-1]
