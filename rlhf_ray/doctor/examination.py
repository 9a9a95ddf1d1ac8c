"""Before a run: the doctor's checks in order, each as far as what the ones before found allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf_ray.algorithm.run_plan import choose_device
from rlhf_ray.config.local_path import absolute_if_local
from rlhf_ray.config.plugins import advantage_plugin
from rlhf_ray.config.settings import Settings
from rlhf_ray.doctor.check import Check, Status, failed, passed, warned
from rlhf_ray.doctor.cluster import check_ray
from rlhf_ray.doctor.machine import Machine, check_cores, check_gpus, check_open_files, check_shared_memory
from rlhf_ray.doctor.memory import MemoryNeed, check_disk, check_memory
from rlhf_ray.doctor.model import ModelFacts, check_model
from rlhf_ray.doctor.packages import check_packages, check_python, check_torchvision
from rlhf_ray.errors import ConfigError, DataError
from rlhf_ray.rollouts.engine import EngineSpec
from rlhf_ray.types import Device

__all__ = ["checks", "examine", "table"]

_STYLES: dict[Status, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


def examine(settings: Settings, *, console: Console, skip_engine: bool = False) -> int:
    """Run every check and print what was found.

    Args:
        settings: Validated settings of the run to come.
        console: Where to print.
        skip_engine: Whether to leave out the start of a vLLM engine.

    Returns:
        0 if nothing failed, else 1.
    """
    found = []
    with console.status("looking around") as status:
        for check in checks(settings, skip_engine=skip_engine, say=status.update):
            found.append(check)
    console.print(table(found))
    failures = sum(check.status == "fail" for check in found)
    warnings = sum(check.status == "warn" for check in found)
    verdict = f"{failures} failed, {warnings} to look at" if failures or warnings else "all well"
    console.print(verdict, style=_STYLES["fail" if failures else "warn" if warnings else "ok"], highlight=False)
    return 1 if failures else 0


def checks(settings: Settings, *, skip_engine: bool, say: Callable[[str], None] = lambda text: None) -> Iterator[Check]:
    """Run the checks one after the other.

    Args:
        settings: Validated settings of the run to come.
        skip_engine: Whether to leave out the start of a vLLM engine.
        say: Told before each slow check what it is.
    """
    say("looking at packages and machine")
    yield check_python()
    yield from check_packages()
    yield check_torchvision()
    machine = Machine.here()
    yield check_cores(machine)
    yield check_open_files(machine)
    yield check_gpus(settings, machine, torch_sees=_torch_gpus())
    device = choose_device(settings, len(machine.gpus))
    say("starting Ray")
    yield check_ray(settings)
    say("reading the model")
    policy_check, policy = _policy(settings)
    yield policy_check
    training = settings.training
    has_critic = advantage_plugin(training.advantage, training.advantage_args).needs_critic
    critic = policy if has_critic else None
    if settings.model.critic_path is not None:
        critic_check, critic = check_model(
            "model.critic_path", settings.model.critic_path, trust_remote_code=settings.model.trust_remote_code
        )
        yield critic_check
    if policy is None or (has_critic and critic is None):
        yield warned("memory, engine", "not looked at without the model", "correct the model first")
        return
    yield from _with_models(settings, machine, policy, critic, device=device, skip_engine=skip_engine, say=say)


def table(found: list[Check]) -> Table:
    """Lay the checks out; a remedy stands below its finding."""
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    grid.add_column(no_wrap=True, style="cyan")
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for check in found:
        text = Text(check.detail)
        if check.remedy:
            text.append(f"\n-> {check.remedy}", style="bold")
        grid.add_row(Text(check.name), Text(check.status, style=_STYLES[check.status]), text)
    return grid


def _with_models(
    settings: Settings,
    machine: Machine,
    policy: ModelFacts,
    critic: ModelFacts | None,
    *,
    device: Device,
    skip_engine: bool,
    say: Callable[[str], None],
) -> Iterator[Check]:
    yield _inputs(settings)
    yield check_disk(settings, policy, critic)
    yield check_shared_memory(machine, 4 * policy.num_parameters)
    try:
        spec, max_tokens = _engine_spec(settings, policy, device)
    except ConfigError as error:
        yield failed(error.field, repr(error.value), error.remedy)
        return
    need = MemoryNeed.of(
        settings,
        policy,
        critic,
        dtype_bytes=2 if spec.engine_args["dtype"] == "bfloat16" else 4,
        max_tokens=max_tokens,
        cpu_cache=spec.engine_args.get("kv_cache_memory_bytes") or 0,
    )
    yield from check_memory(settings, machine, need, on_gpu=device.on_gpu, colocated=device.colocated)
    if not skip_engine:
        from rlhf_ray.doctor.engine import check_engine

        say("starting a vLLM engine, which takes half a minute or more")
        yield check_engine(spec, timeout_s=settings.rollouts.startup_timeout_s)


def _policy(settings: Settings) -> tuple[Check, ModelFacts | None]:
    from rlhf_ray.quickstart import model_path

    model = settings.model
    path = model.path or model_path()
    return check_model(
        "model.path",
        path,
        tokenizer_path=model.tokenizer_path or path,
        trust_remote_code=model.trust_remote_code,
    )


def _inputs(settings: Settings) -> Check:
    """Look at what the run itself looks at before it starts anything: rewards, lengths and datasets."""
    from rlhf_ray.algorithm.inputs import check_inputs

    try:
        check_inputs(settings)
    except ConfigError as error:
        return failed(error.field, repr(error.value), error.remedy)
    except DataError as error:
        return failed("data", str(error), "correct the data, or the section that names it")
    return passed("data, rewards", "can be read")


def _engine_spec(settings: Settings, policy: ModelFacts, device: Device) -> tuple[EngineSpec, int]:
    """Make what a replica of this run would be given, and its longest sequence in tokens."""
    from rlhf_ray.rollouts.engine_spec import engine_spec, longest_completion, max_prompt_tokens

    rollouts, evaluation = settings.rollouts, settings.evaluation
    prompt_tokens = max_prompt_tokens(rollouts, evaluation, policy.config)
    spec = engine_spec(
        settings,
        device,
        model_path=policy.path,
        tokenizer_path=absolute_if_local(settings.model.tokenizer_path or policy.path),
        config=policy.config,
        eos_token_ids=(),  # The engine is asked for a fixed number of tokens.
        prompt_tokens=prompt_tokens,
    )
    return spec, prompt_tokens + longest_completion(rollouts, evaluation)[1]


def _torch_gpus() -> int:
    import torch

    return int(torch.cuda.device_count())
