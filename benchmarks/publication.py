"""Weight publication on CPUs: about 100 MB to two replicas, idle and in the middle of generation.

One learner gathers a float32 model of 26 million parameters into the object store and two vLLM replicas load it, which
is what follows every update. The same is done while the engines have nothing to do, where the pause is the load itself,
and while both write long completions.

    python benchmarks/publication.py [--repeats 15]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from provenance import write_result

from rlhf_ray import GRPOConfig
from rlhf_ray.quickstart import model_path

WARM_UP = 5
"""WeightSyncScheduler until the object store and the engines have touched all the memory that they use in turn."""


def write_model(folder: Path) -> None:
    """A larger model of the quickstart's kind, with random weights and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(
        model_path(),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        layer_types=["full_attention"] * 8,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder)


def publish(algorithm: Any, repeats: int) -> list[dict[str, float]]:
    """Publish the same version again and again."""
    publisher, figures = algorithm._running().weight_sync._publisher, []
    for _ in range(repeats):
        started = time.perf_counter()
        deliver = publisher.gather(0)
        gathered = time.perf_counter()
        publication = deliver()
        figures.append(
            {
                "gather_s": gathered - started,
                "publication_s": publication.publication_s,
                "pause_s": publication.pause_s,
                "gb_per_s": publication.size_bytes / 1e9 / publication.publication_s,
                "size_mb": publication.size_bytes / 1e6,
            }
        )
        time.sleep(0.5)
    return figures


def medians(figures: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure, without the first publications."""
    return {name: statistics.median(one[name] for one in figures[WARM_UP:]) for name in figures[0]}


def main() -> None:
    """Measure, print, write results/publication.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = WARM_UP + parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder / "model")
        algorithm = (
            GRPOConfig()
            .model(path=str(folder / "model"))
            .data(batch_size=16)
            .rollouts(num_replicas=2, group_size=4, max_new_tokens=1000, max_staleness=8)
            .training(lr=2e-4, lr_schedule="linear")
            .learners(max_tokens_per_microbatch=4096, gradient_checkpointing=False)
            .reporting(run_dir=str(folder / "run"), progress="off", tensorboard=False)
            .build()
        )
        controller = algorithm._running().controller
        try:
            idle = medians(publish(algorithm, repeats))
            writing = threading.Thread(target=_collect, args=(controller,), daemon=True)
            writing.start()
            time.sleep(3.0)
            busy = medians(publish(algorithm, repeats))
            if not writing.is_alive():
                raise RuntimeError("the replicas had written everything before the last publication")
        finally:
            algorithm.stop()
    for name, figures in (("idle", idle), ("generating", busy)):
        print(name, {key: round(value, 3) for key, value in figures.items()})
    ratio = busy["pause_s"] / idle["pause_s"]
    print(f"pause while generating / load itself: {ratio:.2f}")
    print("written to", write_result("publication", {"idle": idle, "generating": busy, "pause_ratio": ratio}))


def _collect(controller: Any) -> None:
    try:
        controller.collect(0)
    except BaseException:  # stop() ends it
        return


if __name__ == "__main__":
    main()
