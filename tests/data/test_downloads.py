"""Downloads: resumed, checked, unpacked, and refused where an archive is damaged or hostile."""

import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.cifar_files import write_cifar10
from support.data_files import write_tiny_imagenet
from support.http_server import Server, tar_of

from awnet.data import (
    download,
    downloads,
    load_dataset,
)
from awnet.files import locked

# ── downloads ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def server():
    made = Server()
    yield made
    made.close()


def zip_of(folder):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        for path in sorted(folder.rglob("*")):
            opened.write(path, path.relative_to(folder.parent))
    return file.getvalue()


def test_a_download_is_unpacked_read_and_not_repeated(tmp_path, server, monkeypatch):
    server.serve(monkeypatch, "cifar10", tar_of(write_cifar10(tmp_path / "theirs")))
    seen = []
    folder = download("cifar10", tmp_path / "mine", progress=lambda have, total: seen.append((have, total)))
    assert folder == tmp_path / "mine" / "cifar-10-batches-py"
    assert seen[-1] == (len(server.content), len(server.content))
    assert load_dataset("cifar10", tmp_path / "mine").test.fingerprint() == (
        load_dataset("cifar10", tmp_path / "theirs").test.fingerprint()
    )
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
    ]
    assert download("cifar10", tmp_path / "mine") == folder
    assert len(server.asked) == 1


def test_tiny_imagenet_is_unpacked_from_a_zip(tmp_path, server, monkeypatch):
    server.serve(monkeypatch, "tiny_imagenet", zip_of(write_tiny_imagenet(tmp_path / "theirs")))
    download("tiny_imagenet", tmp_path / "mine")
    assert len(load_dataset("tiny_imagenet", tmp_path / "mine").test) == 9


def test_a_download_sweeps_what_killed_ones_left_and_nothing_of_a_running_one(tmp_path, server, monkeypatch):
    server.serve(monkeypatch, "cifar10", tar_of(write_cifar10(tmp_path / "theirs")))
    mine = tmp_path / "mine"
    mine.mkdir()
    code = (
        "import sys; from pathlib import Path; from awnet.files import temporary_folder\n"
        "with temporary_folder(Path(sys.argv[1])) as scratch:\n"
        "    (scratch / 'half').write_text('x'); print('unpacking', flush=True); sys.stdin.read()"
    )
    names = ("cifar-10-batches-py", "cifar-10-python.tar.gz", "cifar-100-python")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(mine / name)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name in names
    ]
    for process in processes:
        process.stdout.readline()
    for process in processes[:2]:
        process.kill()
        process.wait()
    assert len(list(mine.iterdir())) == 3
    download("cifar10", mine)
    left = sorted(path.name for path in mine.iterdir())
    assert left[1:] == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]
    assert left[0].startswith(".cifar-100-python.")  # of the process that still runs
    processes[2].communicate()
    assert len(list(mine.iterdir())) == 2


def test_two_downloads_of_one_archive_do_not_mix(tmp_path, server, monkeypatch):
    server.serve(monkeypatch, "cifar10", tar_of(write_cifar10(tmp_path / "theirs")))
    part = tmp_path / "mine" / "cifar-10-python.tar.gz.part"
    part.parent.mkdir()
    part.write_bytes(server.content[:10])
    with (
        locked(part, lambda: "busy"),
        pytest.raises(ConnectionError, match="another process is downloading it"),
    ):
        download("cifar10", tmp_path / "mine")
    assert part.read_bytes() == server.content[:10]
    assert download("cifar10", tmp_path / "mine").is_dir()


@pytest.mark.parametrize("ranges", [True, False], ids=["server knows ranges", "server does not"])
def test_an_interrupted_download_resumes(tmp_path, server, monkeypatch, ranges):
    server.serve(monkeypatch, "cifar10", tar_of(write_cifar10(tmp_path / "theirs")))
    server.ranges, server.break_off_after = ranges, 1000
    mine = tmp_path / "mine"
    with pytest.raises(ConnectionError, match=r"was lost after 1,000 of .*the same command resumes it"):
        download("cifar10", mine)
    part = mine / "cifar-10-python.tar.gz.part"
    assert part.read_bytes() == server.content[:1000]
    assert not (mine / "cifar-10-batches-py").exists()
    server.break_off_after = None
    seen = []
    download("cifar10", mine, progress=lambda have, total: seen.append((have, total)))
    assert server.asked == [None, "bytes=1000-"]
    assert seen[0][0] > 1000
    assert seen[-1] == (len(server.content), len(server.content))
    assert not part.exists()
    assert len(load_dataset("cifar10", mine).test) == 40


def test_a_complete_partial_download_is_used(tmp_path, server, monkeypatch):
    server.serve(monkeypatch, "cifar10", tar_of(write_cifar10(tmp_path / "theirs")))
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(server.content)
    download("cifar10", tmp_path)
    assert len(load_dataset("cifar10", tmp_path).test) == 40


