"""`python data.py imagenette FOLDER`, against a server of this machine with a small archive of the same form."""

import gzip
import io
import os
import shlex
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from data import open_dataset
from runtime import imagenette
from runtime.files import UserError
from runtime.imagenette import fetch_imagenette


def archive(*extra):
    """A small imagenette2-320.tgz: two pictures, then (name, bytes, or the type of a member without content)."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, body in (("train/cat/0.JPEG", os.urandom(9000)), ("val/cat/1.JPEG", b"two"), *extra):
            member = tarfile.TarInfo(f"imagenette2-320/{name}")
            if isinstance(body, str):
                member.type, member.linkname = body.encode(), "/etc/passwd"
            else:
                member.size = len(body)
            tar.addfile(member, None if isinstance(body, str) else io.BytesIO(body))
    return content.getvalue()


@pytest.fixture
def source(server, monkeypatch):
    """The server that the archive comes from."""
    server.body = archive()
    monkeypatch.setattr(imagenette, "IMAGENETTE", server.url.replace("weights.pth", "imagenette2-320.tgz"))
    return server


def test_it_arrives_in_spite_of_a_broken_line_and_a_second_time_needs_none(source, tmp_path, capsys):
    source.cuts = [3000, 2000]
    target = tmp_path / "sets" / "nette"
    fetch_imagenette(target)
    assert [r.get("Range") for r in source.requests] == [None, "bytes=3000-", "bytes=5000-"]
    assert len((target / "train" / "cat" / "0.JPEG").read_bytes()) == 9000
    assert (target / "val" / "cat" / "1.JPEG").read_bytes() == b"two"
    left = {"nette", "imagenette2-320.tgz", "imagenette2-320.tgz.lock"}
    assert set(os.listdir(tmp_path / "sets")) == left  # no temporary folder
    assert f"python train.py --size S --data {target}/train " in capsys.readouterr().out
    fetch_imagenette(target)
    out = capsys.readouterr().out
    assert "there already" in out and "python train.py" in out and len(source.requests) == 3


def test_the_printed_command_is_one_that_train_accepts(source, tmp_path, capsys):
    """Catches a flag that was renamed, a shape that the model refuses, and a folder that is not quoted."""
    from runtime.options import parse_args

    fetch_imagenette(tmp_path / "my nette")
    command = capsys.readouterr().out.split("python train.py ")[1].split("\n")[0]
    args = parse_args(shlex.split(command))
    assert args.data == str(tmp_path / "my nette" / "train") and args.config.resolution == 128
    assert open_dataset(args.data, 128).classes == ["cat"]


def test_an_interrupted_unpacking_starts_over(source, tmp_path, monkeypatch):
    """Catches a half-full folder under the final name, and one that is completed from the remains of another."""
    real = tarfile.TarFile.extract

    def interrupted(tar, member, *args, **kwargs):
        if "val" in member.name:
            raise KeyboardInterrupt
        return real(tar, member, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extract", interrupted)
        patch.setattr(imagenette.shutil, "rmtree", lambda *args, **kwargs: None)  # as if it were a SIGKILL
        with pytest.raises(KeyboardInterrupt):
            fetch_imagenette(tmp_path / "nette")
    remains = tmp_path / ".nette.unpacking"
    assert (remains / "imagenette2-320" / "train").is_dir() and not (tmp_path / "nette").exists()
    (remains / "imagenette2-320" / "train" / "stale.JPEG").write_bytes(b"of another version")
    fetch_imagenette(tmp_path / "nette")
    assert os.listdir(tmp_path / "nette" / "train") == ["cat"] and not remains.exists()


def test_two_at_once_unpack_once(source, tmp_path, monkeypatch):
    """The second comes while the first unpacks. Catches: one removing the other's half-full folder."""
    unpacked, begun = [], threading.Event()

    def slowly(archive, folder, plain=imagenette.unpack):
        unpacked.append(folder)
        begun.set()
        time.sleep(0.3)
        plain(archive, folder)

    monkeypatch.setattr(imagenette, "unpack", slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(fetch_imagenette, tmp_path / "nette")
        begun.wait(60)
        second = pool.submit(fetch_imagenette, tmp_path / "nette")
        first.result(), second.result()
    assert len(unpacked) == 1 and (tmp_path / "nette" / "train" / "cat" / "0.JPEG").is_file()


@pytest.mark.parametrize(
    "extra", [("../../evil.JPEG", b"x"), ("train/link", "2"), ("train/hard", "1"), ("train/null", "3")]
)
def test_archives_with_links_devices_or_escaping_names_are_refused(source, tmp_path, extra):
    source.body = archive(extra)
    with pytest.raises(UserError, match="imagenette2-320.tgz is damaged .*remove it and get it again") as error:
        fetch_imagenette(tmp_path / "in" / "nette")
    assert "\n" not in str(error.value) and extra[0].split("/")[-1] in str(error.value)
    assert {name for name in os.listdir(tmp_path / "in") if "nette2" not in name} == set()
    assert not list(tmp_path.rglob("evil.JPEG"))


def test_damaged_archives_are_refused_and_leave_nothing(source, tmp_path):
    whole = archive()
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # in gzip's checksum: the files look fine
    empty = gzip.compress(bytes(10240))
    for body in (whole[:-4], whole[:5000], bytes(flipped), b"<html>", b"", empty):
        (tmp_path / "imagenette2-320.tgz").write_bytes(body)
        with pytest.raises(UserError, match="imagenette2-320.tgz is damaged") as error:
            fetch_imagenette(tmp_path / "nette")
        assert "\n" not in str(error.value) and "remove it" in str(error.value)
        assert not (tmp_path / "nette").exists() and not (tmp_path / ".nette.unpacking").exists()


def test_a_folder_that_holds_something_else_is_left_alone(source, tmp_path):
    (tmp_path / "mine").mkdir()
    fetch_imagenette(tmp_path / "mine")  # an empty one is welcome
    assert (tmp_path / "mine" / "train").is_dir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    for name in ("other", "other/letter.txt"):
        with pytest.raises(UserError, match="is not this data set"):
            fetch_imagenette(tmp_path / name)
    assert (tmp_path / "other" / "letter.txt").read_text() == "dear"


def test_without_a_network_one_line_says_the_address_and_where_to_put_the_file(source, tmp_path):
    source.shutdown()
    source.server_close()
    with pytest.raises(UserError, match="put it at .*imagenette2-320.tgz") as error:
        fetch_imagenette(tmp_path / "nette")
    assert imagenette.IMAGENETTE in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "imagenette2-320.tgz").write_bytes(archive())  # as the line says
    fetch_imagenette(tmp_path / "nette")
    assert (tmp_path / "nette" / "train").is_dir()
