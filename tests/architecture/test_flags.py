"""The command line is v0.9's, every field says where its value comes from, and no flag is silently ignored."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from megatron.core.flags import FromArgs, kinds
from megatron.training.config import finalize, parser

REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = REPOSITORY / "tests" / "golden" / "arguments" / "cli_flags.tsv"
ACTIONS = {"_StoreAction": "store", "_StoreTrueAction": "store_true", "_StoreFalseAction": "store_false"}


@pytest.fixture
def actions(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return {action.dest: action for action in parser.build()._actions}


def recorded() -> list[dict[str, str]]:
    with GOLDEN.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def test_every_recorded_flag_parses_the_same(actions: dict) -> None:
    rows = recorded()
    assert len(rows) == 346
    for row in rows:
        action = actions[row["dest"]]
        kind = ACTIONS[type(action).__name__]
        ours = {
            "flags": ",".join(action.option_strings),
            "dest": action.dest,
            "kind": kind,
            "type": action.type.__name__ if action.type else "",
            "nargs": str(action.nargs or "") if kind == "store" else "",
            "default": repr(action.default),
            "choices": repr(list(action.choices)) if action.choices else "",
        }
        assert ours == row


def test_other_flags_are_extras(actions: dict) -> None:
    others = set(actions) - {row["dest"] for row in recorded()} - {"help"}
    assert others == {flag.dest for flag in parser.all_flags() if flag.group == "extras"}


def test_local_rank_defaults_to_the_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert parser.parse([]).local_rank == 3
    assert parser.parse(["--local-rank", "1"]).local_rank == 1


@pytest.mark.parametrize("config_class", parser.ALL_CONFIGS, ids=lambda cls: cls.__name__)
def test_every_field_is_one_of_four_kinds(config_class: type) -> None:
    bare = [name for name, kind in kinds(config_class).items() if kind is None]
    assert not bare


def test_dests_and_spellings_are_declared_once() -> None:
    flags = parser.all_flags()
    dests = [flag.dest for flag in flags]
    spellings = [spelling for flag in flags for spelling in flag.spellings]
    assert len(set(dests)) == len(dests)
    assert len(set(spellings)) == len(spellings)


def test_flags_are_explained() -> None:
    spellings = {spelling for flag in parser.all_flags() for spelling in flag.spellings}
    for flag in parser.all_flags():
        assert flag.group in parser.GROUPS, flag.dest
        assert flag.help.endswith("."), flag.dest
        assert flag.status in ("stable", "gpu") or flag.reason, flag.dest
        assert flag.instead is None or flag.instead.split()[0] in spellings, flag.dest


def test_values_read_from_arguments_exist_there(actions: dict) -> None:
    """A `from_args` field reads a flag, something validation adds, or is a setting of library users by its own name."""
    written = set().union(*(step.writes for step in finalize.STEPS))
    for config_class in parser.ALL_CONFIGS:
        for name, kind in kinds(config_class).items():
            if isinstance(kind, FromArgs):
                assert kind.dest in actions or kind.dest in written or kind.dest == name


def words_of(path: Path) -> set[str]:
    """Names a source file acts on; files of declarations count only where they read arguments or themselves."""
    shell = REPOSITORY / "megatron" / "training" / "config"
    text = path.read_text(encoding="utf-8")
    if path.parent == shell / "rules" or (path.parent == shell and path.stem not in ("finalize", "build")):
        return set()
    if path.name.endswith("_config.py"):
        return set(re.findall(r"(?:self|args)\.(\w+)", text))
    return set(re.findall(r"\w+", text))


def test_every_flag_is_read_or_marked() -> None:
    """Each flag's argument, or the configuration field it fills, is mentioned by code that acts on it."""
    sources = [
        path for folder in ("megatron", "tools", "tasks") for path in (REPOSITORY / folder).rglob("*.py")
    ]
    words = set().union(*map(words_of, [*sources, *REPOSITORY.glob("pretrain_*.py")]))
    unread = {
        flag.dest
        for flag in parser.all_flags()
        if flag.status not in ("noop", "unsupported") and not {flag.dest, flag.field} & words
    }
    assert not unread


def test_flag_reference_is_fresh() -> None:
    from tools import gen_flag_docs

    assert gen_flag_docs.OUTPUT.read_text(encoding="utf-8") == gen_flag_docs.render(), (
        "docs/flags.md is stale: run `python tools/gen_flag_docs.py`"
    )
