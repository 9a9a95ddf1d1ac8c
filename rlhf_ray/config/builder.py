"""The fluent builder of a run's settings, and their way to and from YAML.

::

    Python calls --.
    nested dict  --+--> AlgorithmConfig --> Settings (frozen sections) --> Algorithm
    YAML         --+          |
    overrides    --'          `--> config.yaml (reruns the run)

All four accept the same sections and names, declared once in ``settings.py``, and check names and types at once.

A setting has the value of the last of these layers that has one:

1. the default in ``settings.py``, that of a language model;
2. the quickstart's preset, where the layers below name neither ``model.path`` nor ``data.path``: all of it or nothing;
3. ``defaults`` of the algorithm's class;
4. what was given.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from rlhf_ray.config.checks import validate
from rlhf_ray.config.names import is_known, missing_attribute, named_settings, with_todays_names
from rlhf_ray.config.nested import nested
from rlhf_ray.config.plain_values import copied, plain_value, shown_value
from rlhf_ray.config.schedule import Schedule
from rlhf_ray.config.settings import RewardSpec, Settings, declaration, quickstart_preset, section_types, setting_types
from rlhf_ray.config.user_code import identity, load_reference, reference_to
from rlhf_ray.config.values import typed_value
from rlhf_ray.config.yaml_text import parsed_override, parsed_sections, yaml_text
from rlhf_ray.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_ray.algorithm.algorithm import Algorithm

__all__ = ["ALGORITHMS", "AlgorithmConfig", "document_sections"]


def document_sections(config_class: type[Any]) -> None:
    """Give each section's method the signature and the list of its settings."""
    for section in section_types():
        _document(vars(config_class)[section], section)


def _document(method: Any, section: str) -> None:
    parameters = dict(inspect.signature(method).parameters)
    parameters.pop("values")
    defaults, lines = Settings(), []
    for name, annotation in setting_types(section).items():
        field = f"{section}.{name}"
        declared, default = declaration(field).metadata, defaults[field]
        quickstart = f", quickstart {declared['quickstart']!r}" if "quickstart" in declared else ""
        lines.append(f"    {name}: {declared['meaning']}. Default: {default!r}{quickstart}.")
        keyword = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        parameters.setdefault(name, keyword)
    raises = "Raises:\n    ConfigError: A name is unknown, a value has the wrong type, or this config is frozen."
    method.__doc__ = "\n".join([method.__doc__, "", "Args:", *lines, "", raises])
    method.__signature__ = inspect.Signature([*parameters.values()], return_annotation="Self")


_DEFAULT_ALGORITHM: Final = "PPO"

ALGORITHMS: Final[dict[str, type[AlgorithmConfig]]] = {}

"""Name of an algorithm -> its configuration class. A class registers itself when it is defined."""

_Sections = Mapping[str, Mapping[str, Any]]


