from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.config.local_path import absolute_if_local, looks_local


def test_a_folder_that_is_there_gets_its_whole_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [absolute_if_local(path) for path in ("models", "~/models", f"{tmp_path}/models")] == [
        f"{tmp_path}/models"
    ] * 3
    assert absolute_if_local("owner/name") == "owner/name"


@pytest.mark.parametrize("path", [".", "./model", "../model", "/model", "~/model", "models/qwen/7b"])
def test_what_no_hub_has_is_local(path: str) -> None:
    assert looks_local(path)


@pytest.mark.parametrize("path", ["gpt2", "owner/name", "owner/name.v1"])
def test_what_a_hub_may_have_is_not(path: str) -> None:
    assert not looks_local(path)
