"""Before the loop: the fluent builder of a run's settings, and their way to and from YAML.

::

    Python calls --.
    nested dict  --+--> AlgorithmConfig --> Settings (frozen sections) --> Algorithm
    YAML         --+          |
    overrides    --'          `--> config.yaml (reruns the run)

All four accept the same sections and names, declared once in ``settings.py``, and check names and types at once.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

import yaml

from rlhf_ray.errors import ConfigError
from rlhf_ray.schedule import Schedule
from rlhf_ray.settings import RewardSpec, Settings
from rlhf_ray.validation import section_types, setting_types, typed_value, validate

if TYPE_CHECKING:
    from rlhf_ray.algorithms.algorithm import Algorithm

__all__ = ["BUILT_IN_ALGORITHMS", "AlgorithmConfig"]

_DEFAULT_ALGORITHM: Final = "PPO"
BUILT_IN_ALGORITHMS: Final[Mapping[str, str]] = {
    "CISPO": "rlhf_ray.algorithms.cispo",
    "DAPO": "rlhf_ray.algorithms.dapo",
    "DrGRPO": "rlhf_ray.algorithms.dr_grpo",
    "GMPO": "rlhf_ray.algorithms.gmpo",
    "GRPO": "rlhf_ray.algorithms.grpo",
    "GSPO": "rlhf_ray.algorithms.gspo",
    "MaxRL": "rlhf_ray.algorithms.maxrl",
    "OPO": "rlhf_ray.algorithms.opo",
    "PPO": "rlhf_ray.algorithms.ppo",
    "RLOO": "rlhf_ray.algorithms.rloo",
    "ReMax": "rlhf_ray.algorithms.remax",
    "ReinforcePP": "rlhf_ray.algorithms.reinforce_pp",
    "ReinforcePPBaseline": "rlhf_ray.algorithms.reinforce_pp",
    "SAPO": "rlhf_ray.algorithms.sapo",
}
"""Name of an algorithm -> the module of its configuration class."""
_registered: dict[str, type[AlgorithmConfig]] = {}


class AlgorithmConfig:
    """A run's settings under construction; subclasses name the algorithm.

    Each section is a method that takes its settings as keyword arguments, changes this config and returns it, so that
    calls chain. ``help(PPOConfig.training)`` lists a section's settings with their defaults and meanings.

    A value may be a Ray Tune search space (``tune.loguniform(...)``, ``tune.grid_search([...])``); such a config goes
    to ``tune.Tuner`` and cannot be built by itself.
    """

    __slots__ = ("_frozen", "_settings")

    algorithm_name: ClassVar[str]
    """Name of the algorithm and of its Trainable; a subclass that sets it is registered under it."""
    defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Where the defaults differ from those of the parent class: section -> setting -> value."""

    def __init__(self) -> None:
        if not hasattr(self, "algorithm_name"):
            raise TypeError(f"{type(self).__name__} names no algorithm; use one that does, such as PPOConfig")
        self._settings = Settings()
        self._frozen = False
        for base in reversed(type(self).__mro__):
            self._set(vars(base).get("defaults", {}))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "algorithm_name" in vars(cls):
            _registered[cls.algorithm_name] = cls

    # The sections; the settings of each are added to signature and docstring below, from settings.py.

    def model(self, **values: Any) -> Self:
        """Set which weights are trained."""
        return self._set({"model": values})

    def data(self, **values: Any) -> Self:
        """Set where prompts come from."""
        return self._set({"data": values})

    def rollouts(self, **values: Any) -> Self:
        """Set how completions are sampled, and on what."""
        return self._set({"rollouts": values})

    def rewards(self, *functions: RewardSpec, **values: Any) -> Self:
        """Set how completions are scored; reward functions may be positional."""
        if functions and "functions" in values:
            remedy = "reward functions are given twice; pass them as positional arguments alone"
            raise ConfigError("rewards.functions", values["functions"], remedy)
        return self._set({"rewards": {"functions": functions, **values} if functions else values})

    def training(self, **values: Any) -> Self:
        """Set the algorithm's numbers."""
        return self._set({"training": values})

    def learners(self, **values: Any) -> Self:
        """Set where and how updates run."""
        return self._set({"learners": values})

    def evaluation(self, **values: Any) -> Self:
        """Set when and how the policy is measured on held-out prompts."""
        return self._set({"evaluation": values})

    def checkpointing(self, **values: Any) -> Self:
        """Set when state is written."""
        return self._set({"checkpointing": values})

    def reporting(self, **values: Any) -> Self:
        """Set where a run is seen."""
        return self._set({"reporting": values})

    def fault_tolerance(self, **values: Any) -> Self:
        """Set what a run survives."""
        return self._set({"fault_tolerance": values})

    def debugging(self, **values: Any) -> Self:
        """Set reproducibility and noise."""
        return self._set({"debugging": values})

    def callbacks(self, **values: Any) -> Self:
        """Set user functions called on the driver."""
        return self._set({"callbacks": values})

    def resources(self, **values: Any) -> Self:
        """Set what a run takes of the cluster."""
        return self._set({"resources": values})

    # Reading and copying.

    @property
    def settings(self) -> Settings:
        """The frozen sections as they stand."""
        return self._settings

    def copy(self) -> Self:
        """Return an unfrozen copy that shares no list or mapping with this config."""
        new = copy.copy(self)
        new._settings = _copied(self._settings)
        new._frozen = False
        return new

    def freeze(self) -> Self:
        """Refuse every later change of this config."""
        self._frozen = True
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Functions and datasets are shared: a deep copy of a dataset or of a model inside a reward serves nobody.
        new = self.copy()
        new._frozen = self._frozen
        return new

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AlgorithmConfig):
            return NotImplemented
        return type(self) is type(other) and self._settings == other._settings

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Show the calls that make this config: only what differs from the defaults."""
        defaults, calls = type(self)()._settings, []
        for section, names in _names().items():
            ours, theirs = getattr(self._settings, section), getattr(defaults, section)
            changed = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
            if changed:
                arguments = ", ".join(f"{name}={_shown(getattr(ours, name))}" for name in changed)
                calls.append(f".{section}({arguments})")
        return f"{type(self).__name__}()" + "".join(calls)

    # Checking and building.

    def validate(self) -> Self:
        """Check every setting and combination without starting anything, and return this config.

        Raises:
            ConfigError: The first thing wrong.
        """
        validate(self._settings)
        return self

    def schedule(self) -> Schedule:
        """Return what a run with these settings does: its sizes and counts.

        Raises:
            ConfigError: The settings are wrong, so there is no such run.
        """
        return Schedule.of(self.validate()._settings)

    @property
    def algorithm_class(self) -> type[Algorithm]:
        """The Trainable of this algorithm; a subclass with its own overrides this."""
        trainables = importlib.import_module("rlhf_ray.algorithms.trainables")
        found: type[Algorithm] = getattr(trainables, self.algorithm_name, None) or trainables.trainable(type(self))
        return found

    def build_algo(self) -> Algorithm:
        """Validate, then start the algorithm with a frozen copy of this config.

        Raises:
            ConfigError: The settings are wrong.
        """
        self.validate()
        return self.algorithm_class(config=self.copy().freeze())

    def build(self) -> Algorithm:
        """Do what :meth:`build_algo` does."""
        return self.build_algo()

    # Dictionaries, YAML and overrides.

    def to_dict(self, *, plain: bool = False) -> dict[str, Any]:
        """Return every setting, nested by section, and the algorithm's name under ``algorithm``.

        Args:
            plain: Whether functions and datasets become text, as in :meth:`to_yaml`. By default they are kept, so
                that ``from_dict`` restores the config exactly, Ray Tune's trials included.
        """
        convert = _plain if plain else _copied_value
        sections = {
            section: {name: convert(getattr(getattr(self._settings, section), name)) for name in names}
            for section, names in _names().items()
        }
        return {"algorithm": self.algorithm_name, **sections}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make a config from nested sections, dotted names (``"training.lr"``), or both; dotted ones win.

        Args:
            values: The settings to change, and optionally ``algorithm``.

        Raises:
            ConfigError: A name is unknown or a value has the wrong type.
        """
        return cls._from(values, from_text=False)

    @classmethod
    def from_yaml(cls, source: str | os.PathLike[str]) -> Self:
        """Make a config from a YAML file, or from YAML text: a string with a line break, or a colon and a space.

        Raises:
            ConfigError: The file is missing, is not YAML, or holds an unknown name or a wrong value.
        """
        return cls._from(_parse(*_text_and_origin(source)), from_text=True)

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return every setting as YAML that reruns the run, and write it to a file where one is named.

        A function that can be imported is written as ``module:function`` (``file.py:function`` for a script); one that
        cannot, such as a closure, becomes a marker that ``from_yaml`` refuses by name. So does a dataset object.
        """
        text: str = yaml.dump(self.to_dict(plain=True), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def apply_overrides(self, overrides: Iterable[str]) -> Self:
        """Set ``section.name=value`` pairs, values in YAML, and return this config; all of them or none.

        Raises:
            ConfigError: A pair is malformed, a name is unknown, or a value has the wrong type.
        """
        return self._set(_nested(dict(_parsed_override(override) for override in overrides)), from_text=True)

    @classmethod
    def _from(cls, values: Mapping[str, Any], *, from_text: bool) -> Self:
        sections = dict(values)
        config_class = cls._class_named(sections.pop("algorithm", None))
        return config_class()._set(_nested(sections), from_text=from_text)

    @classmethod
    def _class_named(cls, name: Any) -> type[Self]:
        own_name = getattr(cls, "algorithm_name", None)
        if own_name is not None and name in (None, own_name):
            return cls
        found = _algorithm_config(_DEFAULT_ALGORITHM if name is None else name)
        if not issubclass(found, cls):
            raise ConfigError(
                "algorithm", name, f"these are not settings of {own_name}; read them with {found.__name__}"
            )
        return found

    def _set(self, sections: Mapping[str, Mapping[str, Any]], *, from_text: bool = False) -> Self:
        if self._frozen:
            field, value = next(_flat(sections), ("settings", None))
            raise ConfigError(field, value, "this config is frozen; change a copy(), which is not")
        settings = self._settings
        for section, values in sections.items():
            settings = _with_values(settings, section, values, from_text)
        self._settings = settings
        return self


# --- names ----------------------------------------------------------------------------------------------------------

_OTHER_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "training.lr": ("actor_lr", "learning_rate", "policy_lr"),
    "training.critic_lr": ("critic_learning_rate", "value_lr", "vf_lr"),
    "training.lr_schedule": ("lr_scheduler_type",),
    "training.lr_warmup_steps": ("num_warmup_steps", "warmup_steps"),
    "training.adam_betas": ("betas",),
    "training.max_grad_norm": ("grad_clip",),
    "training.iterations": ("max_steps", "num_iterations"),
    "training.num_epochs": ("num_ppo_epochs", "num_sgd_iter", "ppo_epochs"),
    "training.num_minibatches": ("mini_batch_size", "minibatch_size", "num_mini_batches"),
    "training.gamma": ("discount",),
    "training.lambda_": ("gae_lambda", "lam", "lambda"),
    "training.clip_low": ("clip_eps", "clip_param", "clip_range", "clip_ratio", "cliprange", "epsilon"),
    "training.clip_high": ("epsilon_high",),
    "training.value_clip": ("cliprange_value", "vf_clip_param"),
    "training.entropy_coef": ("ent_coef", "entropy_coeff"),
    "training.kl_coef": ("beta", "init_kl_coef", "kl_coeff"),
    "training.loss_aggregation": ("loss_type",),
    "data.path": ("dataset", "dataset_name"),
    "data.eval_path": ("eval_dataset",),
    "data.prompt_column": ("prompt_key",),
    "data.batch_size": ("rollout_batch_size", "train_batch_size", "train_batch_size_per_learner"),
    "rollouts.group_size": ("n_samples_per_prompt", "num_generations"),
    "rollouts.max_new_tokens": ("max_completion_length", "max_tokens", "response_length"),
    "rollouts.max_prompt_tokens": ("max_prompt_length",),
    "rollouts.num_replicas": ("num_engines", "num_env_runners"),
    "rollouts.engine_args": ("vllm_args",),
    "rewards.functions": ("reward_funcs",),
    "rewards.weights": ("reward_weights",),
    "learners.max_tokens_per_microbatch": ("micro_batch_size",),
    "learners.num_gpus_per_learner": ("num_gpus_per_worker",),
    "model.path": ("model_name_or_path",),
    "model.dtype": ("torch_dtype",),
    "evaluation.interval": ("eval_steps",),
    "evaluation.at_start": ("eval_on_start", "val_before_train"),
    "evaluation.samples_per_prompt": ("eval_n_samples_per_prompt", "n_samples_per_eval_prompt"),
    "checkpointing.interval": ("save_steps",),
    "checkpointing.keep": ("save_total_limit",),
    "reporting.run_dir": ("output_dir",),
}
"""Setting -> what other libraries call it."""

_SYNONYMS: Final = {other: field for field, others in _OTHER_NAMES.items() for other in others}


def _names() -> dict[str, tuple[str, ...]]:
    return {section: tuple(setting_types(section)) for section in section_types()}


def _with_values(settings: Settings, section: str, values: Mapping[str, Any], from_text: bool) -> Settings:
    names = setting_types(section)
    typed = {}
    for name, value in values.items():
        field = f"{section}.{name}"
        if name not in names:
            raise _unknown_setting(section, name, value)
        typed[name] = typed_value(field, _restored(field, value), from_text=from_text)
    return replace(settings, **{section: replace(getattr(settings, section), **typed)})


def _nested(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Join nested sections and dotted names into sections."""
    nested: dict[str, dict[str, Any]] = {}
    for key, value in sorted(values.items(), key=lambda item: "." in str(item[0])):
        section, dot, name = str(key).partition(".")
        if section not in section_types():
            raise _unknown_section(str(key), section, name, value)
        # A section with nothing in it is what is left when all its lines are commented out.
        if not dot and not isinstance(value, Mapping | None):
            raise ConfigError(section, value, f"give the section's settings by name, such as {section}: {{...}}")
        nested.setdefault(section, {}).update({name: value} if dot else value or {})
    return nested


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    return ((f"{section}.{name}", value) for section, values in sections.items() for name, value in values.items())


