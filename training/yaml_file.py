"""A YAML file as plain values: ``yaml.safe_load`` with what a stranger's or a tired user's file needs.

- A setting that is given twice is refused. YAML itself forbids it, and PyYAML keeps the last one without a word: a recipe would train
  with another value than the one a user reads.
- Numbers that YAML reads otherwise than people (``010`` is 8, ``1:30`` is 90) are refused.
- Size, depth and what aliases stand for are limited, before anything is made of them: a few hundred bytes of anchors can stand for
  gigabytes, and nested brackets take PyYAML time that grows with their square.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

LARGEST = 128 * 1024
"""Bytes of a file; a thousand teachers take as much, and PyYAML a second or two for it."""
DEEPEST = 40
"""Levels of lists and mappings in each other."""
MOST_VALUES = 50_000
"""Values of a file, those of an alias counted wherever it stands."""
Place = tuple[str | int, ...]
"""Where a value is: the keys and numbers that lead to it, as ("teachers", 0, "name")."""
_ODD_NUMBER = re.compile(r"[-+]?(0[0-9_]+|[0-9_]+(:[0-9_.]+)+)")
_INT, _FLOAT, _STR = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "str"))
_MERGE = "tag:yaml.org,2002:merge"


class Document(NamedTuple):
    """value: what the file says; written: of every value that YAML reads as something else than text, how it is written."""

    value: Any
    written: dict[Place, str]


class _Loader(yaml.SafeLoader):
    depth = 0

    def fetch_flow_collection_start(self, token: Any) -> None:
        self._check_depth(self.flow_level, self.line)
        super().fetch_flow_collection_start(token)

    def add_indent(self, column: int) -> bool:
        self._check_depth(len(self.indents), self.line)
        return super().add_indent(column)

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._check_depth(self.depth, self.line)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _check_depth(self, depth: int, line: int) -> None:
        if depth > DEEPEST:
            raise ValueError(f"more than {DEEPEST} levels of lists and mappings in each other, in line {line + 1}")

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if isinstance(node, yaml.ScalarNode):
            check_scalar(node)
        try:
            return super().construct_object(node, deep)
        except (
            ArithmeticError,
            LookupError,
            AttributeError,
            TypeError,
            ValueError,
        ) as error:  # of what PyYAML's makers leave to chance
            if not isinstance(node, yaml.ScalarNode):
                raise
            what = node.tag.removeprefix("tag:yaml.org,2002:")
            raise ValueError(
                f"'{shortened(node.value)}' in line {node.start_mark.line + 1} is no {what}, which YAML takes it for: put it into "
                "quotes if it is a text"
            ) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # "!!map [1]" is a list
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line = key.start_mark.line + 1
            if key.value in first:
                raise ValueError(
                    f"'{shortened(key.value)}' is given twice, in lines {first[key.value]} and {line}: keep one of them"
                )
            first[key.value] = line
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | Path) -> Any:
    """What a YAML file says, in dicts, lists, texts, numbers, bools and None. Raises ValueError as ``read_document`` does."""
    return read_document(path).value


def read_document(path: str | Path) -> Document:
    """What a YAML file says, and how it is written.

    Raises ValueError, with the file's name, for one that cannot be read, is too large, too deep or a bomb of aliases, is not YAML (the
    message has line and column) or gives a key of a mapping twice (it has both lines).
    """
    path = Path(path)
    loader = None
    try:
        loader = _Loader(_text(path))
        loader.name = path.name  # of the messages, which say "<unicode string>" otherwise
        node = loader.get_single_node()
        if node is None:
            return Document(None, {})
        check_aliases(node)
        return Document(loader.construct_document(node), dict(_written(node)))
    except OSError as error:
        raise ValueError(f"cannot read '{path}': {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not a YAML file: {shortened(str(error), 600)}") from error
    except (
        ArithmeticError,
        LookupError,
        AttributeError,
        TypeError,
    ) as error:  # of lists and mappings under a wrong tag
        raise ValueError(f"'{path}' has values that YAML cannot make ({shortened(str(error))})") from error
    except RecursionError as error:
        raise ValueError(f"{path.name}: values in each other without end") from error
    except ValueError as error:
        raise ValueError(f"{path.name}: {shortened(str(error), 600)}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _text(path: Path) -> str:
    """The file's text, line ends as they are. Raises ValueError for what is too large, or no file (a pipe would be waited for)."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    with path.open("rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it is larger than {LARGEST // 1024} KB, which no configuration is")
    return content.decode("utf-8-sig")


def check_scalar(node: yaml.ScalarNode) -> None:
    """Raises ValueError for a number that YAML reads otherwise than people do, and for a text that cannot be written down."""
    line = node.start_mark.line + 1
    if node.tag in (_INT, _FLOAT) and _ODD_NUMBER.fullmatch(node.value):
        raise ValueError(
            f"{shortened(node.value)} in line {line} is another number to YAML (a leading 0 means octal, a colon base 60): write it "
            "without, or put it into quotes if it is a text"
        )
    if node.tag == _STR and (odd := re.search("[\x00\ud800-\udfff]", node.value)):
        raise ValueError(f"a text in line {line} has the character {odd[0]!r}, which no name may have")


def check_aliases(root: yaml.Node) -> None:
    """Raises ValueError for aliases that stand for more than ``MOST_VALUES`` values, for too many levels, or for themselves."""
    sizes: dict[int, int] = {}
    levels: dict[int, int] = {}
    inside: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in inside:
            raise ValueError(f"the alias in line {node.start_mark.line + 1} stands for something that it is in")
        if id(node) not in sizes:
            inside.add(id(node))
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            pairs = [one for child in children for one in (child if isinstance(child, tuple) else (child,))]
            sizes[id(node)] = 1 + sum(size(child) for child in pairs)
            levels[id(node)] = 1 + max((levels[id(child)] for child in pairs), default=0)
            if levels[id(node)] > DEEPEST + 1:
                raise ValueError(f"aliases make more than {DEEPEST} levels of lists and mappings in each other")
            inside.remove(id(node))
        return sizes[id(node)]

    if (count := size(root)) > MOST_VALUES:
        raise ValueError(f"it stands for {shortened(str(count), 20)} values, at most {MOST_VALUES} are read")


def _written(node: yaml.Node, place: Place = ()) -> Any:
    """(place, text) of the scalars that are not read as text; keys that are no texts lead nowhere."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield from _written(value, (*place, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _written(value, (*place, number))
    elif node.tag != _STR:
        yield place, node.value


def shown(value: Any) -> str:
    """A value in an error message: its repr, cut where it is long, and no number of thousands of digits."""
    try:
        return shortened(repr(value), 200)
    except ValueError:  # Python refuses to write such numbers
        return "a number of thousands of digits"


def shortened(text: str, most: int = 60) -> str:
    """A text as it fits into an error message."""
    return text if len(text) <= most else f"{text[:most]}..."
