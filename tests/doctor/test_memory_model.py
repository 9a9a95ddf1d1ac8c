from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_ray.doctor.memory import check_model, count_parameters


def test_a_model_is_read_and_counted(model_folder: Path) -> None:
    check, facts = check_model("model.path", str(model_folder), tokenizer_path=str(model_folder))
    assert check.status == "ok"
    assert "Qwen2ForCausalLM" in check.detail
    assert facts is not None
    # Embedding 64 * 32, query 33 * 32, key and value 2 * 33 * 16, output 32 * 32, MLP 3 * 32 * 16, norms 3 * 32.
    assert facts.num_parameters == 2048 + 1056 + 1056 + 1024 + 1536 + 96
    assert facts.num_parameters == AutoModelForCausalLM.from_pretrained(model_folder).num_parameters()


def test_a_model_in_the_home_folder_is_read_as_a_run_reads_it(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(model_folder.parent))
    path = f"~/{model_folder.name}"
    check, facts = check_model("model.path", path, tokenizer_path=path)
    assert check.status == "ok", check.detail
    assert facts is not None
    assert (facts.path, facts.num_parameters) == (str(model_folder), 6816)


def test_headers_and_architecture_count_the_same(model_folder: Path) -> None:
    config = AutoConfig.from_pretrained(model_folder)
    # A hub id has no folder to read: the architecture is built without memory.
    assert count_parameters("owner/name", config) == count_parameters(str(model_folder), config)


def test_shards_are_added_up(sharded_folder: Path, model_folder: Path) -> None:
    assert count_parameters(str(sharded_folder), AutoConfig.from_pretrained(model_folder)) == 17


def copy(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "copy"))


def reason(folder: Path) -> str:
    check, facts = check_model("model.path", str(folder), tokenizer_path=str(folder))
    assert check.status == "fail"
    assert check.name == "model.path"
    assert check.remedy
    assert facts is None
    return check.detail


def test_no_folder(tmp_path: Path) -> None:
    assert "no such folder" in reason(tmp_path / "nowhere")
    assert "no such folder" in reason(Path("models/not/there"))


def test_no_config(model_folder: Path, tmp_path: Path) -> None:
    folder = copy(model_folder, tmp_path)
    (folder / "config.json").unlink()
    assert "config.json" in reason(folder)


def test_no_weights(model_folder: Path, tmp_path: Path) -> None:
    folder = copy(model_folder, tmp_path)
    (folder / "model.safetensors").unlink()
    assert "no weights" in reason(folder)


def test_no_tokenizer(model_folder: Path, tmp_path: Path) -> None:
    folder = copy(model_folder, tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer" in reason(folder)
    assert check_model("model.critic_path", str(folder))[0].status == "ok"  # a critic needs none


def test_a_download_that_was_cut_short(model_folder: Path, tmp_path: Path) -> None:
    folder = copy(model_folder, tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    assert "cut short" in reason(folder)


def test_a_git_lfs_pointer(model_folder: Path, tmp_path: Path) -> None:
    folder = copy(model_folder, tmp_path)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "LFS" in reason(folder)


def test_a_missing_shard(sharded_folder: Path, model_folder: Path) -> None:
    (sharded_folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002"):
        count_parameters(str(sharded_folder), AutoConfig.from_pretrained(model_folder))