def _unknown_section(key: str, section: str, name: str, value: Any) -> ConfigError:
    near = get_close_matches(section, section_types(), n=1)
    if near:
        return ConfigError(key, value, f"no such section; did you mean {near[0]}{'.' if name else ''}{name}?")
    named = [] if name else _settings_called(section)
    if named:
        return ConfigError(key, value, f"no such section; did you mean {' or '.join(named)}?")
    return ConfigError(key, value, f"no such section; there are {', '.join(section_types())}")


def _unknown_setting(section: str, name: str, value: Any) -> ConfigError:
    near = _nearest_settings(section, name)
    names = ", ".join(setting_types(section))
    hint = f"did you mean {' or '.join(near)}?" if near else f"{section} has {names}"
    return ConfigError(f"{section}.{name}", value, f"no such setting; {hint}")


def _nearest_settings(section: str, name: str) -> list[str]:
    synonym = _SYNONYMS.get(name, "")
    if synonym.startswith(f"{section}."):
        return [synonym]
    # A slip of the pen in the right section goes before another section's setting of a remote name.
    close = get_close_matches(name, setting_types(section), n=1, cutoff=0.8)
    if close:
        return [f"{section}.{close[0]}"]
    if called := _settings_called(name):
        return called
    near = get_close_matches(name, setting_types(section), n=1)
    if near:
        return [f"{section}.{near[0]}"]
    everywhere = {candidate: owner for owner, candidates in _names().items() for candidate in candidates}
    return [f"{everywhere[match]}.{match}" for match in get_close_matches(name, everywhere, n=1, cutoff=0.75)]


