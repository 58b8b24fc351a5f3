"""What the prose says is held against the program: links, commands, names, rooms and the example stage."""

from __future__ import annotations

import ast
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import pytest
import tiny

import edgekit
from edgekit import plan
from edgekit.artifact import open_artifact, seal
from edgekit.cli import cli
from edgekit.formats import safetensors
from edgekit.model import ARCHITECTURES, resolve_model
from edgekit.recipe import Evaluation, recipe_names
from edgekit.stage import Stage, StageContext, find_stage, stage_names
from edgekit.store import Store
from edgekit.target import LOCAL, all_targets, find_target

ROOT = Path(__file__).parents[1]
PACKAGE = Path(edgekit.__file__).parent
GENERATED = {"cli.md", "stages.md"}  # `make docs` writes them, and tests/test_cli.py holds them
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE = [page for page in PAGES if page.name not in GENERATED]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
TARGETS = {"all", LOCAL, *(name for target in all_targets() for name in (target.name, *target.aliases))}

by_page = pytest.mark.parametrize("page", PROSE, ids=lambda page: page.relative_to(ROOT).as_posix())


def fences(text: str, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """Inline code; a span may go over the end of a line."""
    return [
        " ".join(span.split())
        for span in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    ]


def code(text: str) -> list[str]:
    """Inline code and the lines of every block, fenced or indented."""
    fenced = [line for block in re.findall(r"^```[^\n]*\n(.*?)^```$", text, re.M | re.S) for line in block.splitlines()]
    return [*spans(text), *fenced, *re.findall(r"^    (\S.*)$", text, re.MULTILINE)]


def commands(text: str) -> list[list[str]]:
    """Words of every quoted command, without the prompt, the remark behind it and redirection."""
    found = [re.match(r"(?:\$ )?edgekit (.+?)(?:\s{2,}.*|\s+[>|].*)?$", line) for line in code(text)]
    return [shlex.split(match[1]) for match in found if match]


def slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


# --- links


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_relative_link_resolves(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        place = page.parent / name if name else page
        assert place.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", place.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"(docs/{page.name}" not in text] == []


def test_picture_is_well_formed_and_needs_nothing_else() -> None:
    text = (ROOT / "docs" / "pipeline.svg").read_text()
    root = ElementTree.fromstring(text)
    words = " ".join("".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text"))
    assert [name for name in stage_names() if name != "reference" and name not in words] == []
    assert "href" not in text
    assert "url(http" not in text
    assert "prefers-color-scheme: dark" in text


# --- commands, options and names


@by_page
def test_every_quoted_command_parses(page: Path) -> None:
    for words in commands(page.read_text()):
        command: click.Command = cli
        context = click.Context(cli, info_name="edgekit")
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            child = command.get_command(context, words[0])
            assert child is not None, words
            command, words = child, words[1:]
            context = click.Context(command, parent=context, info_name=command.name)
        if words in ([], ["--help"]):
            continue  # a command that is only named, or a request to print its help
        try:
            command.make_context(command.name, list(words))
        except click.UsageError as error:
            pytest.fail(f"{words}: {error.format_message()}")


def test_the_search_for_commands_finds_them() -> None:
    text = (
        'so `edgekit plan\n-t pi` and\n\n    edgekit run B "a b"     remark\n\n```text\n$ edgekit cache gc > f\n```\n'
    )
    assert commands(text) == [["plan", "-t", "pi"], ["cache", "gc"], ["run", "B", "a b"]]
    assert len(commands((ROOT / "README.md").read_text())) >= 7


@by_page
def test_every_option_named_alone_exists(page: Path) -> None:
    known: set[str] = set()

    def collect(command: click.Command) -> None:
        known.update(name for parameter in command.params for name in parameter.opts)
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                child = command.get_command(context, name)
                assert child is not None
                collect(child)

    collect(cli)
    named = {span.split()[0] for span in spans(page.read_text()) if span.startswith("--")}
    assert named - known - {"--help"} == set()


@by_page
def test_every_setting_names_a_parameter(page: Path) -> None:
    for stage, field in re.findall(r"--set (\w+)\.(\w+)=", "\n".join(code(page.read_text()))):
        model = Evaluation if stage == "evaluation" else find_stage(stage).params
        assert field in model.model_fields, f"{stage}.{field}"


@by_page
def test_every_recipe_and_target_exists(page: Path) -> None:
    text = "\n".join(code(page.read_text()))
    recipes = set(re.findall(r"--recipe ([\w.-]+)", text)) | {
        s for s in code(page.read_text()) if re.fullmatch(r"gguf-[\w-]+", s)
    }
    targets = set(re.findall(r"(?:--target|-t|targets show) ([\w.-]+)", text))
    targets |= set(re.findall(r"dist/([a-z][\w-]+)", text))
    placeholder = re.compile(r"[A-Z]+|.*\.yaml")
    assert {name for name in recipes if not placeholder.fullmatch(name)} - set(recipe_names()) == set()
    assert {name for name in targets if not placeholder.fullmatch(name)} - TARGETS == set()


@by_page
def test_every_make_target_exists(page: Path) -> None:
    made = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {match[1] for line in code(page.read_text()) if (match := re.match(r"make ([a-z-]+)", line))}
    assert named - made == set()


@by_page
def test_every_environment_variable_is_read_somewhere(page: Path) -> None:
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert {name for name in re.findall(r"EDGEKIT_\w+", page.read_text()) if f'"{name}"' not in source} == set()


def test_extras_are_the_declared_ones() -> None:
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"edgekit\[(\w+)\]", (ROOT / "README.md").read_text())) == set(declared)


def test_every_figure_of_the_page_on_measuring_is_one_of_ours() -> None:
    page = (ROOT / "docs" / "measuring.md").read_text()
    cells = re.findall(r"^\| (`.+?) \|", page, re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    assert len(names) >= 13
    assert [name for name in names if f'"{name}"' not in source] == []


def test_architectures_are_the_supported_ones() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    table = page.partition("<!-- architectures:")[2].partition("<!-- end of architectures -->")[0]
    assert dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|$", table, re.MULTILINE)) == ARCHITECTURES


# --- the page on architecture


def rooms() -> list[str]:
    (tree,) = [block for block in fences(ARCHITECTURE) if block.startswith("edgekit/\n")]
    return re.findall(r"^  (\S+) +\S", tree, re.MULTILINE)


def room_of(path: Path) -> str:
    first, *rest = path.relative_to(PACKAGE).parts
    return f"{first}/" if rest else first


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a module imports when it is itself imported."""
    names: list[str] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "edgekit":
            names += [f"edgekit.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
    first = [name.split(".")[1] for name in names if name.startswith("edgekit.")]
    return {f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py" for name in first}


def test_tree_names_every_room_and_no_other() -> None:
    real = {room_of(path) for path in PACKAGE.rglob("*") if path.suffix in (".py", ".yaml")}
    assert sorted(rooms()) == sorted(real)


def test_imports_go_down_the_list() -> None:
    order = {room: position for position, room in enumerate(rooms())}
    upward = [
        f"{path.relative_to(PACKAGE)} imports {imported}"
        for path in PACKAGE.rglob("*.py")
        for imported in imported_rooms(path)
        if imported in order and order[imported] < order[room_of(path)]
    ]
    # the lookup of stages names their package to list its files
    assert upward == ["stage.py imports stages/"]
    assert not imported_rooms(PACKAGE / "stages" / "__init__.py")


def test_every_path_exists() -> None:
    named = [span for span in spans(ARCHITECTURE) if re.fullmatch(r"[\w./]+(\.py|/)", span)]
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists() and not (PACKAGE / name).exists()] == []


def test_every_function_on_the_way_is_defined() -> None:
    section = ARCHITECTURE.partition("## The way of a build")[2].partition("\n## ")[0]
    names = {span.rpartition(".")[2] for span in spans(section) if re.fullmatch(r"[A-Za-z_][\w.]*(?<!\.py)", span)}
    defined = {
        node.name
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    assert len(names) > 15
    assert names - defined - set(stage_names()) == set()


def test_cache_key_holds_exactly_the_listed_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(plan, "canonical_sha256", lambda fields: seen.append(fields) or "key")
    stage = find_stage("gguf")
    assert plan.step_key(plan.Step(stage, stage.params(), -1), ["digest"], find_target("jetson")) == "key"
    rule = ARCHITECTURE.partition("4. **The cache key")[2].partition("\n5. ")[0]
    listed = [name for item in re.findall(r"^   - (.+?):", rule, re.MULTILINE) for name in re.findall(r"`(\w+)`", item)]
    assert listed == list(seen[0])


def test_example_stage_is_a_stage_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = fences(ARCHITECTURE, "python")
    module = types.ModuleType("edgekit.stages.bf16")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(example, "architecture.md", "exec"), module.__dict__)
    stage = module.run
    assert isinstance(stage, Stage)
    assert (stage.name, stage.summary) == ("bf16", "Store the weights in bfloat16.")
    source = resolve_model(str(tiny.write_checkpoint(tmp_path / "model"))).artifact
    out = tmp_path / "out"
    out.mkdir()
    facts = stage.run(source, out, stage.params(), StageContext(store=Store(tmp_path / "store")))
    seal(out, stage.gives, facts)
    assert {t.dtype for t in safetensors.read_checkpoint(out).values()} == {"BF16"}
    assert set(open_artifact(out).manifest.files) == set(source.manifest.files)
