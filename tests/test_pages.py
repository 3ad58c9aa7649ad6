"""The repository's pages: links lead somewhere, commands and paths exist, code blocks are valid, tables of keys are complete."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.main import get_command

from dfqbench.analysis.ledger import load_ledger
from dfqbench.cli.app import app
from dfqbench.data.sets import BUILT_IN
from dfqbench.method.registry import built_in_names
from dfqbench.quantization.protocol import Protocol
from dfqbench.sweep.schema import Budget, Kept, NamedSet, RealImages, Selection, Sweep, Tracking
from dfqbench.teachers import TeacherSpec
from dfqbench_slurm.profile import Profile, shipped

ROOT = Path(__file__).parents[1]
ROOMS = ("benchmark", "methods", "configs", "slurm", "results", "tests")
# what runs write into results/: a fresh checkout has none of it
WRITTEN = (
    "runs", "bundles", "images", "teachers", "sweeps", "selections", "replicates", "set-aside", "figures", "report.html", "wandb", "weights",
)  # fmt: skip
WIDE = 120
GUIDES = (
    "README.md",
    "configs/README.md",
    "methods/README.md",
    "results/README.md",
    "results/speed/README.md",
    "slurm/README.md",
    "benchmark/export/README.md",
)
TABLES: dict[str, tuple[str, type[BaseModel]]] = {
    "Keys of a sweep": ("configs/README.md", Sweep),
    "Keys of `evaluate`": ("configs/README.md", NamedSet),
    "Keys of `budget`": ("configs/README.md", Budget),
    "Keys of `selection`": ("configs/README.md", Selection),
    "Keys of `yardsticks`": ("configs/README.md", RealImages),
    "Keys of `tracking`": ("configs/README.md", Tracking),
    "Keys of `store`": ("configs/README.md", Kept),
    "Keys of a teacher": ("configs/README.md", TeacherSpec),
    "Keys of a protocol": ("configs/README.md", Protocol),
    "Keys of a profile": ("slurm/README.md", Profile),
}


def pages() -> list[str]:
    """Paths from the root of all pages but templates; of an unpacked archive, which git does not know, all that are there."""
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files", "*.md"], capture_output=True, text=True)
    found = listed.stdout.splitlines() if listed.returncode == 0 else []
    found = found or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.md")]
    found = [path for path in found if not any(part == "templates" or part.startswith(".") for part in Path(path).parts)]
    return sorted(path for path in found if Path(path).parts[0] in (*ROOMS, Path(path).name) and (ROOT / path).is_file())


PAGES = pages()
every_page = pytest.mark.parametrize("page", PAGES)


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


FENCE = re.compile(r"^([ ]*)```([\w-]*)[^\n]*\n(.*?)^\1```[ ]*$", re.DOTALL | re.MULTILINE)


def blocks(text: str, *languages: str) -> list[str]:
    return [block for _, language, block in FENCE.findall(text) if language in languages]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def inline_code(text: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]


def anchors(text: str) -> set[str]:
    """Of a page's headings, by GitHub's rule: lower case, without punctuation, hyphens for blanks, a number behind repeated ones."""
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} (.*?)\s*#*$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        anchor = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number, unique = 0, anchor
        while unique in found:
            number += 1
            unique = f"{anchor}-{number}"
        found.add(unique)
    return found


def links(text: str) -> list[str]:
    without_code = re.sub(r"`[^`]*`", "code", prose(text))
    return [target for target in re.findall(r"\]\(\s*<?([^)\s>]+)", without_code) if not re.match(r"[a-z][a-z0-9+.-]*:", target)]


def section(text: str, title: str) -> str:
    """What is under a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", text, re.DOTALL | re.MULTILINE)
    assert found, f"no heading {title!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The rows of the tables in a text, without their headings."""
    found = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in found if line.startswith(("| `", "| [`"))]


def named(text: str) -> set[str]:
    """The names in the first column of the tables of a text."""
    return {name for first, *_ in rows(text) for name in re.findall(r"`([^`]+)`", first)}


# --- links ------------------------------------------------------------------------------------------------------------


def test_there_are_pages() -> None:
    assert {"README.md", "methods/README.md"} <= set(PAGES)


def test_anchors_follow_githubs_rule() -> None:
    text = "# W&B, `set_up` -- and [more](x.md)!\n## Twice\n## Twice\n```\n# a comment\n```\n"
    assert anchors(text) == {"wb-set_up----and-more", "twice", "twice-1"}


@every_page
def test_its_links_lead_somewhere(page: str) -> None:
    dead = []
    for target in links(read(page)):
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and (file.suffix != ".md" or anchor not in anchors(file.read_text(encoding="utf-8")))):
            dead.append(target)
    assert not dead, f"{page}: no such file or heading: {', '.join(dead)}"


@pytest.mark.parametrize("page", GUIDES[1:])
def test_it_links_back_to_the_readme(page: str) -> None:
    assert f"]({'../' * len(Path(page).parts[:-1])}README.md)" in read(page)


# --- code -------------------------------------------------------------------------------------------------------------


def commands(text: str) -> Iterator[str]:
    for block in blocks(text, "", "sh", "bash", "shell", "console", "text"):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.match(r"\s*(?:\$ )?(?:\w+=\S+ )*(?:\S*/)?(dfqbench [a-z].*)", line):
                yield found[1]
    for code in inline_code(text):
        if re.match(r"dfqbench [a-z]", code):
            yield code


