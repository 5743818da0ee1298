"""Hub ids, with a hub that is not there or is played."""

import types

import huggingface_hub
import pytest
import tiny
from huggingface_hub.errors import LocalEntryNotFoundError

from mtl_jax import pretrained
from mtl_jax.core.errors import UserError
from mtl_jax.pretrained import locate


@pytest.fixture(scope="module")
def bert(deep):
    return deep


@pytest.fixture
def asked(monkeypatch, bert):
    """Plays a hub whose every model is the tiny BERT; returns what it was asked for."""
    asked = {}
    monkeypatch.delenv("MTL_JAX_OFFLINE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def model_info(self, repo, revision=None):
        files = asked.get("files", ["config.json", "model.safetensors", "pytorch_model.bin"])
        return types.SimpleNamespace(sha="c0ffee", siblings=[types.SimpleNamespace(rfilename=name) for name in files])

    def snapshot_download(repo, **options):
        asked.update(repo=repo, **options)
        return str(bert)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_an_id_is_fetched_at_one_commit_and_safetensors_come_first(asked):
    assert pretrained.load("org/tiny").location == pretrained.load(asked_folder(asked)).location
    assert (asked["repo"], asked["revision"]) == ("org/tiny", "c0ffee")
    assert "model.safetensors" in asked["allow_patterns"]
    assert "pytorch_model.bin" not in asked["allow_patterns"]
    asked["files"] = ["config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"]
    locate.locate("org/tiny@main")
    assert "pytorch_model-*.bin" in asked["allow_patterns"]


def asked_folder(asked):
    return str(huggingface_hub.snapshot_download("org/tiny"))


def test_a_local_directory_goes_before_the_hub(asked, tmp_path, monkeypatch):
    tiny.write_bert(tmp_path / "org" / "tiny")
    monkeypatch.chdir(tmp_path)
    pretrained.load("org/tiny")
    assert not asked


@pytest.mark.parametrize("variable", ["MTL_JAX_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_says_how_to_go_on(monkeypatch, variable):
    def nothing_cached(repo, **options):
        assert options["local_files_only"]
        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing_cached)
    monkeypatch.setenv(variable, "1")
    with pytest.raises(UserError, match=r"org/tiny: no such directory.* pass a local directory"):
        pretrained.load("org/tiny")


def test_no_network_says_how_to_go_on(asked, monkeypatch):
    def no_network(self, repo, revision=None):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    with pytest.raises(UserError, match=r"the hub cannot be reached \(Name or service not known\); pass a local directory"):
        pretrained.load("org/tiny")
