"""What README, CONTRIBUTING, CHANGELOG and docs/ name is there: links, files, modules, commands with their options, and every node."""

import argparse
import ast
import re
import shlex
from pathlib import Path

import pytest

PACK = Path(__file__).parents[2]
PRESENT = [PACK / "README.md", PACK / "CONTRIBUTING.md", *sorted((PACK / "docs").glob("*.md"))]
PAGES = [*PRESENT, PACK / "CHANGELOG.md"]
"""With the one that also speaks of what was."""
HELP = PACK / "web" / "docs"
OURS = ("dmm_core", "training", "nodes", "workflows", "web", "tests", "docs")
"""Folders of ours. models/ is left out: most of what is said of it is about ComfyUI's folder of that name."""
SHIPPED_MODELS = ("models/dmm/demo-", "models/loras/demo-", "models/controlnet/demo-")


def links(text: str) -> set[str]:
    """Targets of the relative links and pictures in a page."""
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    return {target for target in targets if not re.match(r"[a-z]+://|mailto:", target)}


def anchors(text: str) -> set[str]:
    """The headings of a page as GitHub names them in links."""
    headings = re.findall(r"^#+ +(.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in links(page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


def named_files(text: str) -> set[str]:
    """Names such as training/config.py or web/docs, as far as they are meant to be of this repository.

    Left out: NAME and FILE in capitals, wildcards and <...>, which stand for the reader's own, and what commands write.
    """
    names = re.findall(r"(?<![\w./\\-])(?:\.\./)*([\w-]+(?:/[\w.*<>{}$ -]*[\w*>}])+)", text)
    names = {word for name in names for word in name.split(" ")[:1]}
    ours = {name for name in names if name.split("/")[0] in OURS or name.startswith(SHIPPED_MODELS)}
    return {name for name in ours if not re.search(r"[*<>{}$]|\b[A-Z]{2,}\b", name)}


def missing_files(text: str) -> list[str]:
    return sorted(name for name in named_files(text) if not (PACK / name).exists())


def names_of(module: Path) -> set[str]:
    """What a module defines or imports at its top level."""
    found = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return found


def there_is(dotted: str) -> bool:
    """Whether comfyui_dmm.a.b is a module, or a name that the module comfyui_dmm.a has."""
    place, names = PACK, dotted.split(".")[1:]
    for i, name in enumerate(names):
        if (place / f"{name}.py").is_file():
            return not names[i + 1 :] or names[i + 1] in names_of(place / f"{name}.py")
        if not (place / name).is_dir():
            return (place / "__init__.py").is_file() and name in names_of(place / "__init__.py")
        place /= name
    return True


def named_modules(text: str) -> set[str]:
    """Modules, and names in them, that a page imports, runs or speaks of."""
    found = set(re.findall(r"\bcomfyui_dmm(?:\.\w+)+", text))
    found |= {f"comfyui_dmm.{name}" for name in re.findall(r"`((?:training|dmm_core|nodes)(?:\.\w+)+)", text)}
    for module, imported in re.findall(r"from (comfyui_dmm(?:\.\w+)+) import ([\w, ]+)", text):
        found |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    return found


def commands(text: str) -> list[list[str]]:
    """The dmm commands of a page's code: words of blocks and of `...`, continued lines joined, comments and [ ] left out."""
    code = re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    code += ["\n".join(re.findall(r"^ {4}(\S.*)$", re.sub(r"\n {8,}", " ", text), flags=re.MULTILINE))]
    code += re.findall(r"(?<!`)`(dmm [^`\n]+)`(?!`)", text)
    lines = [line for block in code for line in block.replace("\\\n", " ").splitlines()]
    said = [re.match(r"(?:\S*/)?dmm (.*)|torchrun .* comfyui_dmm\.training\.cli (.*)", line) for line in lines]
    return [shlex.split(re.sub(r"\$\(.*|[][|]|\s#.*|\.\.\.", " ", match[1] or match[2])) for match in said if match]


def mistake(words: list[str], parser: argparse.ArgumentParser) -> str:
    """What is wrong with a command, "" when nothing is: its subcommands and the names of its options are looked at."""
    options = set()
    while True:
        groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        options |= {option for action in parser._actions for option in action.option_strings}
        if not groups or not words or words[0].startswith("-"):
            break
        if words[0] not in groups[0].choices:
            return f"there is no command {words[0]!r}"
        parser, words = groups[0].choices[words[0]], words[1:]
    unknown = [word for word in words if word.startswith("--") and word not in options]
    return f"unknown option {', '.join(unknown)}" if unknown else ""


def registered_nodes() -> dict[str, str]:
    """node id -> display name, read from the sources: nodes/ needs ComfyUI to be imported."""
    found = {}
    for path in sorted((PACK / "nodes").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "io.Schema":
                said = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
                found[said["node_id"]] = said["display_name"]
    return found


# --- the pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert not broken_links(page)


@pytest.mark.parametrize("page", [*PRESENT, *sorted(HELP.glob("*.md"))], ids=lambda page: page.name)
def test_named_files_and_modules_are_there(page):
    text = page.read_text(encoding="utf-8")
    assert not missing_files(text)
    assert not [name for name in named_modules(text) if not there_is(name)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_known(page):
    from comfyui_dmm.training.cli import parser

    wrong = {" ".join(words): mistake(words, parser()) for words in commands(page.read_text(encoding="utf-8"))}
    assert not {command: why for command, why in wrong.items() if why}


def test_the_file_tree_of_the_readme():
    """Every folder and file that it names is there, and it leaves out no module of dmm_core/ and no room of training/."""
    (tree,) = re.findall(
        r"^### Files\n+```\n(.*?)^```", (PACK / "README.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    named, folder = set(), ""
    for line in tree.splitlines():
        words = line.strip().split("  ")[0].split(" ")
        if not line.startswith(" "):
            folder = words[0] if words[0].endswith("/") else ""
        named |= {line.startswith(" ") * folder + word for word in words if re.fullmatch(r"\w+(\.py|/)", word)}
    assert not [name for name in named if not (PACK / name).exists()]
    modules = {f"dmm_core/{path.name}" for path in (PACK / "dmm_core").glob("*.py")}
    rooms = {f"training/{path.name}" for path in (PACK / "training").glob("*.py")}
    rooms |= {f"training/{path.parent.name}/" for path in (PACK / "training").glob("*/__init__.py")}
    assert not {name for name in modules | rooms if not name.endswith("__init__.py")} - named


def test_the_readme_has_every_node():
    text = (PACK / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| Node \|.*\n\| --- .*\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [row.split("|")[1].strip() for table in tables for row in table.splitlines()]
    assert sorted(rows) == sorted(registered_nodes().values())


def test_every_node_has_a_help_page():
    titles = {page.stem: page.read_text(encoding="utf-8").splitlines()[0] for page in HELP.glob("*.md")}
    assert titles == {node: f"# {name}" for node, name in registered_nodes().items()}


@pytest.mark.parametrize("page", sorted(HELP.glob("*.md")), ids=lambda page: page.stem)
def test_a_help_page_has_a_picture_and_an_example(page):
    """A small picture of its own, and the title of a template, which is in the template browser."""
    text = page.read_text(encoding="utf-8")
    (picture,) = re.findall(r"^!\[[^\]]+\]\(([^)]+)\)$", text, re.MULTILINE)
    assert picture == f"{page.stem}.webp" and 0 < (HELP / picture).stat().st_size <= 40_000
    (title,) = re.findall(r"^Example: the template \*(DMM [^*]+)\*", text, re.MULTILINE)
    assert (PACK / "workflows" / f"{title}.json").exists()
    if "where *Style Selector* is" not in text:
        assert f'"{page.stem}"' in (PACK / "workflows" / f"{title}.json").read_text(encoding="utf-8")


def test_the_pictures_of_the_help_pages_are_small():
    pictures = list(HELP.glob("*.webp"))
    assert {picture.stem for picture in pictures} == registered_nodes().keys()
    assert sum(picture.stat().st_size for picture in pictures) <= 600_000


# --- the checks themselves --------------------------------------------------------------------------------------------


def test_the_checks_find_what_is_wrong(tmp_path):
    (tmp_path / "other.md").write_text("# One, two\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md) [b](other.md#one-two) [c](other.md#three) ![d](gone.jpg) [e](https://example.org/x)")
    assert sorted(broken_links(page)) == ["gone.jpg", "other.md#three"]
    said = "`training/config.py`, training/gone.py, (web/docs), workflows/NAME.json, models/checkpoints, models/dmm/demo-gone.safetensors"
    assert missing_files(said) == ["models/dmm/demo-gone.safetensors", "training/gone.py"]
    modules = (
        "from comfyui_dmm.training.config import TrainConfig, Gone\n`dmm_core.gone` `training.teachers.teacher.Teacher`"
    )
    assert sorted(name for name in named_modules(modules) if not there_is(name)) == [
        "comfyui_dmm.dmm_core.gone",
        "comfyui_dmm.training.config.Gone",
    ]


@pytest.mark.parametrize(
    "line, said",
    [
        ("dmm distill --config my.yaml --dry-run    # --comment", ""),
        ("dmm distil --config my.yaml", "distil"),
        (".venv/bin/dmm demo build --work out --job 2", "--job"),
        ("torchrun --nproc_per_node=4 -m comfyui_dmm.training.cli distill --konfig my.yaml", "--konfig"),
        ("dmm cache images --images DIR \\\n    --outputs DIR", "--outputs"),
    ],
)
def test_wrong_commands_are_found(line, said):
    from comfyui_dmm.training.cli import parser

    for text in (f"```sh\n{line}\n```\n", f"Words\n\n    {line}\n"):
        (words,) = commands(text)
        assert said in mistake(words, parser()) and bool(said) == bool(mistake(words, parser()))