def wrong_with(line: str) -> str:
    """What is wrong with a command line; empty where its command and all its options exist."""
    command: Any = get_command(app)
    words = shlex.split(line, comments=True)[1:]
    while words and hasattr(command, "commands"):
        if words[0] not in command.commands:
            break
        command = command.commands[words.pop(0)]
    if hasattr(command, "commands") and (not command.invoke_without_command or (words and not words[0].startswith("-"))):
        return f"no command {' '.join(words[:1]) or '(missing)'}"
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in known]
    return f"no option {', '.join(unknown)}" if unknown else ""


@every_page
def test_the_commands_that_it_shows_exist_with_their_options(page: str) -> None:
    wrong = [f"{line}: {why}" for line in commands(read(page)) if (why := wrong_with(line))]
    assert not wrong, f"{page}: " + "; ".join(wrong)


@pytest.mark.parametrize("line", ["dfqbench rum quickstart", "dfqbench run quickstart --retry", "dfqbench wandb", "dfqbench methods shw gdfq"])
def test_a_wrong_command_is_found(line: str) -> None:
    assert wrong_with(line)


def test_every_command_is_shown_somewhere() -> None:
    shown = {line.split()[1] for page in PAGES for line in commands(read(page))}
    assert set(get_command(app).commands) <= shown  # type: ignore[attr-defined]


@every_page
def test_the_make_targets_that_it_shows_exist(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line for block in blocks(read(page), "", "sh", "bash", "console") for line in block.splitlines()] + inline_code(read(page))
    shown = {found[1] for line in lines if (found := re.match(r"\s*make ([a-z][\w-]*)", line))}
    assert shown <= targets, f"{page}: {shown - targets}"


def paths(text: str) -> set[str]:
    """What code on a page calls by a path from the root of the repository."""
    code = [*inline_code(text), *(block for _, _, block in FENCE.findall(text))]
    found = {path for part in code for path in re.findall(rf"(?<![\w./<>$}}-])(?:{'|'.join(ROOMS)})/[^\s`'\"|,;:()\[\]{{}}]*", part)}
    return {path.rstrip(".") for path in found}


def is_there(path: str) -> bool:
    if re.match(rf"results/({'|'.join(map(re.escape, WRITTEN))})(/|$)", path):
        return True
    pattern = re.sub(r"<[^>]*>|\b[A-Z]{2,}\b(?!\.md)|\.\.\.", "*", path).rstrip("/")
    return any(ROOT.glob(pattern))


@every_page
def test_the_paths_that_it_names_exist(page: str) -> None:
    missing = sorted(path for path in paths(read(page)) if not is_there(path))
    assert not missing, f"{page}: {', '.join(missing)}"


@every_page
def test_its_python_compiles_and_its_yaml_parses(page: str) -> None:
    for code in blocks(read(page), "python", "py"):
        compile(code, page, "exec")
    for text in blocks(read(page), "yaml", "yml"):
        assert yaml.safe_load(text) is not None


# --- size -------------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert len(read("README.md").splitlines()) <= 150


@pytest.mark.parametrize("page", GUIDES)
def test_its_lines_are_narrow(page: str) -> None:
    wide = [number for number, line in enumerate(read(page).splitlines(), 1) if len(line) > WIDE and (page == "README.md" or line[0] != "|")]
    assert not wide, f"{page}: lines {wide} are wider than {WIDE} characters"


# --- completeness -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("title", list(TABLES))
def test_a_table_of_keys_is_complete_and_its_defaults_are_true(title: str) -> None:
    page, model = TABLES[title]
    found = {key.strip("`"): default for key, _, default, *_ in rows(section(read(page), title))}
    assert list(found) == list(model.model_fields), "every key, in the order of the model"
    assert found == {key: default_of(field) for key, field in model.model_fields.items()}


def default_of(field: FieldInfo) -> str:
    """As the tables write it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    value = value.model_dump(exclude_none=True) if isinstance(value, BaseModel) else value
    return f"`{yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix('...' + chr(10)).strip()}`"


def test_the_example_sweep_shows_every_key() -> None:
    content = next(content for text in blocks(read("configs/README.md"), "yaml") if (content := yaml.safe_load(text)).get("name") == "mine")
    assert Sweep(**content).seeds == [0, 1, 2]
    assert set(content) == set(Sweep.model_fields)


def test_the_tables_of_what_is_shipped_are_complete() -> None:
    configs, methods, slurm = (read(f"{room}/README.md") for room in ("configs", "methods", "slurm"))
    assert named(section(configs, "Shipped configs")) == {file.stem for file in (ROOT / "configs").glob("*.yaml")}
    assert {name.partition(":")[0] for name in named(section(configs, "Evaluation sets"))} - {"NAME"} == set(BUILT_IN)
    assert named(section(methods, "Built-in methods")) == set(built_in_names())
    assert named(section(slurm, "Profiles")) == set(shipped())


def test_every_environment_variable_is_in_the_table() -> None:
    files = [file for room in ("benchmark", "methods", "slurm", "tests") for file in (ROOT / room).rglob("*.py")]
    used = {name for file in [*files, ROOT / ".ci" / "run"] for name in re.findall(r"DFQBENCH_[A-Z]+(?:_[A-Z]+)*", file.read_text())}
    assert used <= named(section(read("configs/README.md"), "Environment variables"))


def test_every_study_is_in_the_list_of_results() -> None:
    listed = section(read("results/README.md"), "Reference results")
    for study in sorted((ROOT / "results" / "reference").glob("*/README.md")):
        assert f"(reference/{study.parent.name}/README.md)" in listed


def test_the_ledger_is_as_large_as_it_says() -> None:
    ledger = load_ledger()
    assert f"{len(ledger.claims)} claims" in read("results/README.md")
    assert f"for {len(ledger.disputes)} of these the sources disagree" in read("results/README.md")