class AlgorithmConfig:
    """A run's settings under construction; subclasses name the algorithm.

    Each section is a method that takes its settings as keyword arguments, changes this config and returns it, so that
    calls chain. ``help(PPOConfig.training)`` lists a section's settings with their defaults and meanings.

    A value may be a Ray Tune search space (``tune.loguniform(...)``, ``tune.grid_search([...])``); such a config goes
    to ``tune.Tuner`` and cannot be built by itself.
    """

    __slots__ = ("_frozen", "_given", "_settings")

    algorithm_name: ClassVar[str]
    """Name of the algorithm and of its Trainable; a subclass that sets it is registered under it.

    This is all that makes an algorithm, of the library's own in ``rlhf_ray/algorithms/`` and of a user's.
    """
    defaults: ClassVar[_Sections] = {}
    """Where the defaults differ from those of the parent class: section -> setting -> value."""

    def __init__(self) -> None:
        if not hasattr(self, "algorithm_name"):
            raise TypeError(f"{type(self).__name__} names no algorithm; use one that does, such as PPOConfig")
        self._given: dict[str, Any] = {}
        self._settings = self._resolved(self._given)
        self._frozen = False

    if not TYPE_CHECKING:  # A type checker would take every attribute for one that exists.

        def __getattr__(self, name: str) -> Any:
            raise missing_attribute(type(self).__name__, name)

        def __setattr__(self, name: str, value: Any) -> None:
            # A subclass without slots takes any attribute; one that is named like a setting would change nothing.
            if is_known(name):
                raise missing_attribute(type(self).__name__, name)
            super().__setattr__(name, value)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "algorithm_name" in vars(cls):
            taken = ALGORITHMS.setdefault(cls.algorithm_name, cls)
            if identity(taken) != identity(cls):
                remedy = f"this is the name of {taken.__module__}.{taken.__qualname__}; choose another one"
                raise ConfigError("algorithm_name", cls.algorithm_name, remedy)
            ALGORITHMS[cls.algorithm_name] = cls  # Its module was run again, as notebooks do.

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

    def environment(self, *name: Any, **values: Any) -> Self:
        """Set what answers the policy, turn by turn; the environment may be positional."""
        if len(name) > 1 or (name and "name" in values):
            remedy = "one environment is given by position; several by name: {guess: Guess, shop: Shop}, with column"
            raise ConfigError("environment.name", list(name), remedy)
        return self._set({"environment": {"name": name[0], **values} if name else values})

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
        """Set where a run is reported."""
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
        """Set what a run uses of the cluster."""
        return self._set({"resources": values})

    # Reading and copying.

    @property
    def settings(self) -> Settings:
        """The frozen sections, every layer of values resolved."""
        return self._settings

    @property
    def quickstart_values(self) -> dict[str, Any]:
        """What is taken from the quickstart's preset, by dotted name; empty where a model or data is named."""
        chosen = {**self._class_defaults(), **self._given}
        return {field: value for field, value in self._preset().items() if field not in chosen}

    def copy(self) -> Self:
        """Return an unfrozen copy that shares no list or mapping with this config."""
        new = copy.copy(self)
        new._given = copied(self._given)
        new._settings = new._resolved(new._given)
        new._frozen = False
        return new

    def freeze(self) -> Self:
        """Refuse every later change of this config."""
        self._frozen = True
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Functions and datasets are shared: a deep copy of a dataset or of a model inside a reward is of no use.
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
        defaults = dict(self._resolved({}))
        changed = {field: value for field, value in self._settings if value != defaults[field]}
        shown = type(self).__name__ + "()"
        for section, values in nested(changed).items():
            shown += f".{section}({', '.join(f'{name}={shown_value(value)}' for name, value in values.items())})"
        return shown

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
        return Schedule(self.validate()._settings)

    @property
    def algorithm_class(self) -> type[Algorithm]:
        """The Trainable of this algorithm; a subclass with its own overrides this."""
        # Not above: configurations are read without Ray, and what runs them imports them.
        trainables = importlib.import_module("rlhf_ray.tune.trainables")
        made: type[Algorithm] = trainables.trainable(ALGORITHMS.get(self.algorithm_name, type(self)))
        return made

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
        convert = plain_value if plain else copied
        name = self._written_name() if plain else self.algorithm_name
        return {"algorithm": name, **nested({field: convert(value) for field, value in self._settings})}

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
    def from_yaml(cls, source: str | os.PathLike[str], *, algorithm: str | None = None) -> Self:
        """Make a config from a YAML file, or from YAML text: a string with a line break, or a colon and a space.

        Args:
            source: The file or the text.
            algorithm: Name of the algorithm, in place of the one that the source names.

        Raises:
            ConfigError: The file is missing, is not YAML, or holds an unknown name or a wrong value; or it holds all
                that makes up another algorithm than the one that is asked for.
        """
        sections = with_todays_names(parsed_sections(source))
        config = cls._from({**sections, "algorithm": algorithm or sections.get("algorithm")}, from_text=True)
        if algorithm is not None:
            config._check_is_not(_algorithm_config(sections.get("algorithm")))
        return config

    def to_yaml(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return every setting as YAML that reruns the run, and write it to a file where one is named.

        A function that can be imported is written as ``module:function`` (``file.py:function`` for a script), and so
        is the class of a user's algorithm; a function that cannot, such as a closure, becomes a marker that
        ``from_yaml`` refuses by name. So does a dataset object.
        """
        text = yaml_text(self.to_dict(plain=True))
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def apply_overrides(self, overrides: Iterable[str]) -> Self:
        """Set ``section.name=value`` pairs, values in YAML, and return this config; all of them or none.

        Raises:
            ConfigError: A pair is malformed, a name is unknown, or a value has the wrong type; or ``algorithm=NAME``
                names another algorithm than this config's.
        """
        values = dict(parsed_override(override) for override in overrides)
        name = values.pop("algorithm", self.algorithm_name)
        if name != self.algorithm_name and type(self) is not (found := _algorithm_config(name)):
            remedy = f"this is a config of {self.algorithm_name}; start from {found.__name__}()"
            raise ConfigError("algorithm", name, remedy)
        return self._set(values, from_text=True)

    def _written_name(self) -> str:
        """The algorithm as a process that imports nothing but the library can find it, where there is such a name."""
        is_of_user = "algorithm_name" in vars(type(self)) and not type(self).__module__.startswith("rlhf_ray.")
        return (is_of_user and reference_to(type(self))) or self.algorithm_name

    @classmethod
    def _from(cls, values: Mapping[str, Any], *, from_text: bool) -> Self:
        sections = dict(values)
        config_class = cls._class_named(sections.pop("algorithm", None))
        return config_class()._set(sections, from_text=from_text)

    @classmethod
    def _class_named(cls, name: Any) -> type[Self]:
        own_name = getattr(cls, "algorithm_name", None)
        if own_name is not None and name in (None, own_name, reference_to(cls)):
            return cls
        try:
            found = _algorithm_config(name)
        except ConfigError:
            # Its file or module may be elsewhere by now, which does not matter where the class is at hand.
            if own_name is None or ":" not in str(name) or name.rpartition(":")[2] != cls.__qualname__:
                raise
            return cls
        if not issubclass(found, cls):
            remedy = f"these are not settings of {own_name}; read them with {found.__name__}"
            raise ConfigError("algorithm", name, remedy)
        return found

    def _set(self, values: Mapping[str, Any], *, from_text: bool = False) -> Self:
        named = named_settings(values)
        if self._frozen:
            field, value = next(iter(named.items()), ("settings", None))
            raise ConfigError(field, value, "this config is frozen; change a copy(), which is not")
        self._given = {**self._given, **_typed(named, from_text)}
        self._settings = self._resolved(self._given)
        return self

    def _resolved(self, given: Mapping[str, Any]) -> Settings:
        return Settings.of({**self._preset(), **self._class_defaults(), **given})

    def _preset(self) -> Mapping[str, Any]:
        named = {**self._class_defaults(), **self._given}
        return quickstart_preset() if named.get("model.path") is None and named.get("data.path") is None else {}

    def _check_is_not(self, other: type[AlgorithmConfig]) -> None:
        """Refuse settings that are another algorithm's in all but name, as a run's config.yaml holds them."""
        if other is type(self):
            return
        defaults, given = self._resolved({}), self._given
        made_of = {**other._class_defaults(), **self._class_defaults()}
        differing = [field for field in made_of if field in given and given[field] != defaults[field]]
        if differing and made_of.keys() <= given.keys():
            field = differing[0]
            remedy = (
                f"the file sets {field} to {given[field]!r} and all else that makes up {other.algorithm_name}; "
                f"leave out its lines of {', '.join(made_of)}"
            )
            raise ConfigError("algorithm", self.algorithm_name, remedy)

    @classmethod
    def _class_defaults(cls) -> dict[str, Any]:
        defaults: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            defaults |= _typed(named_settings(vars(base).get("defaults", {})), from_text=False)
        return defaults


def _typed(named: Mapping[str, Any], from_text: bool) -> dict[str, Any]:
    return {field: typed_value(field, value, from_text=from_text) for field, value in named.items()}


def _algorithm_config(name: Any) -> type[Any]:
    """The configuration class that ``algorithm`` names: one that is registered, or ``module:Class``."""
    if name is None:
        name = _DEFAULT_ALGORITHM
    if isinstance(name, str) and ":" in name:
        found = load_reference(name, field="algorithm", value=name)
        if not (isinstance(found, type) and issubclass(found, AlgorithmConfig) and hasattr(found, "algorithm_name")):
            raise ConfigError("algorithm", name, "must be a subclass of AlgorithmConfig with an algorithm_name")
        return found
    if not isinstance(name, str) or name not in ALGORITHMS:
        meant = next((f"did you mean {one}? " for one in ALGORITHMS if one.lower() == str(name).lower()), "")
        known = f"there is {', '.join(sorted(ALGORITHMS))} (your own: 'module:Class' or 'file.py:Class')"
        raise ConfigError("algorithm", name, f"no such algorithm; {meant}{known}")
    return ALGORITHMS[name]


document_sections(AlgorithmConfig)
