from __future__ import annotations

import subprocess
import sys

import pytest

from rlhf_ray import cli

BACKENDS = ("local", "ray", "slurm")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_says_what_it_does_and_takes(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["launch", backend, "--help"])

    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("SCRIPT_OR_CONF", "--config FILE", "--env NAME=VALUE"))


def test_the_backends_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["launch", "--help"])

    text = capsys.readouterr().out
    assert all(f"    {backend} " in text for backend in BACKENDS)


@pytest.mark.parametrize("argv", [["launch"], ["launch", "kubernetes"], ["launch", "local", "a.yaml", "b.yaml"]])
def test_a_wrong_command_line_exits_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(argv)

    assert end.value.code == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("words", [["--help"], ["missing.yaml"]], ids=["help", "mistake"])
def test_the_module_is_the_same_command_and_answers_at_once(backend: str, words: list[str]) -> None:
    script = f"""
import runpy, sys
sys.argv = ["launcher", *{words!r}]
try:
    runpy.run_module("rlhf_ray.launchers.{backend}", run_name="__main__")
except SystemExit as end:
    code = end.code
assert code == {0 if words == ["--help"] else 2}, code
heavy = {{"ray", "torch", "vllm", "transformers", "numpy", "aiohttp"}} & sys.modules.keys()
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    said = done.stdout if words == ["--help"] else done.stderr
    assert ("usage: rlhf-ray launch" if words == ["--help"] else "no such file") in said