def _settings_called(name: str) -> list[str]:
    """Return the settings of any section with this very name, or the one it is a synonym of."""
    same = [f"{section}.{name}" for section, names in _names().items() if name in names]
    return same or ([_SYNONYMS[name]] if name in _SYNONYMS else [])


def _algorithm_config(name: Any) -> type[Any]:
    known_name = isinstance(name, str) and (name in _registered or name in BUILT_IN_ALGORITHMS)
    if known_name and name not in _registered:
        importlib.import_module(BUILT_IN_ALGORITHMS[name])
    if not known_name:
        known = sorted({*_registered, *BUILT_IN_ALGORITHMS})
        raise ConfigError("algorithm", name, f"no such algorithm; there is {', '.join(known)}")
    return _registered[name]


# --- values ---------------------------------------------------------------------------------------------------------

_NOT_RESTORABLE: Final = "<not restorable: "
_files: dict[str, ModuleType] = {}


def _copied(settings: Settings) -> Settings:
    sections = {}
    for section, names in _names().items():
        old = getattr(settings, section)
        sections[section] = replace(old, **{name: _copied_value(getattr(old, name)) for name in names})
    return Settings(**sections)


def _copied_value(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied_value(item) for item in value]
    if isinstance(value, dict):
        return {key: _copied_value(item) for key, item in value.items()}
    return value


