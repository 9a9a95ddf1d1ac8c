from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

PARENT = """
    import multiprocessing, sys, time
    from rlhf_ray.weight_sync.engine_process import end_with_parent

    def engine():
        end_with_parent()
        print("up", flush=True)
        time.sleep(600)

    if __name__ == "__main__":
        end_with_parent()
        multiprocessing.get_context(sys.argv[1]).Process(target=engine).start()
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_an_engine_ends_with_a_replica_that_is_killed(method: str, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(textwrap.dedent(PARENT))
    parent = subprocess.Popen([sys.executable, script, method], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "up\n"
    engines = psutil.Process(parent.pid).children(recursive=True)

    parent.kill()
    parent.wait()

    _, left = psutil.wait_procs(engines, timeout=30)
    assert left == []
