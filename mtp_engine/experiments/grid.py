"""What an experiment runs: the product of settings, as cases that describe themselves."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, final

from mtp_engine.config import DEFAULT_MODEL, EngineConfig, SamplingParams, TreeShape
from mtp_engine.config.checks import check_types
from mtp_engine.errors import EngineError
from mtp_engine.hub.files import read_toml

_CHOICES = {"drafter": ("mtp", "ngram", "root"), "mode": ("run", "record")}


@final
@dataclass(frozen=True)
class Case:
    """One setting and its prompts. The text of a prompt depends on seed + its index in the set and on nothing of its
    company.

    mode: run decodes for real; record decodes plainly and notes what the drafter would have drafted everywhere (`ask`).
    engine: ours, or openai:URL. tree: as text, "" is what suits device and drafter. mtp: a folder of other layers, or "".
    limit, longest: how many prompts (0: all), and of how many tokens at most. See EngineConfig and SamplingParams for the
    others; batch is max_batch.
    """

    model: str = DEFAULT_MODEL
    mtp: str = ""
    engine: str = "ours"
    mode: str = "run"
    drafter: str = "mtp"
    tree: str = ""
    verifier: str = "match"
    candidates: str = "auto"
    temperature: float = 0.0
    draft_vocab: int = 16384
    batch: int = 8
    prompts: str = "builtin"
    dtype: str = "auto"
    draft_int8: bool = False
    limit: int = 0
    longest: int = 500
    max_tokens: int = 128
    seed: int = 0
    threads: int = 0
    max_context: int = 0
    allow_lossy: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise EngineError(f"{name} is {getattr(self, name)!r}; one of {', '.join(choices)}")
        if self.engine != "ours" and not self.engine.startswith("openai:http"):
            raise EngineError(f"engine is {self.engine!r}; ours, or openai:URL such as openai:http://localhost:8000/v1")
        if self.limit < 0 or self.longest < 1:
            raise EngineError(f"limit is {self.limit} and longest {self.longest}; at least 0 and 1")
        if self.mode == "record" and (self.drafter, self.engine) != ("mtp", "ours"):
            raise EngineError(
                "only our engine's MTP layers are recorded: mode record needs drafter mtp and engine ours"
            )
        self.params(0)
        self.config("cpu")

    @property
    def id(self) -> str:
        """A name that says what it is made of, and nothing else does."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def plain(self) -> bool:
        """Whether it is plain decoding, of which the speed is all there is to know."""
        return self.drafter == "root" and self.engine == "ours"

    @property
    def label(self) -> str:
        """For people: what was drafted and how."""
        if self.engine != "ours":
            return f"{self.engine} T={self.temperature:g}"
        parts = [self.drafter if self.drafter != "mtp" else "", "" if self.drafter == "root" else self.tree or "auto"]
        parts += [
            self.verifier if self.verifier != "match" else "",
            self.candidates if self.candidates != "auto" else "",
        ]
        return " ".join(part for part in [*parts, f"T={self.temperature:g}"] if part)

    def config(self, device: str) -> EngineConfig:
        """How the engine runs it."""
        names = {field.name for field in fields(EngineConfig)} & {field.name for field in fields(Case)} - {
            "tree",
            "max_context",
        }
        tree = self.tree or (
            "tree:7" if self.mode == "record" else ""
        )  # any: its layers are watched, but must be there
        return EngineConfig(
            **{name: getattr(self, name) for name in names}, device=device, max_batch=self.batch,
            max_context=self.max_context or self.longest + self.max_tokens + 64,
            tree=TreeShape.parse(tree) if tree else None,
        )  # fmt: skip

    def params(self, index: int) -> SamplingParams:
        """How prompt `index` is decoded."""
        return SamplingParams(max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed + index)


@final
@dataclass(frozen=True)
class Grid:
    """Cases to run, and what the product had besides them: why each of those cannot run."""

    cases: tuple[Case, ...]
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> "Grid":
        """The product of settings that are lists. Raises EngineError for unknown names, wrong values, and nothing to run.

        Combinations that no engine can run, such as a tree under a rule for chains, are left out. Settings that a case has
        no use for, such as the tree of plain decoding, do not multiply.
        """
        known = [field.name for field in fields(Case)]
        if unknown := sorted(set(settings) - set(known)):
            raise EngineError(
                f"the grid has {', '.join(unknown)}, which are no settings; there are: {', '.join(known)}"
            )
        names = [name for name in known if name in settings]
        values = [list(each) if isinstance(each, list | tuple) else [each] for each in map(settings.__getitem__, names)]
        if empty := [name for name, each in zip(names, values, strict=True) if not each]:
            raise EngineError(f"the grid's {', '.join(empty)} is an empty list: give it a value, or leave it out")
        _check_each(names, values)
        cases: dict[str, Case] = {}
        left_out = []
        for combination in product(*values):
            given = _needed(dict(zip(names, combination, strict=True)))
            try:
                case = Case(**given)
            except EngineError as error:
                left_out.append(str(error))
                continue
            cases.setdefault(case.id, case)
        if not cases:
            raise EngineError(f"the grid has no case that can run: {left_out[0]}")
        return cls(tuple(cases.values()), tuple(dict.fromkeys(left_out)))


def read_grid(path: Path) -> dict[str, Any]:
    """A grid file: settings as TOML, a list where several are to be tried. Raises EngineError for what is none."""
    settings = read_toml(path, "a grid file")
    if tables := [name for name, value in settings.items() if isinstance(value, dict)]:
        raise EngineError(f"{path}: [{tables[0]}] is a table; a grid has settings only, such as tree = ['chain:3']")
    return settings


def _check_each(names: list[str], values: list[list[Any]]) -> None:
    """Every value must be one that some case may have: a typing error is no combination to leave out."""
    for name, each in zip(names, values, strict=True):
        for value in each:
            if name == "tree" and isinstance(value, str) and value:
                TreeShape.parse(value)
            for attempt in _hosts(name, value):
                try:
                    replace(Case(), **attempt)
                    break
                except EngineError as error:
                    problem = error
            else:
                raise problem


def _hosts(name: str, value: Any) -> Iterator[dict[str, Any]]:
    """Cases in which a value may have its place."""
    yield {name: value}
    for other in ({"tree": "chain:3"}, {"verifier": "rejection"}, {"drafter": "ngram"}, {"allow_lossy": True}):
        if name not in other:
            yield {name: value, **other}


def _needed(given: dict[str, Any]) -> dict[str, Any]:
    """Without what the case has no use for."""
    idle = []
    if given.get("drafter") == "root" or given.get("engine", "ours") != "ours":
        idle = ["tree", "verifier", "candidates", "draft_vocab", "mtp"]
    elif given.get("drafter") == "ngram":
        idle = ["draft_vocab", "mtp"]
    elif given.get("mode") == "record":
        idle = ["tree", "verifier", "candidates"]
    if given.get("engine", "ours") != "ours":
        idle += ["drafter", "dtype", "threads", "draft_int8"]
        given = given | {"drafter": "root"}
        idle.remove("drafter")
    return {name: value for name, value in given.items() if name not in idle}