def _plain(value: Any) -> Any:
    """Return a value in YAML's types; what YAML cannot hold becomes a reference or a marker."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    from rlhf_ray.rewards.reward_model.reward import RewardModelReward

    if isinstance(value, RewardModelReward):
        return value.to_spec()
    return _reference(value) or f"{_NOT_RESTORABLE}{_display_name(value)}>"


def _reference(function: Any) -> str | None:
    """Return ``module:function`` or ``file.py:function`` where importing that gives this very object."""
    module_name, name = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    module = sys.modules.get(module_name) or _files.get(module_name) if isinstance(module_name, str) else None
    if module is None or name is None or _attribute(module, name) is not function:
        return None
    if module_name != "__main__":
        return f"{module_name}:{name}"
    if module.__spec__ is not None:
        return f"{module.__spec__.name}:{name}"
    script = getattr(module, "__file__", None)
    return f"{Path(script).resolve()}:{name}" if script and script.endswith(".py") else None


def _restored(field: str, value: Any) -> Any:
    """Return a value as it was before :meth:`AlgorithmConfig.to_yaml`, where that can be known."""
    for item in _texts_in(value):
        if item.startswith(_NOT_RESTORABLE):
            section, _, setting = field.partition(".")
            name = item.removeprefix(_NOT_RESTORABLE).removesuffix(">")
            call = f".{section}({name if setting == 'functions' else f'{setting}=...'})"
            raise ConfigError(
                field, item, f"a file cannot hold {name}; delete this line and pass it in Python ({call})"
            )
    if field.startswith("callbacks.") and isinstance(value, str):
        return _imported(field, value)
    return value


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts_in(item)


def _imported(field: str, reference: str) -> Any:
    origin, colon, name = reference.rpartition(":")
    if not colon or not origin or not name:
        raise ConfigError(field, reference, "write 'module:function' or 'file.py:function'")
    try:
        module = _module_at(Path(origin)) if origin.endswith(".py") else importlib.import_module(origin)
    except Exception as error:  # A user's module may raise anything when it is imported.
        raise ConfigError(field, reference, f"importing {origin} raised {type(error).__name__}: {error}") from error
    found = _attribute(module, name)
    if found is None:
        raise ConfigError(field, reference, f"{origin} has no {name}")
    return found


def _module_at(path: Path) -> ModuleType:
    """Import a file under its own path, once."""
    name = str(path.expanduser().resolve())
    if name not in _files:
        spec = importlib.util.spec_from_file_location(name, name)
        if spec is None or spec.loader is None:
            raise ImportError(f"{name} is not Python")
        module = importlib.util.module_from_spec(spec)
        # Dataclasses look their module up while it runs. It must not stay: what cloudpickle finds there travels by
        # reference, and no other process could import it.
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        finally:
            del sys.modules[name]
        _files[name] = module
    return _files[name]


def _attribute(module: Any, qualified_name: str) -> Any:
    for name in qualified_name.split("."):
        module = getattr(module, name, None)
    return module


def _display_name(value: Any) -> str:
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(_shown(item) for item in value)}]"
    if value is None or isinstance(value, (bool, int, float, str, tuple, dict)):
        return repr(value)
    return f"<{_display_name(value)}>"


# --- YAML -----------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-6 is a number and a name given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and keys.count(key.value) > 1]
        if twice:
            # PyYAML would keep the last one silently.
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice[-1].value} is given twice", twice[-1].start_mark
            )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML in which the text 1e-6 is quoted, as it must be for :class:`_Loader`."""


