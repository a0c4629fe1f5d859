"""A YAML file as plain values: ``yaml.safe_load``, which in addition refuses a setting that is given twice.

YAML itself forbids it, and PyYAML keeps the last one without a word: a recipe would train with another value than the one a user reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            if key.value in first:
                raise ValueError(
                    f"'{key.value}' is given twice, in lines {first[key.value]} and {line}: keep one of them"
                )
            first[key.value] = line
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str | Path) -> Any:
    """What a YAML file says, in dicts, lists, texts, numbers, bools and None.

    Raises ValueError, with the file's name, for one that cannot be read, is not YAML (the message has line and column) or gives a key of
    a mapping twice (it has both lines).
    """
    path = Path(path)
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read '{path}': {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not a YAML file: {error}") from error
    loader.name = path.name  # of the messages, which say "<unicode string>" otherwise
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise ValueError(f"'{path}' is not a YAML file: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    finally:
        loader.dispose()