def test_a_wrong_checksum_is_refused_and_the_next_attempt_starts_afresh(tmp_path, server, monkeypatch):
    archive = tar_of(write_cifar10(tmp_path / "theirs"))
    server.serve(monkeypatch, "cifar10", archive)
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(b"left over from another archive")
    with pytest.raises(ValueError, match=r"(?i)md5 hash .* does not match"):
        download("cifar10", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    download("cifar10", tmp_path)
    assert server.asked[-1] is None


@pytest.mark.parametrize("length", [True, False], ids=["length declared", "no length"])
def test_a_download_stops_past_the_size_of_every_archive(tmp_path, server, monkeypatch, length):
    server.serve(monkeypatch, "cifar10", bytes(5000))
    monkeypatch.setattr(downloads, "MOST_BYTES", 4000)
    monkeypatch.setattr(downloads, "CHUNK", 1000)
    server.length, seen = length, []
    with pytest.raises(ValueError, match=r"no published archive has more than 4,000.*--url"):
        download("cifar10", tmp_path, progress=lambda have, total: seen.append(have))
    assert seen == ([] if length else [1000, 2000, 3000, 4000])
    assert not list(tmp_path.iterdir())


def test_a_download_without_a_length_is_read_to_its_end(tmp_path, server, monkeypatch):
    server.serve(monkeypatch, "cifar10", tar_of(write_cifar10(tmp_path / "theirs")))
    server.length = False
    download("cifar10", tmp_path)
    assert len(load_dataset("cifar10", tmp_path).test) == 40


def test_an_address_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="url must begin with http"):
        download("cifar10", tmp_path, url="cifar.tar.gz")


def test_a_mirror_must_match_the_publishers_checksum(tmp_path, server, monkeypatch):
    server.content = tar_of(write_cifar10(tmp_path / "theirs"))
    url = f"http://127.0.0.1:{server.http.server_port}/any"
    with pytest.raises(ValueError, match="c58f30108f718f92721af3b95e74349a"):
        download("cifar10", tmp_path, url=url)


def test_without_a_network_it_says_which_folder_to_provide(tmp_path, server, monkeypatch):
    server.serve(monkeypatch, "cifar100", b"")
    port = server.http.server_port
    archive = downloads.ARCHIVES["cifar100"]
    server.close()
    server.close = lambda: None
    with pytest.raises(
        ConnectionError, match=r"(?s)cifar-100-python\.tar\.gz could not .*copy the published folder"
    ):
        download("cifar100", tmp_path)
    assert str(port) in archive.url


def test_unknown_and_embedded_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown data set 'mnist'; available are cifar10, cifar100"):
        download("mnist", tmp_path)
    with pytest.raises(ValueError, match="digits needs no download"):
        download("digits", tmp_path)


def hostile_archive(case, folder):
    file = io.BytesIO()
    if case.startswith("zip"):
        with zipfile.ZipFile(file, "w") as opened:
            opened.writestr(
                {"zip, upwards": "tiny-imagenet-200/../../ran", "zip, absolute": "/tmp/ran"}[case], "x"
            )
        return file.getvalue()
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        tar.add(folder, folder.name)
        member = tarfile.TarInfo(
            {
                "tar, upwards": "cifar-10-batches-py/../../ran",
                "tar, absolute": "/tmp/ran",
                "tar, another folder": "ran",
                "tar, link": "cifar-10-batches-py/link",
                "tar, device": "cifar-10-batches-py/device",
            }[case]
        )
        if case == "tar, link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc"
        elif case == "tar, device":
            member.type = tarfile.CHRTYPE
        tar.addfile(member)
    return file.getvalue()


@pytest.mark.parametrize(
    "case",
    [
        "tar, upwards",
        "tar, absolute",
        "tar, another folder",
        "tar, link",
        "tar, device",
        "zip, upwards",
        "zip, absolute",
        "cut short",
        "empty tar",
    ],
)
def test_an_archive_that_reaches_outside_or_is_damaged_is_refused(tmp_path, server, monkeypatch, case):
    folder = write_cifar10(tmp_path / "theirs")
    name = "tiny_imagenet" if case.startswith("zip") else "cifar10"
    if case == "cut short":
        content = tar_of(folder)[:-200]
    elif case == "empty tar":
        with tarfile.open(fileobj=(file := io.BytesIO()), mode="w:gz"):
            pass
        content = file.getvalue()
    else:
        content = hostile_archive(case, folder)
    server.serve(monkeypatch, name, content)
    mine = tmp_path / "mine"
    with pytest.raises(ValueError, match=r"not unpacked|could not be unpacked|does not hold"):
        download(name, mine)
    assert not (tmp_path / "ran").exists()
    assert not Path("/tmp/ran").exists()
    assert [path.name for path in mine.iterdir()] == [Path(downloads.ARCHIVES[name].url).name]