# YAML 1.1, PyYAML's version, reads a number with an exponent and no point as text; YAML 1.2 does not.
_EXPONENT_FORM = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT_FORM, list("-+.0123456789"))


def _text_and_origin(source: str | os.PathLike[str]) -> tuple[str, str]:
    if isinstance(source, str) and ("\n" in source or ": " in source):
        return source, "the text"
    try:
        return Path(source).expanduser().read_text(encoding="utf-8"), os.fspath(source)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ConfigError("config", os.fspath(source), f"cannot read this file: {reason}") from error


def _parse(text: str, origin: str) -> Mapping[str, Any]:
    values = _load(text, "config", origin)
    if not isinstance(values, Mapping | None):
        raise ConfigError("config", origin, "write sections and their settings, such as training: {lr: 2e-6}")
    return values or {}


def _parsed_override(override: str) -> tuple[str, Any]:
    field, equals, text = override.partition("=")
    if not equals or not text.strip() or not re.fullmatch(r"\w+\.\w+", field):
        remedy = "write section.name=value, such as training.lr=2e-6 (null for none)"
        raise ConfigError(field or "override", override, remedy)
    if (comment := _comment(text)) is not None:
        raise ConfigError(
            field, text, f"YAML takes {comment!r} for a comment; put text with a # in {_quoted(override)}"
        )
    return field, _load(text, field, text)


