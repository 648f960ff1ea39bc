"""What a stranger's manifest, tar or folder may try: nothing outside the dataset is touched."""

from __future__ import annotations

import functools
import http.server
import io
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from shard_worlds import all_bytes, contents, text_dataset

from onellm_dist.common.errors import OneLLMError, UsageError
from onellm_dist.shards.build.confine import confine
from onellm_dist.shards.format.dataset import open_dataset
from onellm_dist.shards.format.energon import read_energon_splits, write_energon
from onellm_dist.shards.format.index import ShardIndex
from onellm_dist.shards.format.index_tar import index_tar
from onellm_dist.shards.format.tars import TarError
from onellm_dist.shards.sources.base import RawSample
from onellm_dist.shards.storage.paths import RemotePath
from onellm_dist.shards.tools.index_existing import index_existing_shards
from onellm_dist.shards.tools.repair import repair_dataset

TAR = "shards/train-000000.tar"


# -- object stores


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """A web server of `tmp_path`: its URL, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}", asked
        found.shutdown()
        thread.join()


def forge(root: Path, **values: object) -> None:
    """Change the first shard of a manifest, which then has no checksum."""
    manifest = json.loads((root / "manifest.json").read_bytes())
    del manifest["checksum"]
    manifest["shards"][0] |= values
    (root / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONELLM_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize(
    "path", [f"%2e%2e/victim/{TAR}", f"shards/%2E%2e/.%2E/victim/{TAR}", f"%252e%252e/victim/{TAR}"]
)
def test_a_percent_encoded_path_does_not_leave_the_url(
    tmp_path: Path, server: tuple[str, list[str]], path: str
) -> None:
    url, asked = server
    text_dataset(tmp_path / "victim", {"a": {"txt": b"secret"}})
    text_dataset(tmp_path / "set", {"a": {"txt": b"secret"}})
    forge(tmp_path / "set", path=path)
    with pytest.raises(OneLLMError):
        contents(open_dataset(f"{url}/set"))
    assert len(asked) > 1 and all(one.startswith("/set/") for one in asked)


@pytest.mark.usefixtures("_own_cache")
def test_a_name_with_the_signs_of_urls_is_read_as_it_is(
    tmp_path: Path, server: tuple[str, list[str]]
) -> None:
    root = text_dataset(tmp_path / "set", {"a": {"txt": b"x"}}).root
    for end in ("", ".index"):
        (root / (TAR + end)).rename(root / f"shards/a#1 %41?b=c.tar{end}")
    forge(root, path="shards/a#1 %41?b=c.tar")
    url, _ = server

    with pytest.raises(OneLLMError, match="whole files instead of the requested bytes"):
        contents(open_dataset(f"{url}/set"))  # it was found; this server knows no byte ranges


@pytest.mark.parametrize("name", ["%2e%2e/x.jpg", "../x.jpg", "a/%2E./%2e./x.jpg"])
def test_media_behind_a_percent_encoded_path_lie_outside(name: str) -> None:
    inputs = RemotePath("https://host/in")
    samples = [RawSample(one, one, {"jpg": inputs / one}) for one in (name, "b.jpg")]
    found = list(confine(samples, (str(inputs),)))
    assert str(found[0].problem).startswith("outside of the input") and not found[0].parts
    assert found[1].problem is None and found[1].parts


# -- links beside the tars


@pytest.mark.parametrize("name", [".nv-meta", "repaired.jsonl", f"{TAR}.idx"])
def test_files_beside_the_tars_that_lead_out_are_not_written(tmp_path: Path, name: str) -> None:
    victim, root = tmp_path / "victim", tmp_path / "set"
    victim.mkdir()
    (victim / "split.yaml").write_text("precious")
    text_dataset(root, {"a": {"txt": b"1"}, "b": {"txt": b"2"}})
    (root / f"{TAR}.index").write_bytes(b"")  # so that there is something to repair
    target = victim if name == ".nv-meta" else victim / "split.yaml"
    (root / name).symlink_to(target)
    before = all_bytes(tmp_path)
    with pytest.raises(UsageError, match="is a link that leads out of the folder"):
        repair_dataset(root)
    if name != "repaired.jsonl":
        index_tar(root / TAR)
        before = all_bytes(tmp_path)
        with pytest.raises(UsageError, match="is a link that leads out of the folder"):
            write_energon(root)
    assert all_bytes(tmp_path) == before


# -- what a tar may say


def make_member(name: str, data: bytes = b"", **values: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in values.items():
        setattr(info, key, value)
    return info


def write_members(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


GOOD = (make_member("a.txt", b"good"), b"good")


@pytest.mark.parametrize(
    "member",
    [
        (make_member("b.txt", b"x" * 600, pax_headers={"size": "10"}), b"x" * 600),
        (make_member("b.txt", b"x" * 10, pax_headers={"size": "600"}), b"x" * 10),
        (make_member("b.txt", b"x" * 10, pax_headers={"size": "-5"}), b"x" * 10),
        (make_member("b.txt", b"x" * 10, pax_headers={"size": "99999999999999999999"}), b"x" * 10),
        (make_member("b.txt", b"x" * 10, pax_headers={"path": "../../c.txt"}), b"x" * 10),
        (make_member("b.txt", b"x" * 10, pax_headers={"path": "c\0d.txt"}), b"x" * 10),
        (make_member("b.txt", b"x" * 10, pax_headers={"GNU.sparse.size": "9"}), b"x" * 10),
        (
            make_member(
                "b.txt",
                b"1\n0\n5\n",
                pax_headers={
                    "GNU.sparse.major": "1",
                    "GNU.sparse.minor": "0",
                    "GNU.sparse.name": "c.txt",
                    "GNU.sparse.realsize": "99999999999",
                },
            ),
            b"1\n0\n5\n",
        ),
        (make_member("b.txt", type=tarfile.GNUTYPE_SPARSE), b""),
        (make_member("b.txt", type=tarfile.CHRTYPE, devmajor=1, devminor=5), b""),
        (make_member("b.txt", type=tarfile.FIFOTYPE), b""),
        (make_member("b.txt", type=tarfile.LNKTYPE, linkname="/etc/passwd"), b""),
        (make_member("b\0c.txt", b"x"), b"x"),
    ],
    ids=[
        "smaller",
        "larger",
        "negative",
        "huge",
        "parent",
        "nul",
        "sparse-0",
        "sparse-1",
        "sparse-gnu",
        "device",
        "fifo",
        "hard-link",
        "nul-name",
    ],
)
def test_a_tar_is_refused_or_read_as_tar_readers_read_it(
    tmp_path: Path, member: tuple[tarfile.TarInfo, bytes]
) -> None:
    path = write_members(tmp_path / "x.tar", GOOD, member)
    data = path.read_bytes()
    refused = None
    try:
        index = ShardIndex(index_tar(path))
    except TarError as error:
        refused = error
    if refused is not None:
        assert refused.tar == path and list(all_bytes(tmp_path)) == ["x.tar"]
        return
    found = {
        f"{index.key(row)}.{extension}": data[part.offset : part.offset + part.size]
        for row in range(index.samples)
        for extension, part in index.parts(row).items()
    }
    with tarfile.open(path) as tar:
        theirs = {m.name: m for m in tar if m.isreg()}
        for name, content in found.items():
            file = tar.extractfile(theirs[name])
            assert file is not None and file.read() == content
    assert found["a.txt"] == b"good" and not any(".." in name for name in found)


def test_links_inside_tars_are_counted_because_their_samples_lack_parts(tmp_path: Path) -> None:
    links = [(tarfile.LNKTYPE, "b.txt"), (tarfile.SYMTYPE, "c.txt"), (tarfile.SYMTYPE, "no-part")]
    members = [(make_member(name, type=kind, linkname="a.txt"), b"") for kind, name in links]
    (tmp_path / "set").mkdir()
    write_members(tmp_path / "set/x.tar", GOOD, *members)
    done = index_existing_shards(tmp_path / "set", modalities=())
    assert done.samples == 1 and done.notes[0].startswith("2 links inside tars skipped")


# -- Energon's lists of names


@pytest.mark.parametrize(
    "names",
    ["{0..9999999999}.tar", "{0..999}{0..999}{0..999}.tar", "{a,b}" * 40, "{" * 5000 + "}" * 5000],
    ids=["range", "product", "lists", "nested"],
)
def test_a_list_of_too_many_names_is_refused(tmp_path: Path, names: str) -> None:
    (tmp_path / ".nv-meta").mkdir()
    text = json.dumps({"split_parts": {"train": [names]}, "exclude": []})
    (tmp_path / ".nv-meta/split.yaml").write_text(text)
    with pytest.raises(UsageError, match=r"split\.yaml"):
        read_energon_splits(tmp_path)
