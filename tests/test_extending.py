"""docs/extending.md: what each section shows is all that has to be written."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
# What uses the setting that is added.
SHAPED = """
import numpy as np
from rlhf_ray.config.settings import RewardSettings
from rlhf_ray.learner.batch import SequenceBatch
from rlhf_ray.rewards.shaping import shaped

batch = SequenceBatch.single_turn(
    token_ids=np.zeros(8, dtype=np.int32), prompt_lengths=np.array([1, 1]), completion_lengths=np.array([3, 3]),
    rewards=np.array([1, 1], dtype=np.float32), truncated=np.array([True, False]), group_ids=np.array([0, 0]),
)
for penalty, rewards in ((0.0, [1.0, 1.0]), (0.25, [1.5, 2.0])):
    settings = RewardSettings(truncated_penalty=penalty, scale=2.0)
    assert shaped(batch, settings, mask_truncated=False).rewards.tolist() == (rewards if penalty else [2.0, 2.0])
"""


class Section(NamedTuple):
    title: str
    blocks: list[tuple[str, str]]

    def all_of(self, language: str) -> list[str]:
        return [text for kind, text in self.blocks if kind == language]

    def __str__(self) -> str:
        return self.title


SECTIONS = [
    Section(title, re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    for title, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
]


def run(code: str, *, folder: Path, package: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), str(folder)])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_page_has_a_section_for_each_kind_of_part() -> None:
    assert [section.title for section in SECTIONS] == [
        "A loss",
        "An advantage",
        "A rollouter",
        "A reporter",
        "A setting",
    ]


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)", PAGE.read_text())
    assert [target for target in targets if not (PAGE.parent / target).exists()] == []


@pytest.mark.parametrize("section", SECTIONS, ids=str)
def test_what_a_section_shows_is_all_that_has_to_be_written(section: Section, tmp_path: Path) -> None:
    package, folder = ROOT, tmp_path / "mine"
    folder.mkdir()
    if diffs := section.all_of("diff"):
        package = tmp_path / "package"
        shutil.copytree(ROOT / "rlhf_ray", package / "rlhf_ray", ignore=shutil.ignore_patterns("__pycache__", "assets"))
        for diff in diffs:
            subprocess.run(["git", "apply", "-"], cwd=package, input=diff, text=True, check=True, capture_output=True)
    checks = []
    for code in section.all_of("python"):
        name = re.match(r"# (\w+\.py)\n", code)
        if name is None:
            checks.append(code)
        else:
            (folder / name[1]).write_text(code)
    for text in section.all_of("yaml"):
        checks.append(f"from rlhf_ray import AlgorithmConfig\nAlgorithmConfig.from_yaml({text!r}).validate()")
    if section.title == "A setting":
        checks.append(SHAPED)
    assert checks
    run("\n".join(checks), folder=folder, package=package)