def _comment(text: str) -> str | None:
    """The first comment of a YAML text, which would be cut off without a word; ``None`` where it has none."""
    try:
        tokens = list(yaml.scan(text, Loader=_Loader))
    except yaml.YAMLError:
        return None  # What is wrong is told where it is parsed.
    # Between tokens lie spaces, line breaks and comments, and nothing else.
    between = (text[one.end_mark.index : next_one.start_mark.index] for one, next_one in itertools.pairwise(tokens))
    return next((gap.strip() for gap in between if "#" in gap), None)


def _quoted(override: str) -> str:
    """How to write an override whose text has a #, for a shell; a list or mapping cannot be quoted as a whole."""
    field, _, text = override.partition("=")
    if text.lstrip().startswith(("[", "{", "'", '"')):
        return "quotes of its own"
    return f"quotes of its own: {shlex.quote(f'{field}={json.dumps(text, ensure_ascii=False)}')}"


def _load(text: str, field: str, shown: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        # ValueError: a date that does not exist.
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
        raise ConfigError(field, shown, f"not valid YAML: {where}{problem or error}") from error


# --- help -----------------------------------------------------------------------------------------------------------


def _document_section(section: str) -> None:
    """Give a section's method the signature and the list of settings that ``settings.py`` declares."""
    method: Any = vars(AlgorithmConfig)[section]
    section_type: Any = section_types()[section]
    settings: tuple[Field[Any], ...] = fields(section_type)
    lines = [f"    {item.name}: {item.metadata['meaning']}. Default: {_default(item)!r}." for item in settings]
    raises = "Raises:\n    ConfigError: A name is unknown, a value has the wrong type, or this config is frozen."
    method.__doc__ = "\n".join([method.__doc__, "", "Args:", *lines, "", raises])
    written = [item for item in inspect.signature(method).parameters.values() if item.kind is not item.VAR_KEYWORD]
    taken = {item.name for item in written}
    named = [
        inspect.Parameter(item.name, inspect.Parameter.KEYWORD_ONLY, default=_default(item), annotation=item.type)
        for item in settings
        if item.name not in taken
    ]
    method.__signature__ = inspect.Signature([*written, *named], return_annotation="Self")


def _default(item: Field[Any]) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()


for _section in section_types():
    _document_section(_section)
